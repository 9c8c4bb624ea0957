"""LatentVLM: a vision-language model of transformers that can reason in latent visual tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from mirage_vlm.modeling.checkpoint import Pretrained
from mirage_vlm.modeling.config import LatentConfig
from mirage_vlm.modeling.encoding import Encoder
from mirage_vlm.modeling.family import family_of
from mirage_vlm.modeling.features import FeatureStore
from mirage_vlm.modeling.feedback import Patches, build_feedback
from mirage_vlm.modeling.limits import limited
from mirage_vlm.modeling.pooling import Targets, build_pooling, patch_boxes, region_averages, with_places

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mirage_vlm.decoding.config import EngineConfig, GenerationChanges, GenerationConfig
    from mirage_vlm.decoding.response import Event
    from mirage_vlm.formats.asked import Asked
    from mirage_vlm.trajectory import Trajectory


class LatentVLM(Pretrained):
    """A transformers VLM, its tokenizer and image processor, and the meaning of its latent spans.

    Args:
        model: the transformers model, for example a `Qwen2_5_VLForConditionalGeneration`.
        tokenizer: its tokenizer, which holds the three latent tokens.
        image_processor: its image processor; it gets the limits of the configuration.
        config: the latent part of the checkpoint.

    Raises:
        MirageError: unknown family, pooling or feedback, or impossible limits of pixels.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, config: LatentConfig):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.family = family_of(model.config)
        self.image_processor = limited(image_processor, config)
        self.feature_store: FeatureStore | None = None  # set where a frozen tower's features are kept
        stops = () if tokenizer is None else tuple(sorted(self.stop_ids()))
        self.encoder = Encoder(tokenizer, self.image_processor, config, self.family, stops)
        self.feedback = build_feedback(config.feedback, self.width, config.codes).to(model.device, model.dtype)
        self.pooling = build_pooling(config.pooling, self.width, config.latent_size).to(model.device, model.dtype)
        config.write(model.config)

    # -- what a latent span means ------------------------------------------------------------------------------

    def recast(self, token_ids: torch.Tensor, previous: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        """The input embeddings of the next position: this is the whole of latent reasoning.

        Where the next token is `latent_pad`, the hidden state of the position before it (after the final norm,
        what the LM head would read) is fed back; elsewhere the token's own embedding is used. Stage 2, decoding
        and everything built on them call this function.

        Args:
            token_ids: [...] the next tokens.
            previous: [..., D] last hidden states of the positions before them.
            patches: of the pictures of each row, for a feedback that reads them.

        Returns:
            [..., D] input embeddings.
        """
        latent = (token_ids == self.config.pad_id).unsqueeze(-1)
        return torch.where(latent, self.feedback(previous, patches), self.embed(token_ids))

    def targets(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor,
        lengths: Sequence[int],
        detach: bool = True,
        keys: Sequence[str] | None = None,
        regions: torch.Tensor | None = None,
    ) -> Targets:
        """The targets of latent spans: each helper image through the vision tower, then pooled.

        Args:
            pixel_values: [patches of all helper images, C · t · p · p].
            grid_thw: [spans, 3].
            lengths: k of each span.
            detach: keep gradients out of the vision tower.
            keys: as for `image_features`.
            regions: [sum of k, 4 · m] the boxes of each latent that has its own, at most m, NaN for those that are not
                there; None = no boxes.

        Returns:
            Targets of all latents in span order, with a part for each box.
        """
        whole: list[torch.Tensor | None] = [None] * len(lengths)
        boxes = whole if regions is None else regions.split(list(lengths))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            features = self.image_features(pixel_values, grid_thw, keys)
        pooled = []
        for patches, grid, k, own in zip(features, grid_thw, lengths, boxes, strict=True):
            shape = self.family.merged_grid(grid)
            if own is None or bool(own[0].isnan().all()):
                targets = self.pooling(patches, shape, k)
                pooled.append(Targets(targets, torch.arange(len(targets), device=patches.device)))
                continue
            several = own.view(k, -1, 4)
            there = ~several[..., 0].isnan()  # [k, m]
            shown = region_averages(patches, shape, several[there])
            if self.config.places:
                shown = with_places(shown, several[there], shape)
            pooled.append(Targets(shown, there.nonzero()[:, 0].to(patches.device)))
        return Targets.join(pooled)

    # -- the pieces of a forward pass --------------------------------------------------------------------------

    def image_features(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, keys: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        """Features of each picture, [n_i, D] in raster order; kept ones where there is a store and no graph is built.

        Args:
            pixel_values: [patches of all pictures, C · t · p · p].
            grid_thw: [pictures, 3].
            keys: `picture_keys` of them, if they are known; only a store reads them.
        """
        compute = partial(self.family.image_features, self.model)
        if self.feature_store is None or torch.is_grad_enabled():
            return compute(pixel_values, grid_thw)
        return self.feature_store.features(pixel_values, grid_thw, keys, compute)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[...] token ids → [..., D] embeddings of the table."""
        return self.model.get_input_embeddings()(token_ids)

    def embed_prompt(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        grid_thw: torch.Tensor | None,
        keys: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """[B, T] ids and the pictures of all rows, in row order → [B, T, D] embeddings with the pictures in place.

        `keys` is as for `image_features`. No graph is built through the vision tower where its parameters are frozen.
        """
        embeds = self.embed(input_ids)
        if pixel_values is None or grid_thw is None:
            return embeds
        return self.place_pictures(embeds, input_ids, self.prompt_features(pixel_values, grid_thw, keys))

    def prompt_features(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, keys: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        """As `image_features`, without a graph where the vision tower is frozen."""
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return self.image_features(pixel_values, grid_thw, keys)

    def place_pictures(
        self, embeds: torch.Tensor, input_ids: torch.Tensor, features: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """[B, T, D] embeddings with features [n_i, D], of all pictures in row order, where their tokens stand."""
        places = (input_ids == self.family.image_token_id).unsqueeze(-1)
        return embeds.masked_scatter(places, torch.cat(list(features)).to(embeds.dtype))

    def patches_of(
        self, input_ids: torch.Tensor, embeds: torch.Tensor, grid_thw: torch.Tensor | None
    ) -> Patches | None:
        """What a feedback that reads patches may choose from; None for one that does not.

        Args:
            input_ids: [B, T].
            embeds: [B, T, D] with pictures in place.
            grid_thw: [pictures of all rows, 3].
        """
        if not self.feedback.reads_patches:
            return None
        places = input_ids == self.family.image_token_id
        if grid_thw is not None:
            embeds = embeds.masked_scatter(places.unsqueeze(-1), self.placed(embeds[places], grid_thw))
        most = int(places.sum(dim=1).max())
        first = (~places).int().argsort(dim=1, stable=True)[:, :most]  # pictures before everything else
        there = places.gather(1, first)
        features = embeds.gather(1, first.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        return Patches(features * there.unsqueeze(-1), there)

    def placed(self, features: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """[n, D] features of whole pictures as latents have them: with `places`, they say where they lie."""
        if not self.config.places:
            return features
        grids = list(map(self.family.merged_grid, grid_thw))
        each = features.split([height * width for height, width in grids])
        return torch.cat([with_places(own, patch_boxes(grid), grid) for own, grid in zip(each, grids, strict=True)])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] last hidden states → [..., V] logits."""
        return self.model.lm_head(hidden)

    def stop_ids(self) -> set[int]:
        """Tokens that end a response: the tokenizer's end of turn and those of the generation config."""
        configured = self.model.generation_config.eos_token_id
        more = configured if isinstance(configured, list) else [configured]
        return {token for token in (self.tokenizer.eos_token_id, *more) if token is not None}

    @property
    def width(self) -> int:
        """D, the width of hidden states and input embeddings."""
        return self.model.config.get_text_config().hidden_size

    @property
    def vision_tower(self) -> nn.Module:
        return self.family.vision_tower(self.model)

    @property
    def language_model(self) -> Any:
        return self.family.language_model(self.model)

    def positions(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, grid_thw: torch.Tensor | None
    ) -> torch.Tensor:
        """[3, B, T] rotary positions of right-padded rows [B, T]."""
        return self.family.positions(self.model, input_ids, attention_mask, grid_thw)

    @property
    def device(self) -> torch.device:
        return self.model.device

    # -- decoding ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Asked | Iterable[Asked],
        config: GenerationConfig | None = None,
        *,
        engine: EngineConfig | None = None,
        **changes: Unpack[GenerationChanges],
    ) -> list[Trajectory]:
        """Decode a response to each prompt; see `mirage_vlm.decoding.generate`.

        `prompts` are trajectories, or conversations in any form of `mirage_vlm.formats.asked`: messages, chat
        dictionaries, a text, or a picture and a text. Of a single one the answer is a list with one trajectory too.
        `changes` are fields of `GenerationConfig`, for example `max_new_tokens=128, temperature=0.7, seed=1`;
        `engine` says how many rows and how much memory may be used.
        """
        from mirage_vlm.decoding.generate import GenerationConfig, checked, generate

        return generate(self, prompts, checked(config, GenerationConfig, "config").changed(changes), engine)

    def stream(
        self,
        prompt: Asked,
        config: GenerationConfig | None = None,
        *,
        engine: EngineConfig | None = None,
        **changes: Unpack[GenerationChanges],
    ) -> Iterator[Event]:
        """Decode one prompt and yield what happens as it happens; see `mirage_vlm.decoding.stream`."""
        from mirage_vlm.decoding.generate import GenerationConfig, checked, stream

        return stream(self, prompt, checked(config, GenerationConfig, "config").changed(changes), engine)

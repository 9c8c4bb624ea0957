"""What the analyses look at: decoded responses, each read again in one pass, and all that stood at its positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mirage_vlm.decoding import EngineConfig, GenerationConfig, generate
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.oracle import oracle_targets
from mirage_vlm.modeling.decoder import run_decoder
from mirage_vlm.training.rollout import Run, span_runs
from mirage_vlm.training.visibility import blind_positions, mask_of
from mirage_vlm.trajectory import Image, Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling import LatentVLM

ROLES = ("prompt text", "patches", "response text", "span marks", "latents")
PROMPT, PATCH, TEXT, MARK, LATENT = range(len(ROLES))


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture and what the vision tower makes of it: [h · w, D] features in raster order, and (h, w)."""

    image: Image
    features: torch.Tensor
    grid: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt and its decoded response, T positions in all. Tensors are float32 (or whole numbers) on the CPU.

    Attributes:
        trajectory: the decoded one.
        ids: [T] tokens, latents as `latent_pad`.
        roles: [T] what stands at each position, an index of `ROLES`.
        answer: [T] whether it is a token of the answer, what the last `\\boxed{}` holds.
        runs: where the spans are: first latent, one past the last.
        inputs: [T, D] input embeddings, with patches and latents in place.
        hidden: [T, D] hidden states after the final norm.
        positions: [3, T] rotary positions.
        pictures: of the prompt.
        helpers: for each span its helper image, those of the reference taken again from the first where it has fewer;
            empty where there are none, or where they were not asked for.
        targets: the same, pooled: [k, D] for each span, k its number of latents.
        blind: [T] positions that do not see the pictures, where these leave once a span has closed; None where all do.
    """

    trajectory: Trajectory
    ids: torch.Tensor
    roles: torch.Tensor
    answer: torch.Tensor
    runs: Sequence[Run]
    inputs: torch.Tensor
    hidden: torch.Tensor
    positions: torch.Tensor
    pictures: Sequence[Picture]
    helpers: Sequence[Picture] = ()
    targets: Sequence[torch.Tensor] = ()
    blind: torch.Tensor | None = None

    @cached_property
    def latents(self) -> torch.Tensor:
        """[n, D] the latents of the response in order, as they were consumed."""
        return self.inputs[self.roles == LATENT]


def gather(
    vlm: LatentVLM,
    prompts: Sequence[Trajectory],
    generation: GenerationConfig,
    *,
    helpers: bool = True,
    engine: EngineConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Example]:
    """Decode a response to each prompt and read those that consumed latents again, each in one pass.

    Args:
        generation: one response to each prompt.
        helpers: also take the helper images of the reference responses, where they have any.
        progress: called with the number of responses that were finished.

    Raises:
        MirageError: there are no prompts, a prompt or helper image cannot be read, or no response consumed a latent.
    """
    if not prompts:
        raise MirageError("there is nothing to analyse: no examples")
    decoded = generate(vlm, prompts, replace(generation, return_latents=True), engine, progress)
    found = [(prompt, own) for prompt, own in zip(prompts, decoded, strict=True) if any(s.k for s in own.spans)]
    if not found:
        raise MirageError(
            f"the model consumed no latent in its responses to {len(prompts)} examples: there is nothing to analyse"
        )
    taught = _taught(vlm, found) if helpers else {}
    evicted = vlm.config.evict_images if generation.evict_images is None else generation.evict_images
    return [read(vlm, own, *taught.get(i, ((), ())), evicted=evicted) for i, (_, own) in enumerate(found)]


def _taught(
    vlm: LatentVLM, found: Sequence[tuple[Trajectory, Trajectory]]
) -> dict[int, tuple[list[Picture], list[torch.Tensor]]]:
    """Helper images and targets for each span of the responses whose references have helper images."""
    images = {i: [span.helper for span in prompt.spans if span.helper] for i, (prompt, _) in enumerate(found)}
    chosen = [i for i, own in images.items() if own]
    lengths = [[len(span.latents) for span in found[i][1].spans if span.latents is not None] for i in chosen]
    targets = oracle_targets(vlm, [found[i][0] for i in chosen], lengths=lengths)
    return {
        i: (_shown(vlm, [images[i][j % len(images[i])] for j in range(len(pooled))]), pooled)
        for i, pooled in zip(chosen, targets, strict=True)
    }


@torch.no_grad()
def _shown(vlm: LatentVLM, images: Sequence[Image]) -> list[Picture]:
    found = vlm.encoder.pictures(images)
    assert found is not None
    pixels, grids = found.pixel_values.to(vlm.device), found.grid_thw.to(vlm.device)
    return _pictures(vlm, images, grids, vlm.image_features(pixels, grids))


def _pictures(
    vlm: LatentVLM, images: Sequence[Image], grids: torch.Tensor, features: Sequence[torch.Tensor]
) -> list[Picture]:
    shapes = map(vlm.family.merged_grid, grids)
    return [Picture(i, f.float().cpu(), shape) for i, f, shape in zip(images, features, shapes, strict=True)]


@torch.no_grad()
def read(
    vlm: LatentVLM,
    decoded: Trajectory,
    helpers: Sequence[Picture] = (),
    targets: Sequence[torch.Tensor] = (),
    *,
    evicted: bool = False,
) -> Example:
    """A decoded response with its latents, read again in one pass.

    Args:
        evicted: it was decoded with the pictures out of sight once a span had closed.

    Raises:
        MirageError: a picture of its prompt cannot be read.
    """
    assert decoded.decoding is not None
    config, device = vlm.config, vlm.device
    prompt, shown = vlm.encoder.prompt(decoded.prompt)
    latents = torch.cat([span.latents for span in decoded.spans if span.latents is not None])
    tokens = list(decoded.decoding.token_ids)
    ids = torch.tensor([[*prompt, *tokens]], device=device)
    pixels, grids = (None, None) if shown is None else (shown.pixel_values.to(device), shown.grid_thw.to(device))
    inputs = vlm.embed_prompt(ids, pixels, grids)
    inputs = inputs.masked_scatter((ids == config.pad_id).unsqueeze(-1), latents.to(inputs))
    positions = vlm.positions(ids, torch.ones_like(ids), grids)
    blind = blind_positions(vlm, ids, "evict" if evicted else "full")
    hidden = language_pass(vlm, inputs, positions, unseen(ids == vlm.family.image_token_id, blind)).last_hidden_state
    roles = torch.full_like(ids[0], TEXT)
    roles[: len(prompt)] = PROMPT
    marks = {vlm.family.image_token_id: PATCH, config.start_id: MARK, config.end_id: MARK, config.pad_id: LATENT}
    for token, role in marks.items():
        roles[ids[0] == token] = role
    pictures: list[Picture] = []
    if grids is not None:
        sizes = [h * w for h, w in map(vlm.family.merged_grid, grids)]
        pictures = _pictures(vlm, list(decoded.images()), grids, inputs[0, roles == PATCH].split(sizes))
    said = [token in marks for token in tokens]
    return Example(
        trajectory=decoded,
        ids=ids[0].cpu(),
        roles=roles.cpu(),
        answer=torch.tensor([False] * len(prompt) + answer_tokens(vlm.tokenizer, tokens, said)),
        runs=span_runs(ids, config.pad_id)[0],
        inputs=inputs[0].float().cpu(),
        hidden=hidden[0].float().cpu(),
        positions=positions[:, 0].cpu(),
        pictures=pictures,
        helpers=helpers,
        targets=targets,
        blind=None if blind is None else blind[0].cpu(),
    )


@torch.no_grad()
def language_pass(
    vlm: LatentVLM,
    inputs: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    weights: bool = False,
) -> Any:
    """One pass of the language model over [1, T, D] inputs at [3, 1, T] positions.

    Args:
        mask: of `unseen`; None where everything before a position is seen.
        weights: return the attention weights too, `attentions`, [1, H, T, T] of each layer. Only transformers' own
            `eager` attention has them, so the model attends by it meanwhile.
    """
    config = vlm.language_model.config
    usual = config._attn_implementation
    if weights:
        config._attn_implementation = "eager"
    try:
        seen = None if mask is None else mask.to(inputs)
        return run_decoder(vlm.language_model, inputs, positions, seen, output_attentions=weights)
    finally:
        config._attn_implementation = usual


def unseen(pictures: torch.Tensor, blind: torch.Tensor | None) -> torch.Tensor | None:
    """[1, T] patches of pictures and [1, T] positions blind to them → [1, 1, T, T], added to attention scores."""
    if blind is None:
        return None
    places = torch.arange(pictures.shape[1], device=pictures.device)[None]
    return mask_of(places, places, blind, pictures, torch.float32)


def answer_tokens(tokenizer: Any, tokens: Sequence[int], silent: Sequence[bool]) -> list[bool]:
    r"""Which tokens of a response hold something of what its last `\boxed{...}` holds; none where there is no such.

    Args:
        tokens: of the response.
        silent: those that are no text.
    """
    ends: list[int] = []
    heard: list[int] = []
    for token, mute in zip(tokens, silent, strict=True):
        heard += [] if mute else [token]
        ends.append(len(tokenizer.decode(heard, skip_special_tokens=True)))
    text = tokenizer.decode(heard, skip_special_tokens=True)
    at = text.rfind(r"\boxed{")
    if at < 0:
        return [False] * len(tokens)
    first = last = at + len(r"\boxed{")
    depth = 1
    while last < len(text):
        depth += (text[last] == "{") - (text[last] == "}")
        if depth == 0:
            break
        last += 1
    begins = [0, *ends[:-1]]
    return [begin < min(end, last) and end > first for begin, end in zip(begins, ends, strict=True)]


def block(examples: Sequence[Example]) -> tuple[torch.Tensor, list[int]]:
    """Latents of several responses in one tensor: of each that has so many the first K, in order.

    K is what keeps the most latents: where all responses have the same number, that number.

    Returns:
        [N, K, D], and the indices of the N examples.
    """
    counts = [len(example.latents) for example in examples]
    k = max(set(counts), key=lambda size: (size * sum(count >= size for count in counts), size))
    chosen = [i for i, count in enumerate(counts) if count >= k]
    return torch.stack([examples[i].latents[:k] for i in chosen]), chosen

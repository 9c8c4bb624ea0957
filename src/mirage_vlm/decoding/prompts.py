"""Prompts: encoded once, read once, and shared by all responses to them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mirage_vlm.decoding.blocks import Prefill, run_paged
from mirage_vlm.decoding.pool import NOBODY, BlockPool
from mirage_vlm.modeling.encoding import Pictures
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM


@dataclass(eq=False)
class Prompt:
    """One prompt and where its keys and values are.

    Attributes:
        source: the trajectory whose prompt it is.
        ids: its tokens, as far as they are in the cache.
        pictures: its processed pictures, dropped once they have been read.
        waiting: responses to it that have no row yet.
        rows: responses that read it now.
        blocks: its cache blocks, in order; empty before it is read.
        hidden: [D] the newest hidden state.
        position: rotary position of the response's first token.
        blind: its pictures have left the cache.
        patches: [n, D] the features of its pictures, for a feedback that reads them.
    """

    source: Trajectory
    ids: list[int]
    pictures: Pictures | None
    waiting: int = 1
    rows: int = 0
    blocks: list[int] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    position: int = 0
    blind: bool = False
    patches: torch.Tensor | None = None

    def drop_pictures(self, pool: BlockPool, image_token: int) -> int:
        """Take the pictures out of the cache; returns how many blocks that freed."""
        kept = [place for place, token in enumerate(self.ids) if token != image_token]
        before = len(self.blocks)
        self.blocks = pool.drop_positions(self.blocks, torch.tensor(kept, device=pool.device))
        self.ids = [self.ids[place] for place in kept]
        self.blind = True
        return before - len(self.blocks)


class Reader:
    """Reads prompts into the cache: pictures of many in one vision pass, text in passes of similar lengths.

    Args:
        most_tokens: positions of one pass over prompts, padding included, and picture tokens of one over pictures.
        most_features: picture features, one for each picture token, kept for prompts to come.
    """

    def __init__(self, vlm: LatentVLM, pool: BlockPool, most_tokens: int, most_features: int):
        self.vlm, self.pool = vlm, pool
        self.most_tokens, self.most_features = most_tokens, most_features
        self.known: OrderedDict[str, torch.Tensor] = OrderedDict()  # picture -> features [n, D]

    def read(self, prompts: Sequence[Prompt]) -> None:
        """Give each prompt its blocks, its newest hidden state and the position of what follows."""
        features = self._features(prompts)
        ordered = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        batch: list[int] = []
        for i in ordered:
            width = len(prompts[i].ids)
            short = batch and width > 1.25 * len(prompts[batch[0]].ids) + 16
            if batch and (short or width * (len(batch) + 1) > self.most_tokens):
                self._pass([prompts[j] for j in batch], [features[j] for j in batch])
                batch = []
            batch.append(i)
        if batch:
            self._pass([prompts[j] for j in batch], [features[j] for j in batch])
        while sum(map(len, self.known.values())) > self.most_features:
            self.known.popitem(last=False)

    def kept(self, prompt: Prompt) -> int:
        """After a failure: how many blocks a prompt keeps, all of them if it was read before that, else none."""
        if prompt.hidden is None:
            self.pool.give_back(prompt.blocks)
            prompt.blocks = []
        return len(prompt.blocks)

    def _pass(self, prompts: Sequence[Prompt], features: Sequence[list[torch.Tensor]]) -> None:
        """One forward pass over right-padded prompts."""
        vlm, pool, device = self.vlm, self.pool, self.vlm.device
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        width = int(lengths.max())
        ids = torch.full((len(prompts), width), vlm.tokenizer.pad_token_id)
        grids = [prompt.pictures.grid_thw for prompt in prompts if prompt.pictures is not None]
        across = pool.blocks_for(width)
        blocks = torch.full((len(prompts), across), NOBODY)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
            prompt.blocks = pool.take(pool.blocks_for(len(prompt.ids)))
            blocks[row, : len(prompt.blocks)] = torch.tensor(prompt.blocks)
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long().to(device)
        ids, blocks = ids.to(device), blocks.flatten().to(device)
        pictures = ids == vlm.family.image_token_id
        padded = torch.nn.functional.pad(pictures, (0, across * pool.size - width))
        pool.images[blocks] = padded.view(-1, pool.size)
        grid = torch.cat(grids).to(device) if grids else None
        positions = vlm.positions(ids, mask, grid)  # [3, P, T]
        embeds = vlm.embed(ids)
        found = [feature for each in features for feature in each]
        if found:
            embeds = vlm.place_pictures(embeds, ids, found)
        hidden = run_paged(vlm, embeds, positions, Prefill(pool, blocks))
        newest = hidden[torch.arange(len(prompts)), lengths - 1]
        following = (positions.amax(dim=0).masked_fill(mask == 0, 0).amax(dim=1) + 1).tolist()
        for prompt, state, position, own in zip(prompts, newest, following, features, strict=True):
            if vlm.feedback.reads_patches and prompt.pictures is not None:
                prompt.patches = vlm.placed(torch.cat(own).to(embeds), prompt.pictures.grid_thw)
            prompt.hidden, prompt.position, prompt.pictures = state, position, None

    def _features(self, prompts: Sequence[Prompt]) -> list[list[torch.Tensor]]:
        """Features of each prompt's pictures; those that are not known go through the tower together."""
        names: list[tuple[str, ...]] = []
        fresh: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for pictures in (prompt.pictures for prompt in prompts):
            names.append(() if pictures is None else pictures.keys)
            if pictures is not None:
                pixels = pictures.pixel_values.split(pictures.grid_thw.prod(dim=1).tolist())
                each = zip(names[-1], zip(pixels, pictures.grid_thw, strict=True), strict=True)
                fresh |= {name: picture for name, picture in each if name not in self.known}
        for some in self._passes(fresh):
            pixels, grids = zip(*(fresh[name] for name in some), strict=True)
            device = self.vlm.device
            made = self.vlm.image_features(torch.cat(pixels).to(device), torch.stack(grids).to(device), some)
            self.known.update(zip(some, made, strict=True))
        for name in (name for prompt in names for name in prompt):
            self.known.move_to_end(name)
        return [[self.known[name] for name in prompt] for prompt in names]

    def _passes(self, fresh: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[list[str]]:
        """Names of pictures for one vision pass each: as many as there is room for, and at least one."""
        batch: list[str] = []
        tokens = 0
        for name, (_, grid) in fresh.items():
            height, width = self.vlm.family.merged_grid(grid)
            if batch and tokens + height * width > self.most_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(name)
            tokens += height * width
        if batch:
            yield batch

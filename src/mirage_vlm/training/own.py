"""Stage 2's forward pass: a batch rolled out with the model's own latents, one by one or all of a span at once.

A row is cut where an input depends on a hidden state that is not there yet. What lies between two cuts is one
`Stretch`, and the stretches of all rows run side by side, one pass of the decoder each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from mirage_vlm.modeling.decoder import run_decoder
from mirage_vlm.modeling.segment_cache import SegmentCache, checkpoint_with_cache
from mirage_vlm.training.rollout import Batch, Run, embeddings, span_runs
from mirage_vlm.training.visibility import blind_positions, mask_of

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM

NOTHING = (0, 0)


@dataclass(frozen=True)
class Stretch:
    """What is read together.

    Attributes:
        runs: [B] the positions of each row; an empty run leaves the row as it is.
        latents: so many positions at the front of a run are latents, of the row that has most of them.
    """

    runs: list[Run]
    latents: int

    @property
    def width(self) -> int:
        return max(end - start for start, end in self.runs)


def stretches(spans: Sequence[Sequence[Run]], lengths: Sequence[int], parallel: bool = False) -> list[Stretch]:
    """Cut rows into stretches: the text before the first spans, then span by span.

    The last latent of a span, which nothing in the span waits for, is read with the text that follows. Where spans
    are read latent by latent, rows with a shorter one wait, so that the texts after them stand side by side.

    Args:
        spans: the latent positions of each row, as `span_runs` gives them.
        lengths: tokens of each row.
        parallel: cut before every span, not before every latent.
    """
    first = [row[0][0] if row else length for row, length in zip(spans, lengths, strict=True)]
    cut = [Stretch([(0, end) for end in first], 0)]
    for s in range(max(len(row) for row in spans)):
        group = [row[s] if s < len(row) else NOTHING for row in spans]
        stops = [row[s + 1][0] if s + 1 < len(row) else length for row, length in zip(spans, lengths, strict=True)]
        longest = max(end - start for start, end in group)
        for left in range(1 if parallel else longest, 1, -1):  # latents to come, of the longest span
            cut.append(Stretch([(e - left, e - left + 1) if e - b >= left else NOTHING for b, e in group], 1))
        heads = [start if parallel else end - 1 for start, end in group]
        runs = [(h, stop) if e > b else NOTHING for (b, e), h, stop in zip(group, heads, stops, strict=True)]
        cut.append(Stretch(runs, longest if parallel else 1))
    return cut


def passes(input_ids: torch.Tensor, pad_id: int, iterations: int = 0) -> int:
    """How many passes through the decoder `forward_own` takes for [B, T] ids."""
    cut = stretches(span_runs(input_ids, pad_id), [input_ids.shape[1]] * len(input_ids), iterations > 0)
    return sum(max(1, min(iterations, stretch.latents)) for stretch in cut if stretch.width)


def forward_own(
    vlm: LatentVLM,
    batch: Batch,
    iterations: int = 0,
    *,
    visibility: str = "full",
    given: tuple[torch.Tensor, torch.Tensor] | None = None,
    embeds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Roll the batch out with the model's own latents, the gradient flowing through each of them.

    Shorter rows of a stretch are padded and the pads masked; every row keeps its own positions.

    Args:
        iterations: 0 computes the latents one after the other. n > 0 computes all latents of a span at once, n times
            (Jacobi iterations): the first time latents beyond the first are the embedding of `latent_pad`, and each
            further time latent j + 1 is the recast of the state at latent j of the time before. Equal to 0 in spans
            of at most n latents.
        visibility: who may look at pictures; see `mirage_vlm.training.visibility`.
        given: latents that are not the model's own: [latent positions of the batch, D] vectors in row order, and
            [latent positions] which of them are taken.
        embeds: `embeddings` of the batch, where they are known already.

    Returns:
        hidden: [B, T, D] hidden states after the final norm, at the positions of `batch.input_ids`; zeros in padding.
        latents: [latent positions of the batch, D] the latents that were consumed (those of the last pass), in row
            order.
    """
    spans = span_runs(batch.input_ids, vlm.config.pad_id)
    cut = stretches(spans, batch.attention_mask.sum(dim=1).tolist(), iterations > 0)
    embeds = embeddings(vlm, batch) if embeds is None else embeds
    roll = _Roll(vlm, batch, embeds, cut, spans, visibility, given)
    with checkpoint_with_cache(vlm.language_model):
        for i in range(len(cut)):
            roll.read(i, iterations)
    return roll.hidden(), roll.latents()


class _Roll:
    """State of one rollout: the cache, the newest hidden state of each row, and what was computed.

    All stretches side by side are W columns; where each column stands in its row is worked out before anything is
    computed, so that the device never waits for it.
    """

    def __init__(
        self,
        vlm: LatentVLM,
        batch: Batch,
        embeds: torch.Tensor,
        cut: list[Stretch],
        spans: list[list[Run]],
        visibility: str,
        given: tuple[torch.Tensor, torch.Tensor] | None,
    ):
        self.vlm, self.cut = vlm, cut
        ids, device = batch.input_ids, batch.input_ids.device
        self.offsets = [0, *accumulate(stretch.width for stretch in cut)]
        self.fed = fed = [0, *accumulate(stretch.latents for stretch in cut)]
        columns = torch.full((len(ids), self.offsets[-1]), -1)  # [B, W] the position at each column; −1 = padding
        slots = torch.full(ids.shape, -1)  # [B, T] the column of each position; −1 = padding
        sources = torch.full(ids.shape, -1)  # [B, T] the same among the columns of latents only
        for i, stretch in enumerate(cut):
            for row, (start, end) in enumerate(stretch.runs):
                place = torch.arange(end - start)
                columns[row, self.offsets[i] : self.offsets[i] + len(place)] = start + place
                slots[row, start:end] = self.offsets[i] + place
                sources[row, start:end] = row * fed[-1] + fed[i] + place
        wanted = [sources[row, start:end] for row, runs in enumerate(spans) for start, end in runs]
        self.sources = torch.cat(wanted or [sources.new_zeros(0)]).to(device)  # [latent positions]
        self.last = torch.tensor([[end - start - 1 for start, end in stretch.runs] for stretch in cut]).to(device)
        self.slots, columns = slots.to(device), columns.to(device)
        self.columns, self.mask = columns, (columns >= 0).long()  # [B, W]
        at = columns.clamp(min=0)
        blind = blind_positions(vlm, ids, visibility)
        self.blind = None if blind is None else blind.gather(1, at)  # [B, W]
        self.ids = ids.gather(1, at)  # [B, W]
        positions = vlm.positions(ids, batch.attention_mask, batch.grid_thw)
        self.positions = positions.gather(2, at.expand(len(positions), -1, -1))  # [3, B, W]
        self.texts = _take(embeds, at).split([stretch.width for stretch in cut], dim=1)  # [B, width, D] each
        self.recast = vlm.recast
        if (patches := vlm.patches_of(ids, embeds, batch.grid_thw)) is not None:
            self.recast = partial(vlm.recast, patches=patches)
        self.newest = embeds.new_zeros(len(embeds), embeds.shape[-1])  # [B, D]
        self.given: tuple[torch.Tensor, torch.Tensor] | None = None
        if given is not None:  # [B, latent columns, D] and [B, latent columns]
            rows, wide = len(ids), fed[-1]
            vectors = embeds.new_zeros(rows * wide, embeds.shape[-1]).index_copy(0, self.sources, given[0].to(embeds))
            taken = torch.zeros(rows * wide, dtype=torch.bool, device=device).index_copy(0, self.sources, given[1])
            self.given = vectors.view(rows, wide, -1), taken.view(rows, wide)
        self.cache = SegmentCache.empty(len(vlm.language_model.layers), self.offsets[-1])
        self.states: list[torch.Tensor] = []  # [B, width, D] of each stretch
        self.consumed: list[torch.Tensor] = []  # [B, latents, D] of each stretch

    def read(self, i: int, iterations: int) -> None:
        """Read stretch i."""
        stretch, inputs, offset = self.cut[i], self.texts[i], self.offsets[i]
        if stretch.width == 0:
            return
        if latents := stretch.latents:
            ids = self.ids[:, offset : offset + latents]
            first = self._taken(i, self.recast(ids[:, 0], self.newest).unsqueeze(1))
            inputs = torch.cat([first, inputs[:, 1:]], dim=1)
            if latents > 1:  # where a target is given, it stands there from the first pass on
                known = self._taken(i, inputs[:, 1:latents], skip=1)
                inputs = torch.cat([inputs[:, :1], known, inputs[:, latents:]], dim=1)
            waiting = (ids[:, 1:] == self.vlm.config.pad_id).unsqueeze(-1)
            for _ in range(min(iterations, latents) - 1):
                hidden = self._advance(offset, inputs[:, : latents - 1], keep=False)
                own = self._taken(i, self.recast(ids[:, 1:], hidden), skip=1)
                better = torch.where(waiting, own, inputs[:, 1:latents])
                inputs = torch.cat([inputs[:, :1], better, inputs[:, latents:]], dim=1)
            self.consumed.append(inputs[:, :latents])
        hidden = self._advance(offset, inputs, keep=True)
        self.states.append(hidden)
        if i + 1 < len(self.cut):
            last = self.last[i].unsqueeze(1)
            self.newest = torch.where(last >= 0, _take(hidden, last.clamp(min=0)).squeeze(1), self.newest)

    def _taken(self, i: int, own: torch.Tensor, skip: int = 0) -> torch.Tensor:
        """[B, n, D] latents of stretch i from number `skip` on, with given ones where those are taken."""
        if self.given is None:
            return own
        place = slice(self.fed[i] + skip, self.fed[i] + skip + own.shape[1])
        vectors, taken = self.given
        return torch.where(taken[:, place].unsqueeze(-1), vectors[:, place], own)

    def _seen(self, offset: int, end: int) -> torch.Tensor:
        """What the columns from `offset` to `end` may attend to, as the language model is told it."""
        if self.blind is None:
            return self.mask[:, :end]
        pictures = self.ids[:, :end] == self.vlm.family.image_token_id
        queries, keys = self.columns[:, offset:end], self.columns[:, :end]
        return mask_of(queries, keys, self.blind[:, offset:end], pictures, self.newest.dtype)

    def hidden(self) -> torch.Tensor:
        """[B, T, D] what was computed, in the order of the rows."""
        found = _take(torch.cat(self.states, dim=1), self.slots.clamp(min=0))
        return found.masked_fill((self.slots < 0).unsqueeze(-1), 0)

    def latents(self) -> torch.Tensor:
        """[latent positions, D] what was fed in, in row order."""
        if not self.consumed:
            return self.newest.new_zeros(0, self.newest.shape[-1])
        return torch.cat(self.consumed, dim=1).flatten(0, 1).index_select(0, self.sources)

    def _advance(self, offset: int, inputs: torch.Tensor, keep: bool) -> torch.Tensor:
        """Run the decoder over [B, L, D] inputs at the columns from `offset` on; `keep` what they add to the cache."""
        end = offset + inputs.shape[1]
        cache = self.cache if keep else self.cache.draft()
        positions, seen = self.positions[:, :, offset:end], self._seen(offset, end)
        hidden = run_decoder(self.vlm.language_model, inputs, positions, seen, cache).last_hidden_state
        if keep:
            self.cache = cache.next()
        return hidden


def _take(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """[B, L, D] values at the places [B, N] of their rows → [B, N, D]."""
    return values.gather(1, at.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

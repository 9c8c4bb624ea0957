"""Forward passes over whole trajectories: with given latents in one pass, or with the model's own, rolled out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mirage_vlm.modeling.segment_cache import SegmentCache, checkpoint_with_cache
from mirage_vlm.training.packing import packed_attention

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM


@dataclass(frozen=True)
class Batch:
    """Right-padded rows of one forward pass, all on the model's device.

    Attributes:
        input_ids: [B, T], latent positions hold `latent_pad`.
        attention_mask: [B, T], 1 where there is a token.
        labels: [B, T], −100 = no loss.
        pixel_values, grid_thw: the prompt's pictures of all rows, in row order; None where there are none.
        helper_pixel_values, helper_grid_thw: the helper images of all spans, in row order.
        segments: [B, T], 1, 2, … in a packed row's first, second, … example, 0 in padding; None where each row is one
            example.
        picture_keys, helper_keys: names of the pictures and helper images by content, for a feature store; None where
            the collator did not make them.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None = None
    grid_thw: torch.Tensor | None = None
    helper_pixel_values: torch.Tensor | None = None
    helper_grid_thw: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    picture_keys: tuple[str, ...] | None = None
    helper_keys: tuple[str, ...] | None = None


Run = tuple[int, int]  # first position, one past the last


def span_runs(input_ids: torch.Tensor, pad_id: int) -> list[list[Run]]:
    """Where the latent spans of each row are: runs of `latent_pad`, [B] lists in order."""
    is_pad = torch.nn.functional.pad((input_ids == pad_id).int(), (1, 1))
    edges = is_pad.diff(dim=1).cpu()
    runs: list[list[Run]] = []
    for row in edges:
        starts, ends = (row == 1).nonzero().flatten().tolist(), (row == -1).nonzero().flatten().tolist()
        runs.append(list(zip(starts, ends, strict=True)))
    return runs


def forward_given(vlm: LatentVLM, batch: Batch, latents: torch.Tensor | None) -> torch.Tensor:
    """One pass with given latents (teacher forcing).

    Args:
        latents: [latent positions of the batch, D] input embeddings for them, in row order.

    Returns:
        [B, T, D] hidden states after the final norm.
    """
    embeds = vlm.embed_prompt(batch.input_ids, batch.pixel_values, batch.grid_thw, batch.picture_keys)
    if latents is not None:
        places = (batch.input_ids == vlm.config.pad_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(places, latents.to(embeds.dtype))
    if batch.segments is not None:
        told = packed_attention(vlm, batch.input_ids, batch.segments, batch.grid_thw)
    else:
        positions = vlm.positions(batch.input_ids, batch.attention_mask, batch.grid_thw)
        told = {"attention_mask": batch.attention_mask, "position_ids": positions}
    return vlm.language_model(inputs_embeds=embeds, use_cache=False, **told).last_hidden_state


def forward_own(vlm: LatentVLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Roll the batch out with the model's own latents, the gradient flowing through each of them.

    Rows are aligned segment by segment: all rows' text before their first span in one pass, then the latent steps
    of their first spans one by one, then the text before the second spans, and so on. Within a segment shorter
    rows are padded and the pads masked; every row keeps its own positions.

    Returns:
        hidden: [B, T, D] hidden states after the final norm, at the positions of `batch.input_ids`.
        latents: [latent positions of the batch, D] the latents that were consumed, in row order.
    """
    roll = _Roll(vlm, batch)
    runs = span_runs(batch.input_ids, vlm.config.pad_id)
    lengths = batch.attention_mask.sum(dim=1).tolist()
    # text segment s of a row lies between its spans s−1 and s
    bounds = [[0, *(edge for run in row for edge in run), length] for row, length in zip(runs, lengths, strict=True)]
    with checkpoint_with_cache(vlm.language_model):
        for s in range(1 + max(len(row) for row in runs)):
            text = [(b[2 * s], b[2 * s + 1]) if 2 * s + 1 < len(b) else (0, 0) for b in bounds]
            roll.read(text)
            span = [row[s] if s < len(row) else (0, 0) for row in runs]
            for step in range(max(end - start for start, end in span)):
                roll.think([start + step if start + step < end else None for start, end in span])
    return roll.collect()


class _Roll:
    """State of one rollout: the cache, its mask, the newest hidden state of each row, and what was computed."""

    def __init__(self, vlm: LatentVLM, batch: Batch):
        self.vlm = vlm
        self.input_ids = batch.input_ids
        self.embeds = vlm.embed_prompt(batch.input_ids, batch.pixel_values, batch.grid_thw, batch.picture_keys)
        self.positions = vlm.positions(batch.input_ids, batch.attention_mask, batch.grid_thw)  # [3, B, T]
        self.rows = batch.input_ids.shape[0]
        self.device = batch.input_ids.device
        self.mask = torch.zeros(self.rows, 0, dtype=torch.long, device=self.device)  # [B, cache]
        self.cache = SegmentCache(len(vlm.language_model.layers))
        self.newest = self.embeds.new_zeros(self.rows, self.embeds.shape[-1])  # [B, D]
        self.pieces: list[torch.Tensor] = []  # hidden states, [B, L, D] each
        self.columns: list[torch.Tensor] = []  # position in the row of each column, [B, L]; −1 = padding
        self.inputs: list[torch.Tensor] = []  # latents consumed, [B, D] each
        self.input_columns: list[torch.Tensor] = []  # their positions, [B] each; −1 = none

    def read(self, runs: list[Run]) -> None:
        """Consume a text segment of each row; an empty run leaves the row as it is."""
        width = max(end - start for start, end in runs)
        if width == 0:
            return
        starts = torch.tensor([start for start, _ in runs], device=self.device).unsqueeze(1)
        sizes = torch.tensor([end - start for start, end in runs], device=self.device).unsqueeze(1)
        offsets = torch.arange(width, device=self.device).unsqueeze(0)
        columns = torch.where(offsets < sizes, starts + offsets, -1)  # [B, width]
        at = columns.clamp(min=0)
        inputs = self.embeds.gather(1, at.unsqueeze(-1).expand(-1, -1, self.embeds.shape[-1]))
        hidden = self._advance(inputs, columns)
        last = hidden.gather(1, (sizes - 1).clamp(min=0).unsqueeze(-1).expand(-1, 1, hidden.shape[-1])).squeeze(1)
        self.newest = torch.where(sizes > 0, last, self.newest)

    def think(self, places: list[int | None]) -> None:
        """One latent step of the rows that have a position for it."""
        columns = torch.tensor([-1 if place is None else place for place in places], device=self.device)
        ids = self.input_ids.gather(1, columns.clamp(min=0).unsqueeze(1)).squeeze(1)
        inputs = self.vlm.recast(ids, self.newest)
        hidden = self._advance(inputs.unsqueeze(1), columns.unsqueeze(1))
        self.newest = torch.where((columns >= 0).unsqueeze(-1), hidden.squeeze(1), self.newest)
        self.inputs.append(inputs)
        self.input_columns.append(columns)

    def _advance(self, inputs: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Run the decoder over [B, L, D] inputs that stand at `columns` of their rows."""
        self.mask = torch.cat([self.mask, (columns >= 0).long()], dim=1)
        hidden = self.vlm.language_model(
            inputs_embeds=inputs,
            attention_mask=self.mask,
            position_ids=self.positions.gather(2, columns.clamp(min=0).expand(3, -1, -1)),
            past_key_values=self.cache,
            use_cache=False,  # else transformers warns that it leaves the cache out, which we put back in
        ).last_hidden_state
        self.cache = self.cache.next()
        self.pieces.append(hidden)
        self.columns.append(columns)
        return hidden

    def collect(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring what was computed back into the order of the rows."""
        hidden = _to_rows(torch.cat(self.pieces, dim=1), torch.cat(self.columns, dim=1), self.input_ids.shape[1])
        if not self.inputs:
            return hidden, hidden.new_zeros(0, hidden.shape[-1])
        columns = torch.stack(self.input_columns, dim=1)
        latents = _to_rows(torch.stack(self.inputs, dim=1), columns, self.input_ids.shape[1])
        return hidden, latents[self.input_ids == self.vlm.config.pad_id]


def _to_rows(values: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """[B, L, D] values that belong at `columns` [B, L] (−1 = nowhere) → [B, width, D], zeros elsewhere."""
    rows = torch.arange(values.shape[0], device=values.device).unsqueeze(1).expand_as(columns)
    there = columns >= 0
    return values.new_zeros(values.shape[0], width, values.shape[-1]).index_put(
        (rows[there], columns[there]), values[there]
    )

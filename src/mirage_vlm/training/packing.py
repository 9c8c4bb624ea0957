"""Sequence packing: which examples share a row, and how a row keeps them apart.

A packed row holds several examples end to end. Each keeps the positions it has alone, and attends to itself only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM


def arrange(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which examples share a row: few rows of at most `width` tokens, then as narrow as so many rows can be.

    First-fit decreasing. Where an example alone is longer than `width`, its row has its length, and so have the
    others: they would be padded to it anyway.

    Returns:
        The examples' numbers, row by row; both the rows and what is in them keep the order they came in.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def fill(limit: int) -> list[list[int]]:
        rows: list[list[int]] = []
        room: list[int] = []
        for i in longest_first:
            row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
            if row is None:
                rows.append([i])
                room.append(limit - lengths[i])
            else:
                rows[row].append(i)
                room[row] -= lengths[i]
        return rows

    high = max(width, *lengths)
    best = fill(high)
    low = max(max(lengths), -(-sum(lengths) // len(best)))
    while low < high:  # the narrowest of the rows' widths, up to first-fit's whims
        middle = (low + high) // 2
        rows = fill(middle)
        if len(rows) == len(best):
            best, high = rows, middle
        else:
            low = middle + 1
    return sorted(sorted(row) for row in best)


def packed_attention(
    vlm: LatentVLM, input_ids: torch.Tensor, segments: torch.Tensor, grid_thw: torch.Tensor | None
) -> dict[str, Any]:
    """What the language model is told, so that the examples of a row do not feel one another.

    transformers derives a block-diagonal causal mask from the text positions, which restart at 0 with each example;
    flash attention takes the examples' bounds instead, for it would look at text positions in a single row only.

    Args:
        input_ids: [B, T].
        segments: [B, T], 1, 2, … in the tokens of a row's first, second, … example, 0 in the padding at its end.
        grid_thw: [pictures, 3], in the order of their tokens.

    Returns:
        `position_ids` [4, B, T], text positions first, no `attention_mask`, and the bounds where they are needed.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    column = index - torch.where(begins, index, 0).cummax(dim=1).values  # [B, T] place in the own example or padding
    there = segments > 0
    example = ((begins & there).flatten().cumsum(dim=0) - 1).view_as(segments)[there]  # [tokens]
    at = column[there]
    shape = (int(example.max()) + 1, int(at.max()) + 1)
    alone = input_ids.new_zeros(shape).index_put((example, at), input_ids[there])  # one example a row
    mask = torch.zeros_like(alone).index_put((example, at), torch.ones_like(at))
    positions = column.repeat(4, 1, 1)
    positions[1:, there] = vlm.positions(alone, mask, grid_thw)[:, example, at]
    told: dict[str, Any] = {"attention_mask": None, "position_ids": positions}
    if "flash" in vlm.language_model.config._attn_implementation:
        bounds = F.pad((column.flatten() == 0).nonzero().flatten(), (0, 1), value=column.numel()).int()
        longest = int(column.max()) + 1
        told |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return told

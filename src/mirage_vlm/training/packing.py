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

WIDTHS = 32  # how many widths are tried
SLACK = 1.02  # tokens, padding included, over the fewest possible, that narrower rows may cost


def arrange(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which examples share a row, so that rows of at most `width` tokens hold little padding.

    First-fit decreasing at several widths. Of those with the least padding, up to `SLACK`, the narrowest is taken: a
    dense attention mask costs the square of the width. An example that alone is longer than `width` has a row of its
    length, and so have the others then: they would be padded to it anyway.

    Returns:
        The examples' numbers, row by row; both the rows and what is in them keep the order they came in.
    """
    shortest, widest = max(lengths), max(width, *lengths)
    found = {}
    for step in range(WIDTHS):
        rows = _first_fit(lengths, shortest + (widest - shortest) * step // (WIDTHS - 1))
        found[max(sum(lengths[i] for i in row) for row in rows)] = rows
    tokens = {wide: wide * len(rows) for wide, rows in found.items()}
    best = min(wide for wide in found if tokens[wide] <= SLACK * min(tokens.values()))
    return sorted(sorted(row) for row in found[best])


def _first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """The longest example first, each into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


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

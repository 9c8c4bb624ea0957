"""Attention of vision towers, all windows of a length in one product.

A tower attends within pictures, and Qwen2.5-VL's within small windows in most layers. transformers hands the whole
sequence and its borders to kernels of the flash-attention package alone; for all others it goes from window to window,
some fifteen small products a picture and layer, most of whose time is spent on starting them. Here windows of one
length stand side by side. Nothing of transformers is changed: this is an attention implementation chosen by name, and
the name says "flash" because that is how the borders are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

WINDOWS = "mirage_windows_as_flash"
PLAIN = "mirage_plain_windows_as_flash"
OURS = {"eager": PLAIN, "sdpa": WINDOWS}


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[1, H, T, d] each, windows [0, c1, c2, …, T] → [1, T, H, d]."""
    plain = module.config._attn_implementation == PLAIN
    parts = [t[0].transpose(0, 1) for t in (query, key, value)]  # [T, H, d]
    windows = _windows(cu_seq_lens_q)
    if len(windows) == 1 and windows[0][1] is None:
        return _together(parts, windows[0][0], scaling, plain).unsqueeze(0), None
    found = torch.zeros_like(parts[0])
    for length, places in windows:
        assert places is not None
        found = found.index_copy(0, places, _together([t[places] for t in parts], length, scaling, plain))
    return found.unsqueeze(0), None


def _together(parts: Sequence[torch.Tensor], length: int, scaling: float, plain: bool) -> torch.Tensor:
    """Queries, keys and values [n · length, H, d] of n windows, one after the other → the same shape."""
    query, key, value = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in parts)  # [n, H, length, d]
    if plain:
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling
        found = torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), value)
    else:
        found = F.scaled_dot_product_attention(query, key, value, scale=scaling)
    return found.transpose(1, 2).flatten(0, 1)


def _windows(borders: torch.Tensor) -> list[tuple[int, torch.Tensor | None]]:
    """Each length of windows and the positions of all of that length, None where there is one length.

    Kept with the tensor, which is the same for many layers: to look at it, the device has to be waited for.
    """
    known = getattr(borders, "_mirage_windows", None)
    if known is None:
        at = borders.tolist()
        starts: dict[int, list[int]] = {}
        for begin, end in pairwise(at):
            if end > begin:
                starts.setdefault(end - begin, []).append(begin)
        if len(starts) == 1:
            known = [(next(iter(starts)), None)]
        else:
            known = []
            for length, begins in starts.items():
                places = torch.tensor(begins)[:, None] + torch.arange(length)
                known.append((length, places.flatten().to(borders.device)))
        borders._mirage_windows = known  # type: ignore[attr-defined]
    return known


for _name in (WINDOWS, PLAIN):
    AttentionInterface.register(_name, _attend)


@contextmanager
def side_by_side(config: Any) -> Iterator[None]:
    """Within, a vision tower with this config attends so, unless flash-attention was chosen for it."""
    config._attn_implementation = OURS.get(config._attn_implementation, config._attn_implementation)
    try:
        yield
    finally:  # by name, so that threads that leave in any order leave it as it was
        theirs = {ours: usual for usual, ours in OURS.items()}
        config._attn_implementation = theirs.get(config._attn_implementation, config._attn_implementation)

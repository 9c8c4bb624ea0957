"""A key-value cache that keeps the graph and bears gradient checkpointing.

Stage 2 runs a row in pieces (text, latent steps, text) and the gradient flows from one piece into the keys and
values of those before it. transformers' own cache is grown in place, so it drops the cache when a layer is
checkpointed: the recomputation would grow it twice. Here each piece has a cache object of its own that only
reads the past; what the piece adds is handed to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer


class _SegmentLayer(DynamicLayer):
    """Keys and values of one layer up to this segment; `update` may run again and gives the same."""

    def __init__(self, past: tuple[torch.Tensor, torch.Tensor] | None):
        super().__init__()
        self.past = past
        self.grown: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.past is not None:
            key_states = torch.cat([self.past[0], key_states], dim=-2)
            value_states = torch.cat([self.past[1], value_states], dim=-2)
        if self.grown is None:  # not in a recomputation
            self.grown = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0 if self.past is None else self.past[0].shape[-2]


class SegmentCache(Cache):
    """Cache for one segment; `next()` is the cache for the segment after it."""

    def __init__(self, layers: int, past: list[tuple[torch.Tensor, torch.Tensor]] | None = None):
        super().__init__(layers=[_SegmentLayer(past[i] if past else None) for i in range(layers)])

    def next(self) -> SegmentCache:
        """The cache that holds this segment too. Call it after the forward pass."""
        return SegmentCache(len(self.layers), [layer.grown for layer in self.layers])


@contextmanager
def checkpoint_with_cache(language_model: Any) -> Iterator[None]:
    """Within, decoder layers that have gradient checkpointing on are checkpointed with their cache kept.

    Only valid with a `SegmentCache`. Non-reentrant checkpointing is used, since keys and values leave the layer
    beside its output.
    """
    layers = [
        layer for layer in language_model.layers if layer.training and getattr(layer, "gradient_checkpointing", False)
    ]
    outer = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = False
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, outer, strict=True):
            layer.gradient_checkpointing = True
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward

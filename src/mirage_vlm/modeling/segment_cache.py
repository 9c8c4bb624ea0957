"""A key-value cache that keeps the graph and bears gradient checkpointing.

Stage 2 runs a row in pieces (text, latent steps, text) and the gradient flows from one piece into the keys and
values of those before it. transformers' own cache is grown in place, so it drops the cache when a layer is
checkpointed: the recomputation would grow it twice. Here each pass has a cache object of its own that only reads the
past; what the pass adds is handed to the next one.

What is handed on stands in one buffer for each layer, of which every pass sees the front. Were it copied instead,
the graph would keep a copy of the whole past for every latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

NARROW = 8  # columns; what a pass of so many keeps for the backward pass is little, and to run it again is not


class _Buffer:
    """Room for the keys (or the values) of a whole rollout in one layer, filled from the front."""

    def __init__(self, room: int):
        self.room = room
        self.filled = 0
        self.memory: torch.Tensor | None = None

    def extend(self, begin: int, new: torch.Tensor) -> torch.Tensor:
        """The first `begin` positions and [B, H, m, d] new ones, as a view; what stands there is not written again."""
        end = begin + new.shape[-2]
        if self.memory is None:
            self.memory = new.new_empty(*new.shape[:-2], self.room, new.shape[-1])
        if end > self.filled:  # not in a recomputation
            self.memory[..., begin:end, :] = new
            self.filled = end
        # autograd refuses a tensor that was written to after it was saved, and takes all views of a memory for one
        # tensor. A view of `data` has a version of its own; what it shows stays as it is.
        return self.memory.data[..., :end, :]


class _Grow(torch.autograd.Function):
    """[B, H, n, d] past and [B, H, m, d] new → [B, H, n + m, d]: a concatenation, the past already in the buffer."""

    @staticmethod
    def forward(ctx: Any, past: torch.Tensor | None, new: torch.Tensor, buffer: _Buffer) -> torch.Tensor:
        ctx.begin = 0 if past is None else past.shape[-2]
        return buffer.extend(ctx.begin, new)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        (gradient,) = gradients
        return gradient[..., : ctx.begin, :] if ctx.begin else None, gradient[..., ctx.begin :, :], None


Pair = tuple[torch.Tensor | None, torch.Tensor | None]  # keys and values


class _SegmentLayer(DynamicLayer):
    """Keys and values of one layer up to this segment; `update` may run again and gives the same."""

    def __init__(self, past: Pair, buffers: tuple[_Buffer, _Buffer], keep: bool):
        super().__init__()
        self.past, self.buffers, self.keep = past, buffers, keep
        self.grown: Pair = (None, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            _Grow.apply(past, new, buffer) if self.keep else new if past is None else torch.cat([past, new], dim=-2)
            for past, new, buffer in zip(self.past, (key_states, value_states), self.buffers, strict=True)
        )
        if self.keep and self.grown[0] is None:  # not in a recomputation
            self.grown = (keys, values)
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.past[0] is None else self.past[0].shape[-2]


class SegmentCache(Cache):
    """Cache for one pass over a segment of each row; `next()` is the cache for the pass after it.

    Args:
        layers: those of this pass. Start with `SegmentCache.empty`.
    """

    layers: list[_SegmentLayer]

    def __init__(self, layers: Sequence[_SegmentLayer]):
        super().__init__(layers=list(layers))

    @classmethod
    def empty(cls, layers: int, room: int) -> SegmentCache:
        """The cache for the first pass through so many decoder layers.

        Args:
            room: positions of all segments that will be kept.
        """
        return cls([_SegmentLayer((None, None), (_Buffer(room), _Buffer(room)), True) for _ in range(layers)])

    def next(self) -> SegmentCache:
        """The cache that holds this segment too. Call it after the forward pass."""
        return SegmentCache([_SegmentLayer(layer.grown, layer.buffers, True) for layer in self.layers])

    def draft(self) -> SegmentCache:
        """A cache with the same past, for a pass whose keys and values are not kept."""
        return SegmentCache([_SegmentLayer(layer.past, layer.buffers, False) for layer in self.layers])


@contextmanager
def checkpoint_with_cache(language_model: Any) -> Iterator[None]:
    """Within, decoder layers that have gradient checkpointing on are checkpointed with their cache kept.

    Only valid with a `SegmentCache`. Non-reentrant checkpointing is used, since keys and values leave the layer
    beside its output. Passes of at most `NARROW` columns, as a latent is, are not run again: on a card they take as
    long as their kernels take to launch, and keep as much as so many tokens do without checkpointing.
    """
    layers = [
        layer for layer in language_model.layers if layer.training and getattr(layer, "gradient_checkpointing", False)
    ]
    outer = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = False
        layer.forward = partial(_checkpointed, layer, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, outer, strict=True):
            layer.gradient_checkpointing = True
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _checkpointed(layer: Any, forward: Callable[..., Any], hidden: torch.Tensor, *args: Any, **told: Any) -> Any:
    """A layer's forward of [B, L, D]."""
    if hidden.shape[1] <= NARROW:
        return forward(hidden, *args, **told)
    return checkpoint(partial(_plainly, layer, forward), hidden, *args, use_reentrant=False, **told)


def _plainly(layer: Any, forward: Callable[..., Any], *args: Any, **told: Any) -> Any:
    """A layer's forward without transformers' own checkpointing, which takes the cache away.

    It runs a second time in the backward pass, where the layer's flag is on again.
    """
    before, layer.gradient_checkpointing = layer.gradient_checkpointing, False
    try:
        return forward(*args, **told)
    finally:
        layer.gradient_checkpointing = before

"""Storage of the key-value cache: blocks that are taken and given back."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

NOBODY = 0  # a block that is never given out: padding is written to it, and nothing is read from it
FIRST = 64  # blocks that are allocated before any is asked for


class BlockPool:
    """Storage and free list.

    A block holds the keys and values of `size` positions, in all layers, of one owner: a prompt, which all responses
    to it read, or one response. `layers` has the storage, (keys, values) [blocks, heads, size, width] for each.

    Args:
        config: the text config of the model.
        size: positions of a block.
        limit: most blocks that may be given out.
        fixed: allocate everything now; else storage grows by doubling, up to the limit.
    """

    def __init__(self, config: Any, size: int, limit: int, dtype: torch.dtype, device: torch.device, fixed: bool):
        self.size, self.limit, self.fixed = size, limit, fixed
        self.shape = self._shape(config, size)
        self.dtype, self.device = dtype, device
        self.used = 0
        self.reserved = 0
        self._allocate()

    @staticmethod
    def bytes_per_block(config: Any, size: int, dtype: torch.dtype) -> int:
        """Keys and values of one block in all layers."""
        return 2 * math.prod(BlockPool._shape(config, size)) * dtype.itemsize

    @staticmethod
    def _shape(config: Any, size: int) -> tuple[int, int, int, int]:
        """Layers, key-value heads, positions of a block, width of a head."""
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, config.num_key_value_heads, size, width

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return sum(store.nbytes for layer in self.layers for store in layer)

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.size)

    def take(self, count: int) -> list[int]:
        """So many blocks, the lowest that are free; they must have been reserved."""
        if count > len(self.free):
            self._grow(count - len(self.free))
        self.used += count
        return [heapq.heappop(self.free) for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        self.used -= len(blocks)
        for block in blocks:
            heapq.heappush(self.free, block)

    def trim(self) -> None:
        """Back to the size at the start; only when no block is in use."""
        assert self.used == 0
        if not self.fixed:
            self._allocate()

    def _allocate(self) -> None:
        """The storage that a pool begins with."""
        blocks = self.limit if self.fixed else min(self.limit, FIRST)
        layers, heads, size, width = self.shape
        shape = (blocks + 1, heads, size, width)
        self.layers = [
            (
                torch.zeros(shape, dtype=self.dtype, device=self.device),
                torch.zeros(shape, dtype=self.dtype, device=self.device),
            )
            for _ in range(layers)
        ]
        self.images = torch.zeros(blocks + 1, size, dtype=torch.bool, device=self.device)
        self.free = list(range(1, blocks + 1))
        self.blocks = blocks + 1
        if self.fixed:
            for keys, values in self.layers:  # CUDA graphs may write to them where they are
                torch._dynamo.mark_static_address(keys)
                torch._dynamo.mark_static_address(values)

    def _grow(self, more: int) -> None:
        old, new = self.blocks, min(self.limit + 1, max(2 * self.blocks, self.blocks + more))
        assert new >= old + more, "more blocks are taken than were reserved"

        def longer(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor.new_zeros(new - len(tensor), *tensor.shape[1:])])

        for i, (keys, values) in enumerate(self.layers):  # one after the other, so that little is there twice
            self.layers[i] = longer(keys), longer(values)
        self.images = longer(self.images)
        self.blocks = new
        for block in range(old, new):
            heapq.heappush(self.free, block)

    def drop_positions(self, blocks: list[int], kept: torch.Tensor) -> list[int]:
        """Keep only some positions of an owner's blocks, in order, and give back the blocks that become free.

        Args:
            kept: indices into the owner's positions.

        Returns:
            The blocks that now hold them.
        """
        _, heads, size, width = self.shape
        stay = blocks[: self.blocks_for(len(kept))]
        before, after = torch.tensor(blocks, device=self.device), torch.tensor(stay, device=self.device)
        for store in (store for layer in self.layers for store in layer):
            held = store[before].transpose(0, 1).reshape(heads, -1, width)[:, kept]
            held = F.pad(held, (0, 0, 0, len(stay) * size - len(kept)))
            store[after] = held.reshape(heads, len(stay), size, width).transpose(0, 1)
        self.images[after] = False
        self.give_back(blocks[len(stay) :])
        return stay

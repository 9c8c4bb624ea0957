"""Which row reads which block, as the index tensors that attention works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from mirage_vlm.decoding.blocks import Region, Step
from mirage_vlm.decoding.native import NativeStep
from mirage_vlm.decoding.pool import BlockPool

if TYPE_CHECKING:
    from mirage_vlm.decoding.response import Response


@dataclass(frozen=True)
class Plan:
    """Valid until a row joins or leaves, or takes a new block.

    Attributes:
        regions, table: see `mirage_vlm.decoding.blocks.Step`.
        own: [B, most] the blocks of each response's own positions, in order.
    """

    regions: tuple[Region, ...]
    table: torch.Tensor
    own: torch.Tensor

    def step(
        self,
        pool: BlockPool,
        block: torch.Tensor,
        offset: torch.Tensor,
        length: torch.Tensor,
        evicted: torch.Tensor | None,
    ) -> Step:
        """What attention needs for one position of every row.

        Args:
            block, offset: [B] where the new positions go.
            length: [B] index of the new position in each response.
            evicted: [B] rows that no longer see the prompt's pictures; None where there is none.
        """
        step = Step(pool, self.regions, self.table, block, offset)
        step.mask(length, evicted)
        return step


@dataclass(frozen=True)
class NativePlan:
    """The same for the kernel of `mirage_vlm.decoding.native`, whose tables are simpler.

    Attributes:
        table: [B, most] the blocks of each row, its own in order and then its prompt's.
        own: [B, most] its own alone; `counts` [B] of them, and `shared` [B] positions of its prompt.
    """

    table: torch.Tensor
    own: torch.Tensor
    counts: torch.Tensor
    shared: torch.Tensor

    def padded(self, rows: int, across: int, own: int) -> NativePlan:
        """The same in memory of its own, for so many rows of so many blocks."""
        wide = ((self.table, across), (self.own, own))
        table, mine = (F.pad(t, (0, to - t.shape[1], 0, rows - len(t))) for t, to in wide)
        counts, shared = (F.pad(t, (0, rows - len(t))) for t in (self.counts, self.shared))
        return NativePlan(table.clone(), mine.clone(), counts.clone(), shared.clone())

    def step(
        self,
        pool: BlockPool,
        block: torch.Tensor,
        offset: torch.Tensor,
        length: torch.Tensor,
        evicted: torch.Tensor | None,
    ) -> NativeStep:
        """As `Plan.step`."""
        hidden = None if evicted is None else pool.images
        return NativeStep(pool, self.table, self.counts, length, self.shared, block, offset, hidden, evicted)


def make_native_plan(responses: Sequence[Response], device: torch.device) -> NativePlan:
    """Lay out the blocks of all rows for the kernel."""
    table = np.zeros((len(responses), max(len(r.blocks) + len(r.prompt.blocks) for r in responses)), dtype=np.int64)
    own = np.zeros((len(responses), max(1, *(len(r.blocks) for r in responses))), dtype=np.int64)
    counts = np.zeros((2, len(responses)), dtype=np.int64)
    for row, response in enumerate(responses):
        mine, read = response.blocks, response.prompt.blocks
        own[row, : len(mine)] = table[row, : len(mine)] = mine
        table[row, len(mine) : len(mine) + len(read)] = read
        counts[:, row] = len(mine), len(response.prompt.ids)
    return NativePlan(*(torch.from_numpy(array).to(device) for array in (table, own, counts[0], counts[1])))


def make_plan(responses: Sequence[Response], size: int, device: torch.device) -> Plan:
    """Lay out the blocks of all rows.

    Where every prompt has one reader, one stretch of the pool holds everything. Otherwise the prompts' blocks are
    scored against several readers each, and the responses' own blocks against one, in two stretches; a stretch may
    hold blocks of the other kind in between, which then count for nothing.

    Args:
        size: positions of a block.
    """
    readers: dict[int, list[int]] = {}
    for row, response in enumerate(responses):
        readers.setdefault(id(response.prompt), []).append(row)
    slots = max(map(len, readers.values()))
    shared_end = 1 + max(max(r.prompt.blocks) for r in responses)
    own_low = min((min(r.blocks) for r in responses if r.blocks), default=1)
    own_end = 1 + max((max(r.blocks) for r in responses if r.blocks), default=1)
    if slots == 1:
        shared_end, own_low, own_end = max(shared_end, own_end), 0, 0
    shared, own_part = _Part(0, shared_end, slots), _Part(own_low, own_end, 1)
    longest = max(len(r.blocks) + len(r.prompt.blocks) for r in responses)
    table = np.zeros((len(responses), longest), dtype=np.int64)
    own = np.zeros((len(responses), max(1, *(len(r.blocks) for r in responses))), dtype=np.int64)
    for row, response in enumerate(responses):
        prompt, blocks = response.prompt, np.array(response.blocks, dtype=np.int64)
        read = np.array(prompt.blocks, dtype=np.int64)
        slot = readers[id(prompt)].index(row)
        shared.readers[read, slot] = row
        shared.fill[read] = np.minimum(size, len(prompt.ids) - size * np.arange(len(read)))
        part, base = (shared, 0) if slots == 1 else (own_part, shared_end * slots)
        part.readers[blocks - part.low, 0] = row
        part.start[blocks - part.low] = size * np.arange(len(blocks))
        table[row, : len(blocks)] = base + blocks - part.low
        table[row, len(blocks) : len(blocks) + len(read)] = read * slots + slot
        own[row, : len(blocks)] = blocks
    parts = (shared,) if slots == 1 else (shared, own_part)
    regions = tuple(part.region(device) for part in parts)
    return Plan(regions, torch.from_numpy(table).to(device), torch.from_numpy(own).to(device))


class _Part:
    """A region in the making."""

    def __init__(self, low: int, high: int, slots: int):
        self.low, self.high = low, high
        self.readers = np.zeros((high - low, slots), dtype=np.int64)
        self.fill = np.zeros(high - low, dtype=np.int64)
        self.start = np.full(high - low, -1, dtype=np.int64)

    def region(self, device: torch.device) -> Region:
        readers, fill, start = (torch.from_numpy(a).to(device) for a in (self.readers, self.fill, self.start))
        return Region(self.low, self.high, readers, fill, start)

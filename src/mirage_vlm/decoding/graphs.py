"""CUDA graphs of a whole step: embedding or recast, decoder, LM head, choice and the rules of spans, in one launch.

A graph works on memory that stays where it is. So the state of the rows and the layout of their blocks are copied to
such memory when a row joins or leaves; in between, each step reads and writes them there. Rows, blocks and tables are
padded to powers of two, so that few graphs are made: one for each combination of sizes and of kinds of request.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from mirage_vlm.decoding.plan import NativePlan
from mirage_vlm.decoding.rows import Rows


@dataclass(frozen=True)
class Logged:
    """What one step left on the device for the host's next look.

    Attributes:
        log, chances: see `mirage_vlm.decoding.rows.Chooser`.
        inputs: [B, D] what was consumed, where it is kept.
        consumed: whether anything was; not so of a response's first token.
    """

    log: torch.Tensor
    chances: torch.Tensor | None
    inputs: torch.Tensor | None
    consumed: bool


Step = Callable[[Rows, NativePlan], Logged]  # moves the rows on by replacing their tensors
Capture = Callable[[Callable[[], None]], Callable[[], None]]  # what runs it again


@dataclass
class _Graph:
    """A captured step and the memory that it works on."""

    rows: Rows
    plan: NativePlan
    logged: Logged
    replay: Callable[[], None]


class StepGraphs:
    """The graphs of one engine, made when they are first needed.

    Args:
        capture: makes a graph of a piece of work, as `cuda_capture` gives it.
    """

    def __init__(self, capture: Capture):
        self.graphs: dict[Hashable, _Graph] = {}
        self.capture = capture
        self.loaded: tuple[_Graph, Rows, NativePlan] | None = None  # what stands in a graph's memory

    def run(self, step: Step, kind: Hashable, rows: Rows, plan: NativePlan, times: int) -> list[Logged]:
        """Do a step several times; the tensors of `rows` are then views of a graph's memory.

        Args:
            kind: all that the work of `step` depends on beside sizes.
        """
        count = len(rows)
        sizes = (rounded(count), rounded(plan.table.shape[1]), rounded(plan.own.shape[1]))
        shapes = tuple(getattr(rows, f.name).shape[1:] for f in fields(rows) if f.name != "patches")
        key = (kind, sizes, shapes, rounded(rows.patches.shape[1]))
        if key not in self.graphs:
            self.graphs[key] = self._make(step, rows, plan, sizes)
        graph = self.graphs[key]
        self._load(graph, rows, plan)
        steps = []
        for _ in range(times):
            graph.replay()
            logged = graph.logged
            steps.append(
                Logged(
                    logged.log[:count].clone(),
                    None if logged.chances is None else logged.chances[:count].clone(),
                    None if logged.inputs is None else logged.inputs[:count].clone(),
                    consumed=True,
                )
            )
        for f in fields(rows):
            setattr(rows, f.name, getattr(graph.rows, f.name)[:count])
        self.loaded = (graph, rows, plan)
        return steps

    def forget(self) -> None:
        """The rows were moved on by other means: what stands in memory is old."""
        self.loaded = None

    def _load(self, graph: _Graph, rows: Rows, plan: NativePlan) -> None:
        """Put rows and plan into a graph's memory."""
        if self.loaded is not None and all(a is b for a, b in zip(self.loaded, (graph, rows, plan), strict=True)):
            return
        count = len(rows)
        for f in fields(rows):
            ours, theirs = getattr(graph.rows, f.name), getattr(rows, f.name)
            ours[(*map(slice, theirs.shape),)].copy_(theirs)
        graph.rows.idle(count)
        for f in fields(plan):
            ours, theirs = getattr(graph.plan, f.name), getattr(plan, f.name)
            ours[(*map(slice, theirs.shape),)].copy_(theirs)

    def _make(self, step: Step, rows: Rows, plan: NativePlan, sizes: tuple[int, int, int]) -> _Graph:
        """Capture a step on memory of its own.

        The work runs once before, so that everything is compiled; what it writes to the cache, the first replay
        writes again.
        """
        still, layout = rows.padded(sizes[0], rounded(rows.patches.shape[1])), plan.padded(*sizes)
        step(replace(still), layout)
        kept: list[Logged] = []

        def work() -> None:
            moved = replace(still)
            kept.append(step(moved, layout))
            for f in fields(still):
                before, after = getattr(still, f.name), getattr(moved, f.name)
                if after is not before:
                    before.copy_(after)

        replay = self.capture(work)
        return _Graph(still, layout, kept[-1], replay)


def rounded(number: int) -> int:
    """The next power of two; 0 is 0."""
    return 1 << (number - 1).bit_length() if number else 0


def cuda_capture(device: torch.device) -> Capture:
    """Captures into CUDA graphs of a device, which share their memory: only one of them runs at a time."""
    pool: Any = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # other threads may go on meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return capture

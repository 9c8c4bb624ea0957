"""Who trains on what: the batches of one process, so that any number of processes takes the same steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.training.data import BucketSampler, Collator

if TYPE_CHECKING:
    from mirage_vlm.trajectory import Trajectory


class Shares(Sampler[list[int]]):
    """The batches of one process.

    The order is dealt out in rounds of `batch` examples for each process; a step takes `accumulate` rounds. What is
    left for the last round is dealt evenly, so that a process may get a smaller batch or an empty one, but no example
    is repeated or left out, and all processes have the same number of rounds. An optimisation step therefore sees the
    same examples for any way of making the same global batch of processes, batch size and accumulation. (With
    bucketing the order itself is one of batches, so there the batch size has to stay.)

    Args:
        order: of the examples, the same in all processes.
        batch: examples of a process in one forward pass.
        rank, processes: which process this is, and of how many.
        epoch: the epoch at the time of asking. It is asked for at the start of each pass rather than set, since the
            wrappers by which accelerate skips batches on resume don't pass `set_epoch` on.
    """

    def __init__(self, order: BucketSampler, batch: int, rank: int, processes: int, epoch: Callable[[], int]):
        self.order, self.batch, self.rank, self.processes, self.epoch = order, batch, rank, processes, epoch

    def __len__(self) -> int:
        return -(-len(self.order) // (self.batch * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        self.order.set_epoch(self.epoch())
        order = iter(self.order)  # taken as it is needed: it measures examples on the way
        while dealt := list(itertools.islice(order, self.batch * self.processes)):
            cuts = [len(dealt) * rank // self.processes for rank in (self.rank, self.rank + 1)]
            yield dealt[cuts[0] : cuts[1]]


@dataclass(frozen=True)
class ShareCollator:
    """A collator that also bears an empty share: one row without labels, spans or pictures, which adds nothing."""

    collator: Collator

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        if trajectories:
            return self.collator(trajectories)
        tokens = torch.full((1, 2), self.collator.encoder.tokenizer.eos_token_id)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": torch.full_like(tokens, IGNORED),
        }


class SharedFault(MirageError):
    """A fault of one process that all of them raise."""


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """What goes wrong within, in one process or in all, ends all of them. Every process has to come by.

    Raises:
        MirageError: the fault itself in a single process, else a `SharedFault` with the message of the first.
    """
    fault: MirageError | None = None
    try:
        yield
    except MirageError as raised:
        fault = raised
    if not dist.is_available() or not dist.is_initialized():
        if fault is not None:
            raise fault
        return
    anywhere = torch.tensor(fault is not None, dtype=torch.int32, device=device)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    if anywhere:
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if fault is None else str(fault))
        raise SharedFault(next(message for message in messages if message is not None)) from fault

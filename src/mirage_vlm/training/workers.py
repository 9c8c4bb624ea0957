"""Faults of the processes that prepare batches, told in the one line that they are meant to be."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import dataloader

from mirage_vlm.errors import MirageError

NAMED_WITHIN = 2.0
"""Seconds until torch, told of its end by the system, has said which process it was."""


@contextmanager
def in_one_line() -> Iterator[None]:
    """Within, faults of the processes that prepare batches come without torch's traceback around them.

    Raises:
        MirageError: what a worker raised; or one has been killed.
    """
    try:
        yield
    except MirageError as fault:
        raise type(fault)(str(fault).rpartition("MirageError: ")[2].strip()) from fault
    except (RuntimeError, ConnectionError, EOFError) as fault:
        end = end_of_worker(fault)
        if end is None:
            raise
        raise MirageError(
            f"a process that prepares batches ended: {end.splitlines()[0].strip()} "
            "If memory ran out, lower train.workers or train.batch_size"
        ) from fault


def end_of_worker(fault: Exception) -> str | None:
    """What torch says of a worker's end, if that is what the fault is.

    Most ends it notices itself. But a worker that dies between the hand-over of a batch and the reading of its tensors
    breaks the connection first, and its name would come later, in the midst of whatever is going on by then.
    """
    if isinstance(fault, RuntimeError):
        return str(fault) if str(fault).startswith("DataLoader worker") else None
    if not any(frame.f_code.co_filename == dataloader.__file__ for frame, _ in traceback.walk_tb(fault.__traceback__)):
        return None
    try:
        time.sleep(NAMED_WITHIN)
    except RuntimeError as named:  # raised by torch's handler of the signal
        return end_of_worker(named)
    return f"DataLoader worker, connection lost ({type(fault).__name__})."

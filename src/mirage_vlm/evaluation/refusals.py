"""What of a set of examples cannot be evaluated, told before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mirage_vlm.formats import Fault, Faults
from mirage_vlm.tasks import faults
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling.encoding import Encoder


def refusals(examples: Sequence[Trajectory], encoder: Encoder | None = None) -> dict[int, tuple[Fault, ...]]:
    """What the scorer and the encoder would refuse, by the number of the example, from 0; no picture is decoded.

    Args:
        encoder: of the checkpoint; None leaves to it what only a model can say.
    """
    found = {}
    for i, example in enumerate(examples):
        here = [*faults(example), *(encoder.faults(example, response=False) if encoder is not None else ())]
        if here:
            found[i] = tuple(here)
    return found


def told(examples: Sequence[Trajectory], refused: dict[int, tuple[Fault, ...]]) -> Faults:
    """The same, counted by kind, each at the place of its example."""
    return Faults((examples[i].where or f"example {i + 1}", fault) for i, here in refused.items() for fault in here)


def count_untold(examples: Sequence[Trajectory]) -> int:
    """The examples that have an answer but no task, of which any text counts as a valid answer."""
    return sum(example.task is None and example.answer is not None for example in examples)

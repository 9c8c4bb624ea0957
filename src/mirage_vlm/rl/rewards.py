"""Rewards: what a response is worth.

A reward takes the decoded trajectories of a step and gives a number for each. To add one, write such a function and
name it in `REWARDS`, or name it in a recipe as `package.module:function`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from mirage_vlm.dotted import load_named
from mirage_vlm.errors import MirageError
from mirage_vlm.tasks import score
from mirage_vlm.tasks.base import count_answers
from mirage_vlm.trajectory import Trajectory

Reward = Callable[[Sequence[Trajectory]], Sequence[float]]
FORMAT = re.compile(r"\s*<think>((?!</?think>).)*</think>((?!</?think>).)*", re.DOTALL)


def accuracy(trajectories: Sequence[Trajectory]) -> list[float]:
    """1 where the task's checker says that the answer is right."""
    return [float(score(each).correct) for each in trajectories]


def optimality(trajectories: Sequence[Trajectory]) -> list[float]:
    """1 where a plan is right and as short as can be; for tasks without plans the same as `accuracy`."""
    found = list(map(score, trajectories))
    return [float(each.correct if each.optimal is None else each.optimal) for each in found]


def well_formed(trajectories: Sequence[Trajectory]) -> list[float]:
    r"""1 where a response ends by itself and is `<think>…</think>` and then one answer, and no other.

    An answer is `\boxed{…}` or `<answer>…</answer>`, as the checkers read it.
    """
    return [
        float(
            each.decoding is not None
            and each.decoding.finish_reason == "stop"
            and FORMAT.fullmatch(each.text) is not None
            and count_answers(each.text) == 1
            and count_answers(each.text.rpartition("</think>")[2]) == 1
        )
        for each in trajectories
    ]


def boxed_once(trajectories: Sequence[Trajectory]) -> list[float]:
    r"""1 where a response has one `\boxed{…}` or `<answer>…</answer>`: the format of answers without words."""
    return [float(count_answers(each.text) == 1) for each in trajectories]


def brevity(trajectories: Sequence[Trajectory]) -> list[float]:
    """1 / (1 + tokens / 100), latents among them: from 1 for an empty response to 0 for one without end."""
    return [1 / (1 + len(each.decoding.token_ids) / 100) if each.decoding else 0.0 for each in trajectories]


def thought(trajectories: Sequence[Trajectory]) -> list[float]:
    """1 where a response has consumed a latent."""
    return [float(any(span.k for span in each.spans)) for each in trajectories]


REWARDS: dict[str, Reward] = {
    "accuracy": accuracy,
    "optimality": optimality,
    "format": well_formed,
    "boxed": boxed_once,
    "brevity": brevity,
    "thought": thought,
}


def reward_of(name: str) -> Reward:
    """The reward of that name, made safe: what it gives is checked, and what it raises is named.

    Raises:
        MirageError: there is none.
    """
    if name in REWARDS:
        found = REWARDS[name]
    else:
        if ":" not in name:
            raise MirageError(
                f"there is no reward {name!r}; choose from {', '.join(REWARDS)}, or name your own as module:function"
            )
        found = load_named(name, "reward")
        if not callable(found):
            raise MirageError(f"the reward {name!r} is not a function")

    def checked(trajectories: Sequence[Trajectory]) -> list[float]:
        try:
            values = list(found(trajectories))
        except MirageError as fault:
            raise MirageError(f"the reward {name!r}: {fault}") from fault
        except Exception as fault:
            raise MirageError(f"the reward {name!r} failed: {type(fault).__name__}: {fault}") from fault
        if len(values) != len(trajectories):
            raise MirageError(f"the reward {name!r} gave {len(values)} numbers for {len(trajectories)} responses")
        return [_number(name, value, each) for value, each in zip(values, trajectories, strict=True)]

    return checked


def _number(name: str, value: object, response: Trajectory) -> float:
    """What a reward gave, of Python, NumPy or torch, as a number."""
    if not isinstance(value, str):
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise MirageError(
        f"the reward {name!r} gave {value!r}, which is no finite number, for the response {response.text[:200]!r}"
    )

r"""The blocks world of the VSP benchmark: a plan of moves that turns one arrangement of stacks into another.

An arrangement is a list of stacks, each a list of letters from bottom to top; the order of the stacks means nothing.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.base import STEP_BY_STEP, Score, Task, boxed, count
from mirage_vlm.trajectory import Image, Message, Trajectory, user_turn

COLOURS = {"B": "blue", "Y": "yellow", "P": "purple", "O": "orange", "R": "red", "G": "green"}
TABLE = "table"
PLAN_QUESTION = (
    "The first picture shows stacks of coloured blocks (blue, yellow, purple, orange, red, green), the second how they "
    "should be, in whatever order the stacks stand. A move takes the top block of a stack and puts it on top of "
    "another stack or on the table. Find the fewest moves. Answer with moves such as move(red,blue), "
    r"move(green,table) in \boxed{}."
)

Stacks = frozenset[tuple[str, ...]]  # of letters, from bottom to top
Move = tuple[str, str]  # the letter of the block; the letter of what it is put on, or TABLE

_LETTERS = {word: letter for letter, word in COLOURS.items()} | {letter.lower(): letter for letter in COLOURS}
_MOVE = re.compile(r"move\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s\d.,;-]*")  # numbers of steps and line ends, around the moves


class Blocks(Task):
    """Plans for `meta["start"]` to become `meta["end"]`; the name is where the task lies."""

    name = "mirage_vlm.sources.blocks:BLOCKS"
    sizes = range(1, 2)
    usual = (1,)

    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        """The pictures are photographs, so none can be made.

        Raises:
            MirageError: always.
        """
        raise MirageError(
            "the blocks task has no generator: its examples come from the VSP repository (vsp-blocks-main)"
        )

    def key(self, trajectory: Trajectory) -> str:
        """Both arrangements."""
        return "/".join(str(sorted(stacks_of(trajectory.meta, name))) for name in ("start", "end"))

    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        """The prompt; `image` is the start, and it needs the detail `end`, a picture."""
        self.check_style(style)
        if not isinstance(details.get("end"), Image):
            raise MirageError("the blocks task needs a second picture, `end`")
        return (user_turn(image, details["end"], PLAN_QUESTION + (STEP_BY_STEP if style == "cot" else "")),)

    def score(self, trajectory: Trajectory) -> Score:
        """Right is a plan of possible moves that ends in the arrangement of `meta["end"]`."""
        start, end = stacks_of(trajectory.meta, "start"), stacks_of(trajectory.meta, "end")
        content = boxed(trajectory.text)
        plan = parse_plan(content) if content is not None else None
        if plan is None:
            read = r"no answer in \boxed{}" if content is None else rf"\boxed{{{content[:40]}}} is not a plan"
            return Score(False, False, False, read)
        now = start
        for step, (block, target) in enumerate(plan, 1):
            moved = move(now, block, target)
            if moved is None:
                return Score(False, True, False, f"move {step} is not possible: {worded([(block, target)])}")
            now = moved
        if now != end:
            return Score(False, True, False, f"ends as {shown(now)}, not as {shown(end)}")
        fewest = distance(start, end)
        optimal = len(plan) == fewest
        return Score(True, True, optimal, f"right in {count(len(plan), 'move')} ({'fewest' if optimal else fewest})")


def stacks_of(meta: Mapping[str, Any], name: str) -> Stacks:
    """An arrangement that a trajectory's meta records.

    Raises:
        MirageError: there is none, or it is malformed.
    """
    value: Any = meta.get(name)
    whole = isinstance(value, list) and value and all(isinstance(stack, list) and stack for stack in value)
    blocks = [block for stack in value for block in stack] if isinstance(value, list) and whole else []
    if (
        not blocks
        or not all(isinstance(block, str) for block in blocks)
        or len(set(blocks)) < len(blocks)
        or not set(blocks) <= set(COLOURS)
    ):
        raise MirageError(f'cannot score: "{name}" in meta must be stacks of {", ".join(COLOURS)}, each once')
    return frozenset(map(tuple, value))


def parse_plan(text: str) -> list[Move] | None:
    """The moves of a text that holds nothing but moves and their numbers; None for anything else or nothing."""
    if not _BETWEEN.fullmatch(_MOVE.sub("", text)):
        return None
    plan = []
    for block, target in _MOVE.findall(text):
        source, place = _LETTERS.get(block.lower()), _LETTERS.get(target.lower(), target.lower())
        if source is None or (place != TABLE and place not in COLOURS):
            return None
        plan.append((source, place))
    return plan or None


def move(stacks: Stacks, block: str, target: str) -> Stacks | None:
    """The arrangement after a move; None where it is not possible."""
    source = next((stack for stack in stacks if stack[-1] == block), None)
    if source is None or block == target:
        return None
    rest = set(stacks) - {source} | ({source[:-1]} if len(source) > 1 else set())
    if target == TABLE:
        return frozenset(rest | {(block,)})
    under = next((stack for stack in rest if stack[-1] == target), None)
    # what lies under the block itself is free only once it is gone, so it is no place to put it
    if under is None or under == source[:-1]:
        return None
    return frozenset(rest - {under} | {(*under, block)})


def distance(start: Stacks, end: Stacks) -> int | None:
    """How many moves it takes at least; None where there is no way."""
    seen, waiting = {start}, deque([(start, 0)])
    while waiting:
        now, moves = waiting.popleft()
        if now == end:
            return moves
        for after in _next(now):
            if after not in seen:
                seen.add(after)
                waiting.append((after, moves + 1))
    return None


def _next(stacks: Stacks) -> Iterator[Stacks]:
    tops = [stack[-1] for stack in stacks]
    for block in tops:
        for target in (*tops, TABLE):
            if (after := move(stacks, block, target)) is not None:
                yield after


def worded(plan: list[Move]) -> str:
    """`move(red,blue), move(green,table)`."""
    return ", ".join(f"move({COLOURS[block]},{COLOURS.get(target, target)})" for block, target in plan)


def shown(stacks: Stacks) -> str:
    """`B OR`: each stack from bottom to top."""
    return " ".join("".join(stack) for stack in sorted(stacks))


BLOCKS = Blocks()

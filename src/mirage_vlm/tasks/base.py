"""What a task is: something that makes examples, words prompts and scores answers."""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import Fault
from mirage_vlm.tasks.frozenlake import MAX_SIDE, Maze
from mirage_vlm.trajectory import Image, LatentSpan, Message, Segment, Text, Trajectory

Split = Literal["train", "test"]

TEST_PERCENT = 10
MOST_DRAWS = 1000  # of which none is for testing once in 10^46
_OPENED = re.compile(r"\\boxed\s*\{|<answer>", re.IGNORECASE)
_CLOSED = re.compile(r"</answer>", re.IGNORECASE)
_WORDS = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mathsf)\s*\{([^{}]*)\}")
STEP_BY_STEP = " Think step by step."  # what is added to the question where words are wanted


def split_of(key: str) -> Split:
    """The split of an example by its task's `key`, for every seed and machine: one in ten is for testing."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 100 < TEST_PERCENT else "train"


@dataclass(frozen=True)
class Score:
    """What a checker says of one answer.

    Attributes:
        correct: the answer is right.
        valid: an answer could be read at all; an unreadable one is never correct.
        optimal: for plans, correct and as short as can be; None where that has no meaning.
        verdict: one line for people.
    """

    correct: bool
    valid: bool
    optimal: bool | None
    verdict: str


class Task(ABC):
    """A task; one instance each, found by name with `get_task`."""

    name: str
    styles: tuple[str, ...] = ("direct", "cot")
    mixture: tuple[str, ...] = ("direct", "cot")  # of the style `mixed`
    sizes: range = range(2, MAX_SIDE + 1)  # levels that there are
    usual: tuple[int, ...] = (3, 4, 5, 6)  # where none are named
    needs: tuple[str, ...] = ()  # details without which there is no prompt
    mazes: bool = False  # its pictures are maps, which `mirage solve` brings to the usual size of a cell

    @abstractmethod
    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        """A fresh example: prompt, response with helper images, answer and meta; pictures draw themselves.

        Args:
            rng: the only source of chance.
            level: one of `sizes`: the side length of a map, or how hard the example is.
            style: one of `styles`.
            cell: pixels per side of a cell.
        """

    def make_in(
        self, split: Split, rng: random.Random, level: int, style: str = "direct", cell: int = 64
    ) -> Trajectory:
        """A fresh example of one of the splits; a task that knows the split before it draws may say how.

        Raises:
            MirageError: none was found, as where all examples have one key.
        """
        for _ in range(MOST_DRAWS):
            trajectory = self.make(rng, level, style, cell)
            if split_of(self.key(trajectory)) == split:
                return trajectory
        raise MirageError(
            f"{self.name}: none of {MOST_DRAWS} examples of level {level} is for {split}; the task has too few keys"
        )

    def key(self, trajectory: Trajectory) -> str:
        """What tells examples apart that must not be in both splits; of the maze tasks the map."""
        return "/".join(map_of(trajectory.meta).rows)

    @abstractmethod
    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        """The prompt for any picture; `details` are what the question needs besides it.

        Raises:
            MirageError: the style is unknown, or a detail is missing or malformed.
        """

    @abstractmethod
    def score(self, trajectory: Trajectory) -> Score:
        """Check the response against what `meta` says of the picture.

        Raises:
            MirageError: `meta` lacks what the check needs.
        """

    def faults(self, trajectory: Trajectory) -> Iterator[Fault]:
        """What `score` would refuse of an example, whatever the response; fields are named as a data file has them.

        Here an empty response is scored; a task that knows better what it reads names the very field.
        """
        try:
            self.score(replace(trajectory, messages=trajectory.prompt, decoding=None))
        except MirageError as fault:
            yield Fault("meta", str(fault).removeprefix("cannot score: "))

    def meaning(self, answer: str) -> str | None:
        """What an answer stands for, such as `in a hole` for B; None where it says so itself."""
        return None

    def check_style(self, style: str) -> None:
        """Refuse a style that this task does not have."""
        if style not in self.styles:
            raise MirageError(f"{self.name} has no style {style!r}; choose from {', '.join(self.styles)}")


def respond(style: str, before: str, helper: Image, after: str, answer: str) -> tuple[Segment, ...]:
    """A response in one of the styles that all tasks have.

    Args:
        before, after: what is thought before and after the helper image.
    """
    box = rf"\boxed{{{answer}}}"
    if style == "direct":
        return LatentSpan(helper), Text(box)
    if style == "cot":
        return Text(f"<think>{before}"), LatentSpan(helper), Text(f" {after}</think>{box}")
    if style == "words":
        return (Text(f"<think>{before} {after}</think>{box}"),)
    return (Text(box),)  # plain, shown


def shown(style: str, details: Mapping[str, Any]) -> tuple[Image, ...]:
    """The helper image, where the prompt shows it."""
    if style != "shown":
        return ()
    if not isinstance(details.get("helper"), Image):
        raise MirageError("the style 'shown' has the helper image in its prompt; give one")
    return (details["helper"],)


def find_boxed(text: str) -> tuple[int, int] | None:
    r"""Where the last answer of a text begins and ends, `\boxed{...}` or `<answer>...</answer>`; None if unclosed."""
    found = _last_answer(text)
    return None if found is None else found[:2]


def _last_answer(text: str) -> tuple[int, int, str] | None:
    """Where the answer that was opened last begins and ends, and what it holds."""
    found = list(_OPENED.finditer(text))
    if not found:
        return None
    opened = found[-1]
    if not opened.group().endswith("{"):
        closed = _CLOSED.search(text, opened.end())
        return None if closed is None else (opened.start(), closed.end(), text[opened.end() : closed.start()])
    depth = 1
    for index in range(opened.end(), len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return opened.start(), index + 1, text[opened.end() : index]
    return None


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` or `<answer>...</answer>` of a text holds, `\text{}` unwrapped; None if unclosed."""
    found = _last_answer(text)
    if found is None:
        return None
    content, before = found[2], ""
    while content != before:  # one may be inside another
        content, before = _WORDS.sub(r"\1", content), content
    return content.strip()


def count_answers(text: str) -> int:
    r"""How many answers a text opens: each `\boxed{`, or where there is none, each `<answer>`."""
    kinds = [found.group().endswith("{") for found in _OPENED.finditer(text)]
    return sum(kinds) or len(kinds)


def map_of(meta: Mapping[str, Any]) -> Maze:
    """The map that a trajectory's meta records.

    Raises:
        MirageError: there is none, or it is malformed.
    """
    rows = meta.get("map")
    if rows is not None and not isinstance(rows, list | tuple):
        raise MirageError(f"cannot score: a map must be a list of strings, one for each row, not {rows!r:.60}")
    if rows is None:
        raise MirageError('cannot score: the example has no "map" in its meta')
    return Maze.from_rows(rows)


def map_faults(meta: Mapping[str, Any]) -> Iterator[Fault]:
    """What is wrong with the map that a trajectory's meta records."""
    try:
        map_of(meta)
    except MirageError as fault:
        missing = meta.get("map") is None
        yield Fault("meta.map", "is missing; the answer is checked on the map" if missing else str(fault))


def count(n: int, noun: str) -> str:
    """`1 move`, `2 moves`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"

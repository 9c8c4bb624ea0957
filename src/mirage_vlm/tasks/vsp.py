"""The two maze tasks of the VSP benchmark: plan a way to the gift, and say where a given plan ends."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import Fault
from mirage_vlm.tasks.base import STEP_BY_STEP, Score, Task, boxed, count, map_faults, map_of, shown
from mirage_vlm.tasks.frozenlake import (
    MOVE_WORDS,
    Cell,
    Maze,
    box_of,
    cell_name,
    distance_waves,
    generate_maze,
    moves_of,
    narrate,
    search_waves,
    shortest_path,
    simulate,
)
from mirage_vlm.tasks.plans import draw_plan
from mirage_vlm.tasks.render import draw_maze
from mirage_vlm.trajectory import (
    Box,
    Image,
    LatentSpan,
    Message,
    Segment,
    Text,
    Trajectory,
    assistant_turn,
    user_turn,
)

STYLES = ("direct", "cot", "plain", "cells", "steps", "words", "shown")
WAVES = ("waves", "wave-words")  # of planning alone
PLANNING_QUESTION = (
    "Find the fewest moves that bring the elf to the gift without entering a hole. "
    r"Answer with moves L, R, U, D in \boxed{}."
)
REASONING_QUESTION = (
    "The elf moves {plan}. Moves off the board do nothing. Where does it end? "
    r"A: at the gift. B: in a hole. C: safe, but not at the gift. Answer in \boxed{{}}."
)

OPTIONS = {"A": "goal", "B": "hole", "C": "safe"}
_LETTER_OF = {outcome: letter for letter, outcome in OPTIONS.items()}
_OPTION_WORDS = {"A": "at the gift", "B": "in a hole", "C": "safe, but not at the gift"}
_LAST_WORD = {"goal": "gift", "hole": "hole", "safe": "safe"}

_MOVE = re.compile("|".join(MOVE_WORDS.values()) + "|[udlr]", re.IGNORECASE)
_PLAN = re.compile(rf"(?:(?:{_MOVE.pattern})[\s,]*)+", re.IGNORECASE)


class Planning(Task):
    r"""`vsp-planning`: a fewest-moves plan in `\boxed{}`; the helper image has that path in red."""

    name = "vsp-planning"
    mazes = True
    styles = STYLES + WAVES

    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        self.check_style(style)
        return self.example(generate_maze(level, rng), style, cell)

    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        """The prompt; with the style `shown` it needs the detail `helper`, a picture."""
        self.check_style(style)
        return (user_turn(image, *shown(style, details), PLANNING_QUESTION + (STEP_BY_STEP if style == "cot" else "")),)

    def example(self, maze: Maze, style: str, cell: int = 64, **meta: Any) -> Trajectory:
        """The example of one map.

        Raises:
            MirageError: no safe path leads to the gift.
        """
        path = shortest_path(maze)
        if path is None:
            raise MirageError("map: no safe path leads from S to G")
        moves = moves_of(path)
        answer = ",".join(moves)
        helper = Image(partial(draw_maze, maze, cell, path=path))
        waves = "; ".join(" ".join(map(cell_name, wave)) for wave in search_waves(maze))
        before = (
            f"The elf is at {cell_name(maze.start)} and the gift is at {cell_name(maze.goal)}. "
            f"Distance from the gift: {waves}."
        )
        after = f" Path: {narrate(path, moves)}."
        way = _Way(maze, path[1:], cell)
        return Trajectory(
            messages=(
                *self.prompt(Image(partial(draw_maze, maze, cell)), style, helper=helper),
                assistant_turn(*self._response(helper, way, style, before, after, answer)),
            ),
            task=self.name,
            answer=answer,
            meta={"map": list(maze.rows), "level": maze.size, "style": style, **meta},
        )

    @staticmethod
    def _response(helper: Image, way: _Way, style: str, before: str, after: str, answer: str) -> tuple[Segment, ...]:
        if style not in WAVES:
            return _response(helper, way, style, before, after, answer)
        box = Text(rf"\boxed{{{answer}}}")
        waves = distance_waves(way.maze)
        if style == "wave-words":
            return (Text(f"<think> {'; '.join(' '.join(map(cell_name, wave)) for wave in waves)}</think>{box.text}"),)
        regions = tuple(tuple(x for cell in wave for x in box_of(cell, way.maze.size)) for wave in waves)
        return LatentSpan(Image(partial(draw_maze, way.maze, way.size)), regions=regions), box

    def score(self, trajectory: Trajectory) -> Score:
        """Right is what the paper counts as success: no hole entered, and the last cell is the gift's."""
        maze = map_of(trajectory.meta)
        content = boxed(trajectory.text)
        moves = parse_moves(content) if content is not None else None
        if moves is None:
            return Score(False, False, False, _unreadable(content, "a plan"))
        walk = simulate(maze, moves)
        end = cell_name(walk.cells[-1])
        if walk.outcome == "hole":
            return Score(False, True, False, f"falls into the hole at {end} with move {walk.executed}")
        if walk.outcome == "safe":
            return Score(False, True, False, f"ends at {end}, but the gift is at {cell_name(maze.goal)}")
        fewest = len(shortest_path(maze) or walk.cells) - 1
        optimal = len(moves) == fewest
        remark = "fewest" if optimal else f"{fewest} would do"
        return Score(True, True, optimal, f"reaches the gift in {count(len(moves), 'move')} ({remark})")

    def faults(self, trajectory: Trajectory) -> Iterator[Fault]:
        return map_faults(trajectory.meta)


class Reasoning(Task):
    """`vsp-reasoning`: where does a given plan end? The helper image has the elf half-way along it."""

    name = "vsp-reasoning"
    mazes = True
    needs = ("plan",)
    styles = STYLES

    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        self.check_style(style)
        maze, plan = draw_plan(level, rng)
        return self.example(maze, plan, style, cell)

    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        """The prompt; it needs the detail `plan`, moves in any spelling that `parse_moves` reads.

        With the style `shown` it also needs `helper`, a picture.
        """
        self.check_style(style)
        plan = parse_moves(str(details.get("plan", "")))
        if plan is None:
            raise MirageError(f"{self.name} needs a plan, such as plan=LUUR; got {details.get('plan')!r}")
        question = REASONING_QUESTION.format(plan=",".join(plan))
        return (user_turn(image, *shown(style, details), question + (STEP_BY_STEP if style == "cot" else "")),)

    def example(self, maze: Maze, plan: str, style: str, cell: int = 64, **meta: Any) -> Trajectory:
        """The example of one map and one plan (`LUUR`)."""
        walk = simulate(maze, plan)
        half_way = walk.cells[(walk.executed + 1) // 2]
        answer = _LETTER_OF[walk.outcome]
        helper = Image(partial(draw_maze, maze, cell, elf=half_way))
        before = f"The elf is at {cell_name(maze.start)}."
        after = f" Walk: {narrate(walk.cells, plan)} {_LAST_WORD[walk.outcome]}."
        way = _Way(maze, walk.cells[1:], cell)
        return Trajectory(
            messages=(
                *self.prompt(Image(partial(draw_maze, maze, cell)), style, plan=plan, helper=helper),
                assistant_turn(*_response(helper, way, style, before, after, answer)),
            ),
            task=self.name,
            answer=answer,
            meta={"map": list(maze.rows), "level": maze.size, "style": style, "plan": plan, **meta},
        )

    def faults(self, trajectory: Trajectory) -> Iterator[Fault]:
        yield from map_faults(trajectory.meta)
        plan = trajectory.meta.get("plan")
        if plan is None:
            yield Fault("meta.plan", "is missing; the answer is checked by walking it")
        elif parse_moves(str(plan)) is None:
            yield Fault("meta.plan", f"must be made of the moves L, R, U, D, not {plan!r:.60}")

    def meaning(self, answer: str) -> str | None:
        letter = _parse_option(answer)
        return None if letter is None else _OPTION_WORDS[letter]

    def score(self, trajectory: Trajectory) -> Score:
        """Compared with the simulator's verdict on `meta`'s map and plan, never with `answer`."""
        maze = map_of(trajectory.meta)
        plan = parse_moves(str(trajectory.meta.get("plan", "")))
        if plan is None:
            raise MirageError('cannot score: the example has no "plan" in its meta')
        walk = simulate(maze, plan)
        truth = f"the plan ends {_OPTION_WORDS[_LETTER_OF[walk.outcome]]}, at {cell_name(walk.cells[-1])}"
        content = boxed(trajectory.text)
        letter = _parse_option(content) if content is not None else None
        if letter is None:
            return Score(False, False, None, _unreadable(content, "A, B or C"))
        correct = OPTIONS[letter] == walk.outcome
        return Score(correct, True, None, f"{letter} is {'right' if correct else 'wrong'}: {truth}")


def parse_moves(text: str) -> str | None:
    """`LUUR` from `L,U,U,R`, `l u u r`, `LUUR` or `left, up up right`; None for anything else or nothing."""
    text = text.strip()
    return "".join(word[0].upper() for word in _MOVE.findall(text)) if _PLAN.fullmatch(text) else None


def from_record(record: Mapping[str, Any], style: str = "direct", cell: int = 64) -> Trajectory:
    """The example that a plain benchmark record describes.

    `{level, id, map}` is a planning map; `{steps, id, map, plan, safe}` a reasoning question.

    Raises:
        MirageError: a field is missing or wrong, which the message names.
    """
    if not isinstance(record, Mapping):
        raise MirageError("a record must be an object with a map")
    rows = _field(record, "map", list)
    try:
        maze = Maze.from_rows(rows)
    except MirageError as fault:
        raise MirageError(f"map: {fault}") from fault
    known = {"id": record["id"]} if "id" in record else {}
    if "plan" not in record:
        level = _field(record, "level", int)
        if level != maze.size:
            raise MirageError(f"level: it says {level}, but the map has a side of {maze.size}")
        return PLANNING.example(maze, style, cell, **known)
    plan = parse_moves(_field(record, "plan", str))
    if plan is None:
        raise MirageError(f"plan: {record['plan']!r} is not made of the moves L, R, U, D")
    steps = _field(record, "steps", int)
    if steps != len(plan):
        raise MirageError(f"steps: it says {steps}, but the plan has {count(len(plan), 'move')}")
    safe = _field(record, "safe", bool)
    if safe != ((outcome := simulate(maze, plan).outcome) != "hole"):
        raise MirageError(f"safe: it says {str(safe).lower()}, but the plan's outcome is {outcome!r}")
    return REASONING.example(maze, plan, style, cell, **known, steps=steps)


@dataclass(frozen=True)
class _Way:
    """The cells that are entered one after the other, as the content of a thought.

    Attributes:
        cells: without the start.
        size: pixels per side of a cell.
    """

    maze: Maze
    cells: tuple[Cell, ...]
    size: int

    @property
    def regions(self) -> tuple[Box, ...]:
        """Where each cell lies in a picture of the maze."""
        return tuple(box_of(cell, self.maze.size) for cell in self.cells)

    def in_one_span(self) -> tuple[Segment, ...]:
        """A latent for each cell, out of one picture with the way drawn."""
        if not self.cells:
            return ()
        whole = (self.maze.start, *self.cells)
        return (LatentSpan(Image(partial(draw_maze, self.maze, self.size, path=whole)), regions=self.regions),)

    def step_by_step(self) -> tuple[Segment, ...]:
        """A span of one latent for each step, with a picture of its own: the elf stands on that cell."""
        pictures = (Image(partial(draw_maze, self.maze, self.size, elf=cell)) for cell in self.cells)
        return tuple(LatentSpan(p, regions=(box,)) for p, box in zip(pictures, self.regions, strict=True))

    def in_words(self) -> str:
        return "".join(f" {cell_name(cell)}" for cell in self.cells)


def _response(helper: Image, way: _Way, style: str, before: str, after: str, answer: str) -> tuple[Segment, ...]:
    """The response in a style; docs/data.md shows one of each."""
    box = rf"\boxed{{{answer}}}"
    if style == "cot":
        return Text(f"<think>{before}"), LatentSpan(helper), Text(f"{after}</think>{box}")
    if style == "direct":
        return LatentSpan(helper), Text(box)
    if style == "cells":
        return *way.in_one_span(), Text(box)
    if style == "steps":
        return *way.step_by_step(), Text(box)
    if style == "words":
        return (Text(f"<think>{way.in_words()}</think>{box}"),)
    return (Text(box),)  # plain, shown


def _parse_option(content: str) -> str | None:
    """The letter of an answer: `B`, `b`, `(B)`, `B.`, `B: in a hole`; None for anything else."""
    content = content.strip().rstrip(".").casefold()
    for letter, words in _OPTION_WORDS.items():
        if content in {letter.casefold(), f"({letter})".casefold(), f"{letter}: {words}".casefold()}:
            return letter
    return None


def _unreadable(content: str | None, wanted: str) -> str:
    return r"no answer in \boxed{}" if content is None else rf"\boxed{{{content[:40]}}} is not {wanted}"


def _field(record: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in record:
        raise MirageError(f"{name}: missing")
    value = record[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {list: "a list of strings", int: "a whole number", str: "a string", bool: "true or false"}
        raise MirageError(f"{name}: must be {words[kind]}, not {value!r}")
    return value


PLANNING = Planning()
REASONING = Reasoning()

"""`vsp-perception`: base skills for training only: read the map, read a red path, say what is where.

A base model that has learnt these can see, but nothing here teaches it to plan: no path it reads leads from
the start to the gift.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import Fault
from mirage_vlm.tasks.base import Score, Task
from mirage_vlm.tasks.frozenlake import Cell, Maze, box_of, cell_name, generate_maze, moves_of, narrate, parse_cell
from mirage_vlm.tasks.render import draw_maze
from mirage_vlm.trajectory import Image, LatentSpan, Message, Trajectory, assistant_turn, user_turn

KINDS = {"map": 0.4, "path": 0.35, "place": 0.25}
MAX_STEPS = 9

_QUESTIONS = {
    "map": "Write down the map row by row.",
    "path": "Which way does the red path go?",
    "glimpse": "Which cells do you have in mind?",
    "look": "Look at the elf, the gift and the holes.",
    "follow": "Follow the red path.",
    "place": "Where is the elf, the gift and what is there at {cell}?",
}
_NAMES = {"S": "start", "F": "ice", "H": "hole", "G": "gift"}


class Perception(Task):
    """Three kinds of question, drawn at random and named in `meta["kind"]`; answers are plain text, no spans.

    - `map`: letters of the map, `S F F / F H F / F F G`;
    - `path`: the red path in words, `r3c2 up r2c2 right r2c3`, a random walk that enters no cell twice;
    - `place`: the elf's cell (any cell, holes too), the gift's, and what one more cell is.

    The style `glimpse` has a fourth kind: the response opens with a span that holds single cells of the picture, as its
    vision tower sees them, and says which they were and what lies there. It is for stage 1, and makes a base whose
    picture features tell where in the picture they are, and that can read them in the place of latents.

    The style `look` asks for such latents: `look` for the elf, the gift and the holes (row by row), `follow` for the
    cells of a drawn path; the response is a span with a latent for each, then the words for them. It makes a base
    that can choose what a latent is of, as it can choose its words.

    Beside the answer, the picture has a `reading`: each cell's name or, by chance, its letter. It takes a decoder many
    examples to find out where in the picture a patch stands; to be told in place makes it quick.
    """

    name = "vsp-perception"
    mazes = True
    styles = ("direct", "glimpse", "look")
    mixture = ("direct",)

    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        self.check_style(style)
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if style != "direct":
            kind = "glimpse" if style == "glimpse" else rng.choice(("look", "follow"))
        maze = generate_maze(level, rng)
        draw, asked = partial(draw_maze, maze, cell), ""
        thought: tuple[LatentSpan, ...] = ()
        if style != "direct":
            cells = rng.choices(list(maze.cells()), k=rng.randint(1, MAX_STEPS))
            path = _random_path(maze, rng) if kind == "follow" or (kind == "glimpse" and rng.random() < 0.5) else None
            helper = partial(draw, path=path)
            if kind == "look":
                cells = [maze.start, maze.goal, *sorted(maze.holes)]
            elif kind == "follow":
                assert path is not None
                draw, cells = helper, list(path)
            thought = (LatentSpan(Image(helper), regions=tuple(box_of(c, level) for c in cells)),)
            answer = " ".join(f"{cell_name(c)} {_NAMES[maze[c]]}" for c in cells)
        elif kind == "map":
            answer = " / ".join(" ".join(row) for row in maze.rows)
        elif kind == "path":
            path = _random_path(maze, rng)
            draw, answer = partial(draw, path=path), narrate(path, moves_of(path))
        else:
            elf, place = rng.choices(list(maze.cells()), k=2)
            draw, asked = partial(draw, elf=elf), cell_name(place)
            answer = f"elf {cell_name(elf)}, gift {cell_name(maze.goal)}, {asked} {_NAMES[maze[place]]}"
        name_cells = rng.random() < 0.5
        reading = tuple(f" {cell_name(cell) if name_cells else maze[cell]}" for cell in maze.cells())
        return Trajectory(
            messages=(
                *self.prompt(Image(draw, reading), style, kind=kind, cell=asked),
                assistant_turn(*thought, answer),
            ),
            task=self.name,
            answer=answer,
            meta={"map": list(maze.rows), "level": level, "style": style, "kind": kind},
        )

    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        """The prompt; `kind` is `map` (default), `path`, `glimpse`, `look`, `follow` or, with a `cell`, `place`."""
        self.check_style(style)
        kind = str(details.get("kind", "map"))
        if kind not in _QUESTIONS:
            raise MirageError(f"{self.name} has no kind {kind!r}; choose from {', '.join(_QUESTIONS)}")
        asked = str(details.get("cell", ""))
        if kind == "place":
            parse_cell(asked)
        return (user_turn(image, _QUESTIONS[kind].format(cell=asked)),)

    def faults(self, trajectory: Trajectory) -> Iterator[Fault]:
        if trajectory.answer is None:
            yield Fault("answer", "is missing; the response is compared with it")

    def score(self, trajectory: Trajectory) -> Score:
        """Right is the reference answer letter for letter."""
        if trajectory.answer is None:
            raise MirageError('cannot score: the example has no "answer"')
        text = trajectory.text.strip()
        correct = text in trajectory.answers
        verdict = "as in the picture" if correct else f"should be {' or '.join(trajectory.answers)}"
        return Score(correct, bool(text), None, verdict)


def _random_path(maze: Maze, rng: random.Random) -> tuple[Cell, ...]:
    """A walk of 1 to 9 steps that enters no hole, no cell twice, and never leads from start to gift."""
    while True:
        path = [rng.choice([cell for cell in maze.cells() if cell not in maze.holes])]
        steps = rng.randint(1, MAX_STEPS)
        while len(path) <= steps:
            nearby = {maze.step(path[-1], move) for move in "UDLR"} - maze.holes - set(path)
            if not nearby:
                break
            path.append(rng.choice(sorted(nearby)))
        if len(path) > 1 and (path[0], path[-1]) != (maze.start, maze.goal):
            return tuple(path)


PERCEPTION = Perception()

"""`geometry-seen`, `jigsaw-seen`, `sat-seen`: the examples of those tasks, and beside the answer what there is to see.

For training a model that is yet to see: the prompt's pictures bear a `reading`, a word for each merged patch, which the
decoder learns to say at the patch itself. A base that is told so much in place takes far fewer examples to see.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image

from mirage_vlm.tasks.base import Score, Split, Task
from mirage_vlm.tasks.figures import KINDS
from mirage_vlm.tasks.frozenlake import cell_name
from mirage_vlm.tasks.geometry import GEOMETRY
from mirage_vlm.tasks.jigsaw import JIGSAW
from mirage_vlm.tasks.rooms import Pose, Scene, after, later, outline
from mirage_vlm.tasks.sat import PIXELS, SAT
from mirage_vlm.trajectory import Image, Message, Trajectory

Rows = list[list[str]]
Reader = Callable[[Trajectory, random.Random], list[Rows]]  # a word for each patch of each picture of the prompt

NAMED = 0.2  # of the examples: patches are called by their place, r1c2
LEAST = 0.06  # of a patch: what is smaller is not named
GRAIN = 16  # pixels a side of a patch that a thing is looked for in
PALETTE = {
    "red": (200, 50, 45),
    "orange": (230, 140, 40),
    "yellow": (225, 215, 70),
    "lime": (160, 200, 70),
    "green": (60, 145, 70),
    "cyan": (80, 180, 185),
    "blue": (70, 100, 200),
    "purple": (140, 70, 190),
    "pink": (220, 120, 190),
    "brown": (125, 90, 65),
    "black": (25, 25, 25),
    "grey": (128, 128, 128),
    "white": (235, 235, 235),
}


class Seen(Task):
    """Another task's examples with a `reading` on each picture of the prompt; for training only.

    Args:
        task: which; its prompts, its checker, its split.
        read: the words for an example's pictures.
    """

    styles = ("direct", "cot", "words", "plain")

    def __init__(self, task: Task, read: Reader):
        self.task, self.read = task, read
        self.name, self.sizes, self.usual = f"{task.name}-seen", task.sizes, task.usual

    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        self.check_style(style)
        return self._told(self.task.make(rng, level, style, cell), rng)

    def make_in(
        self, split: Split, rng: random.Random, level: int, style: str = "direct", cell: int = 64
    ) -> Trajectory:
        self.check_style(style)
        return self._told(self.task.make_in(split, rng, level, style, cell), rng)

    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        self.check_style(style)
        return self.task.prompt(image, style, **details)

    def key(self, trajectory: Trajectory) -> str:
        return self.task.key(trajectory)

    def score(self, trajectory: Trajectory) -> Score:
        return self.task.score(trajectory)

    def _told(self, example: Trajectory, rng: random.Random) -> Trajectory:
        pictures = self.read(example, rng)
        if rng.random() < NAMED:
            pictures = [
                [[cell_name((r, c)) for c in range(len(row))] for r, row in enumerate(rows)] for rows in pictures
            ]
        readings = iter([tuple(f" {word}" for row in rows for word in row) for rows in pictures])
        messages = tuple(
            replace(
                message,
                segments=tuple(
                    replace(segment, reading=next(readings)) if isinstance(segment, Image) else segment
                    for segment in message.segments
                ),
            )
            for message in example.messages
        )
        return replace(example, messages=messages)


def read_figure(example: Trajectory, rng: random.Random) -> list[Rows]:
    """What each cell of a figure shows, see `figures.Kind.cells`."""
    return [KINDS[example.meta["kind"]].cells(example.meta["figure"])]


def read_colours(example: Trajectory, rng: random.Random) -> list[Rows]:
    """The mean colour of each patch, by the nearest of `PALETTE`."""
    return [_colours(image.load(), count) for image, count in zip(example.images(), (4, 2, 2), strict=True)]


def _colours(picture: PIL.Image.Image, count: int) -> Rows:
    small = np.asarray(picture.convert("RGB").resize((count, count), PIL.Image.Resampling.BOX), np.int64)
    names, tones = list(PALETTE), np.array(list(PALETTE.values()))  # [13, 3]
    gaps = ((small[:, :, None] - tones) ** 2).sum(axis=-1)  # [count, count, 13]
    return [[names[i] for i in row] for row in gaps.argmin(axis=-1)]


def read_things(example: Trajectory, rng: random.Random) -> list[Rows]:
    """The thing that most of each patch shows, by colour or, in half of the examples, by shape."""
    scene: Scene = example.meta["scene"]
    word = rng.choice(("colour", "shape"))
    names = ["none", *(thing[word] for thing in scene["things"])]
    views = [(scene, Pose(*scene["camera"]))]
    if "then" in scene:
        views.append((after(scene), later(scene)))
    return [_things(outline(shown, pose, PIXELS * GRAIN).ids, names) for shown, pose in views]


def _things(ids: np.ndarray[Any, Any], names: Sequence[str]) -> Rows:
    patches = ids.reshape(PIXELS, GRAIN, PIXELS, GRAIN).swapaxes(1, 2).reshape(PIXELS, PIXELS, -1)
    counts = np.stack([(patches == number).sum(axis=-1) for number in range(len(names))])  # [1 + things, 4, 4]
    counts[0] = LEAST * GRAIN**2
    return [[names[i] for i in row] for row in counts.argmax(axis=0)]


SEEN = tuple(Seen(task, read) for task, read in ((GEOMETRY, read_figure), (JIGSAW, read_colours), (SAT, read_things)))

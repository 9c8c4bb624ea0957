"""`geometry-seen`, `jigsaw-seen`, `sat-seen`: the examples of those tasks, and beside the answer what there is to see.

For training a model that is yet to see: the prompt's pictures bear a `reading`, a word for each merged patch, which the
decoder learns to say at the patch itself. A base that is told so much in place takes far fewer examples to see. In the
styles `words` and `cot` a thought begins with what of it the question is about: where the things are, what meets the
edges; and of two choices it says both again, beside the word that was found, before it names the letter.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image

from mirage_vlm.tasks.base import Score, Split, Task
from mirage_vlm.tasks.figures import KINDS as FIGURES
from mirage_vlm.tasks.frozenlake import cell_name
from mirage_vlm.tasks.geometry import GEOMETRY
from mirage_vlm.tasks.jigsaw import JIGSAW
from mirage_vlm.tasks.rooms import Pose, Scene, after, later, name_of, outline
from mirage_vlm.tasks.sat import LETTERS, PIXELS, SAT
from mirage_vlm.tasks.spatial import KINDS
from mirage_vlm.trajectory import Image, Message, Segment, Text, Trajectory

Rows = list[list[str]]
Reader = Callable[[Trajectory, random.Random], list[Rows]]  # a word for each patch of each picture of the prompt
Noter = Callable[[Trajectory, str], str]  # what a thought of that style begins with, or says before its answer

WORDS, COT = "words", "cot"
THINK, ANSWER = "<think>", " It is "

NAMED = 0.2  # of the examples: patches are called by their place, r1c2
LEAST = 0.06  # of a patch: what is smaller is not named
GRAIN = 16  # pixels a side of a patch that a thing is looked for in
STEPS = 16  # of a picture's side, in which places are told
SEAM = 8  # pixels along a cut that a colour is told of, and their depth
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
        note: what a thought begins with; None: as the task has it.
        close: what it says before its answer; None: as the task has it.
    """

    styles = ("direct", COT, WORDS, "plain")

    def __init__(self, task: Task, read: Reader, note: Noter | None = None, close: Noter | None = None):
        self.task, self.read, self.note, self.close = task, read, note, close
        self.name, self.sizes, self.usual = f"{task.name}-seen", task.sizes, task.usual
        self.needs = task.needs

    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        self.check_style(style)
        return self._told(self.task.make(rng, level, style, cell), rng, style)

    def make_in(
        self, split: Split, rng: random.Random, level: int, style: str = "direct", cell: int = 64
    ) -> Trajectory:
        self.check_style(style)
        return self._told(self.task.make_in(split, rng, level, style, cell), rng, style)

    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        self.check_style(style)
        return self.task.prompt(image, style, **details)

    def meaning(self, answer: str) -> str | None:
        return self.task.meaning(answer)

    def key(self, trajectory: Trajectory) -> str:
        return self.task.key(trajectory)

    def score(self, trajectory: Trajectory) -> Score:
        return self.task.score(trajectory)

    def _told(self, example: Trajectory, rng: random.Random, style: str) -> Trajectory:
        thinks = style in (WORDS, COT)
        note = f"{THINK}{self.note(example, style)} " if thinks and self.note else THINK
        close = f" {self.close(example, style)}{ANSWER}" if thinks and self.close else ANSWER
        pictures = self.read(example, rng)
        if rng.random() < NAMED:
            pictures = [
                [[cell_name((r, c)) for c in range(len(row))] for r, row in enumerate(rows)] for rows in pictures
            ]
        readings = iter([tuple(f" {word}" for row in rows for word in row) for rows in pictures])

        def told(segment: Segment) -> Segment:
            if isinstance(segment, Image):
                return replace(segment, reading=next(readings))
            if isinstance(segment, Text) and segment in example.response:
                return replace(segment, text=segment.text.replace(THINK, note).replace(ANSWER, close))
            return segment

        messages = tuple(replace(message, segments=tuple(map(told, message.segments))) for message in example.messages)
        return replace(example, messages=messages)


def read_figure(example: Trajectory, rng: random.Random) -> list[Rows]:
    """What each cell of a figure shows, see `figures.Kind.cells`."""
    return [FIGURES[example.meta["kind"]].cells(example.meta["figure"])]


def read_colours(example: Trajectory, rng: random.Random) -> list[Rows]:
    """The mean colour of each patch, by the nearest of `PALETTE`."""
    return [_colours(image.load(), count) for image, count in zip(example.images(), (4, 2, 2), strict=True)]


def note_seams(example: Trajectory, style: str) -> str:
    """What meets at the hole's two edges, four times above and four times to the left: the photo's colour, those of the
    two candidates and which of them is the same; then how often each was.
    """
    hole, *pieces = (
        _pixels(image.load(), 2 * SEAM * count) for image, count in zip(example.images(), (4, 2, 2), strict=True)
    )
    middle = len(hole) // 2
    around = [hole[middle - SEAM : middle, middle:], hole[middle:, middle - SEAM : middle].swapaxes(0, 1)]
    edges = [around, *([piece[:SEAM], piece[:, :SEAM].swapaxes(0, 1)] for piece in pieces)]
    return compare(*([name for strip in strips for name in _along(strip)] for strips in edges))


def compare(photo: Sequence[str], second: Sequence[str], third: Sequence[str]) -> str:
    """Names of colours that meet, and which candidate has the photo's."""
    met = (_beside(*words) for words in zip(photo, second, third, strict=True))
    counts = [sum(map(operator.eq, photo, piece)) for piece in (second, third)]
    return f"Edges: {', '.join(met)}. Second {counts[0]}, third {counts[1]}."


def _beside(found: str, second: str, third: str) -> str:
    """A word, two others, and which of them is the same."""
    says = {(True, True): "both", (True, False): "second", (False, True): "third", (False, False): "none"}
    return f"{found} {second} {third} {says[found == second, found == third]}"


def _along(strip: np.ndarray[Any, Any]) -> list[str]:
    """[SEAM, n · SEAM, 3] → n names of colours."""
    return _named(strip.reshape(SEAM, -1, SEAM, 3).mean(axis=(0, 2)))


def _pixels(picture: PIL.Image.Image, side: int) -> np.ndarray[Any, Any]:
    return np.asarray(picture.resize((side, side), PIL.Image.Resampling.BOX), np.int64)


def _named(colours: np.ndarray[Any, Any]) -> list[str]:
    """[n, 3] → the nearest names."""
    names, tones = list(PALETTE), np.array(list(PALETTE.values()))  # [13, 3]
    return [names[i] for i in ((colours[:, None] - tones) ** 2).sum(axis=-1).argmin(axis=-1)]


def _colours(picture: PIL.Image.Image, count: int) -> Rows:
    return [_named(row) for row in _pixels(picture, count)]


def read_things(example: Trajectory, rng: random.Random) -> list[Rows]:
    """The thing that most of each patch shows, by colour or, in half of the examples, by shape."""
    scene: Scene = example.meta["scene"]
    word = rng.choice(("colour", "shape"))
    names = ["none", *(thing[word] for thing in scene["things"])]
    return [_things(ids, names) for ids in _outlines(scene)]


def note_places(example: Trajectory, style: str) -> str:
    """Where the middle of each thing is, across and down, in sixteenths of the picture's side.

    Of two pictures the places in both, and which way the thing went between them; of one, where no latents take the
    place of those words, also the places of what the question is about in the view that one would like to see.
    """
    scene: Scene = example.meta["scene"]
    kind = KINDS[example.meta["kind"]]
    now, *rest = (_middles(ids, len(scene["things"])) for ids in _outlines(scene))
    if rest:
        both = [i for i in now if i in rest[0]]
        told = [f"{name_of(scene, i)} {_at(now[i])} {_at(rest[0][i])} {_way(now[i], rest[0][i])}" for i in both]
        return f"Places: {', '.join(told)}."
    seen = f"Places: {', '.join(f'{name_of(scene, i)} {_at(now[i])}' for i in now)}."
    if style == COT:
        return seen
    there = outline(scene, kind.goal(scene), PIXELS * GRAIN, kind.without).ids
    then = _middles(there, kind.asked)
    found = (f"{name_of(scene, i)} {_at(then[i]) if i in then else 'none'}" for i in range(kind.asked))
    return f"{seen} Then: {', '.join(found)}."


def close_choices(example: Trajectory, style: str) -> str:
    """The word that was found, that of each choice (the first in which they differ), and which of them it is.

    As along the edges of a jigsaw: which one is the same is learnt soonest of words that stand side by side.
    """
    choices = [words.split() for words in example.meta["scene"]["choices"]]
    both = next(pair for pair in zip(*choices, strict=False) if pair[0] != pair[1])
    return f"Which: {_beside(both[LETTERS.index(str(example.answer))], *both)}."


def _middles(ids: np.ndarray[Any, Any], count: int) -> dict[int, tuple[int, int]]:
    """Across and down, of each of the first `count` things that can be seen."""
    found = {}
    for i in range(count):
        down, across = (ids == i + 1).nonzero()
        if len(across) >= LEAST * GRAIN**2:
            x, y = (int(STEPS * (where.mean() + 0.5) / len(ids)) for where in (across, down))
            found[i] = (x, y)
    return found


def _at(place: tuple[int, int]) -> str:
    return f"{place[0]} {place[1]}"


def _way(before: tuple[int, int], now: tuple[int, int]) -> str:
    """Across and down the picture; what is lower in it is nearer."""
    ways = (("left", "none", "right"), ("away", "none", "nearer"))
    return " ".join(words[1 + (b > a) - (b < a)] for words, a, b in zip(ways, before, now, strict=True))


def _outlines(scene: Scene) -> list[np.ndarray[Any, Any]]:
    views = [(scene, Pose(*scene["camera"]))]
    if "then" in scene:
        views.append((after(scene), later(scene)))
    return [outline(shown, pose, PIXELS * GRAIN).ids for shown, pose in views]


def _things(ids: np.ndarray[Any, Any], names: Sequence[str]) -> Rows:
    patches = ids.reshape(PIXELS, GRAIN, PIXELS, GRAIN).swapaxes(1, 2).reshape(PIXELS, PIXELS, -1)
    counts = np.stack([(patches == number).sum(axis=-1) for number in range(len(names))])  # [1 + things, 4, 4]
    counts[0] = LEAST * GRAIN**2
    return [[names[i] for i in row] for row in counts.argmax(axis=0)]


SEEN = (
    Seen(GEOMETRY, read_figure),
    Seen(JIGSAW, read_colours, note_seams),
    Seen(SAT, read_things, note_places, close_choices),
)

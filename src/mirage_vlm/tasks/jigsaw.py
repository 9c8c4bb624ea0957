r"""`jigsaw`: a photo without its lower right corner, and two pieces of which one fits, after BLINK (arXiv 2404.12390).

The helper image is the photo with the piece that fits put in. `jigsaw` cuts up scenes that are drawn here,
`jigsaw-photos` those of scikit-image and scikit-learn, `jigsaw-folder` those of the folder that MIRAGE_PHOTOS names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import PIL.Image

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.base import STEP_BY_STEP, Score, Split, Task, respond, shown
from mirage_vlm.tasks.choices import score_letter
from mirage_vlm.tasks.photos import BuiltIn, Folder, Photos, Scenes
from mirage_vlm.trajectory import Image, Message, Trajectory, assistant_turn, user_turn

Part = Literal["asked", "A", "B", "helper"]

PARTS: tuple[Part, ...] = ("asked", "A", "B", "helper")
CHOICES = {"A": "the second image", "B": "the third image"}
QUESTION = (
    "The lower right corner of the first image is missing. Which image is the missing part, the second or the third? "
    "Compare what they show and how their edges go on.\n"
    f"{chr(10).join(f'({letter}) {text}' for letter, text in CHOICES.items())}\n"
    r"Answer with the letter in \boxed{}."
)
DISTRACTORS = ("other photo", "other place", "turned", "shifted", "coloured")  # of the levels 1, 2, …
TURNS = {
    "mirrored left to right": PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    "mirrored top to bottom": PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    "turned by a quarter to the right": PIL.Image.Transpose.ROTATE_270,
    "turned by a half": PIL.Image.Transpose.ROTATE_180,
    "turned by a quarter to the left": PIL.Image.Transpose.ROTATE_90,
}
COLOURS = {  # percent of red, green and blue
    "too light": (125, 125, 125),
    "too dark": (78, 78, 78),
    "too red": (122, 92, 92),
    "too green": (92, 118, 92),
    "too blue": (92, 92, 125),
}
GLANCE = 16  # pixels a side at which two pieces are compared: those of the smallest cell, so it holds for all
APART = 8  # of 255: how far they must differ on the mean, as a whole and along the two edges that meet the photo
TRIES = 300


@dataclass(frozen=True)
class Piece:
    """A square cut out of a photo.

    Attributes:
        photo: its name.
        x, y, side: the place in the photo's pixels.
        change: what was done to it afterwards: one of `TURNS` or `COLOURS`, or nothing.
    """

    photo: str
    x: int
    y: int
    side: int
    change: str = ""

    def draw(self, photos: Photos, size: int) -> PIL.Image.Image:
        """The piece, `size` pixels a side."""
        place = (self.x, self.y, self.x + self.side, self.y + self.side)
        cut = photos.open(self.photo).resize((size, size), PIL.Image.Resampling.BICUBIC, box=place)
        if self.change in TURNS:
            return cut.transpose(TURNS[self.change])
        if self.change in COLOURS:
            return cut.point([min(255, value * gain // 100) for gain in COLOURS[self.change] for value in range(256)])
        return cut

    def overlap(self, other: Piece) -> int:
        """Pixels of a photo that both show."""
        wide = min(self.x + self.side, other.x + other.side) - max(self.x, other.x)
        tall = min(self.y + self.side, other.y + other.side) - max(self.y, other.y)
        return max(0, wide) * max(0, tall) if self.photo == other.photo else 0

    def corner(self) -> Piece:
        """Its lower right quarter."""
        half = self.side // 2
        return Piece(self.photo, self.x + half, self.y + half, half)


@dataclass(frozen=True)
class Puzzle:
    """A photo, or rather a square of it, and the two candidates for its lower right quarter."""

    whole: Piece
    candidates: Mapping[str, Piece]  # A, B

    def answer(self) -> str:
        """The letter of the candidate that was cut out of the hole.

        Raises:
            ValueError: neither was, or both were.
        """
        fitting = [letter for letter, piece in self.candidates.items() if piece == self.whole.corner()]
        if len(fitting) != 1 or set(self.candidates) != set(CHOICES):
            raise ValueError(f"of the candidates {', '.join(self.candidates)}, {len(fitting)} fit")
        return fitting[0]

    def draw(self, photos: Photos, cell: int, part: Part) -> PIL.Image.Image:
        """One of the pictures: the photo with its hole, a candidate, or the helper image.

        Args:
            cell: a quarter of the photo's side, in pixels; a candidate has two cells a side.
        """
        if part in self.candidates:
            return self.candidates[part].draw(photos, 2 * cell)
        picture = self.whole.draw(photos, 4 * cell)
        filling = self.candidates[self.answer()].draw(photos, 2 * cell) if part == "helper" else "black"
        picture.paste(filling, (2 * cell, 2 * cell, 4 * cell, 4 * cell))
        return picture


class Jigsaw(Task):
    """The task with photos of any source; levels are the kinds of wrong candidate, `DISTRACTORS`.

    Args:
        name: under which the task is found; for one's own `module:NAME`.
        photos: where they come from.
    """

    styles = ("direct", "cot", "words", "plain", "shown")
    needs = ("candidates",)
    sizes = range(1, len(DISTRACTORS) + 1)
    usual = tuple(sizes)

    def __init__(self, name: str, photos: Photos):
        self.name, self.photos = name, photos

    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        return self._made(partial(self.photos.pick, rng), rng, level, style, cell)

    def make_in(
        self, split: Split, rng: random.Random, level: int, style: str = "direct", cell: int = 64
    ) -> Trajectory:
        return self._made(partial(self.photos.pick_of, split, rng), rng, level, style, cell)

    def _made(self, pick: Callable[[], str], rng: random.Random, level: int, style: str, cell: int) -> Trajectory:
        self.check_style(style)
        for _ in range(TRIES):
            whole = self._square(rng, pick())
            wrong = self._wrong(rng, level, whole)
            if wrong is not None and differ(self.photos, wrong, whole.corner()):
                pieces = [whole.corner(), wrong]
                rng.shuffle(pieces)
                puzzle = Puzzle(whole, dict(zip(CHOICES, pieces, strict=True)))
                return self.example(puzzle, style, cell, level=level, distractor=DISTRACTORS[level - 1])
        raise MirageError(f"{self.name}: in {TRIES} tries no piece differed from a wrong one; the photos are too even")

    def example(self, puzzle: Puzzle, style: str, cell: int = 64, **meta: Any) -> Trajectory:
        """The example of one puzzle."""
        asked, *candidates, helper = (Image(partial(puzzle.draw, self.photos, cell, part)) for part in PARTS)
        before, after = _thought(puzzle)
        return Trajectory(
            messages=(
                *self.prompt(asked, style, candidates=candidates, helper=helper),
                assistant_turn(*respond(style, before, helper, after, puzzle.answer())),
            ),
            task=self.name,
            answer=puzzle.answer(),
            meta={"source": self.photos.label, **asdict(puzzle), "style": style, **meta},
        )

    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        """The prompt; it needs the detail `candidates`, two pictures, and with the style `shown` also `helper`."""
        self.check_style(style)
        candidates = tuple(details.get("candidates", ()))
        if len(candidates) != 2 or not all(isinstance(candidate, Image) for candidate in candidates):
            raise MirageError(f"{self.name} needs two candidates, which are pictures")
        question = QUESTION + (STEP_BY_STEP if style in ("cot", "words") else "")
        return (user_turn(image, *candidates, *shown(style, details), question),)

    def meaning(self, answer: str) -> str | None:
        return CHOICES.get(answer)

    def key(self, trajectory: Trajectory) -> str:
        """The photo: all that is cut out of it stays on one side; so does the other photo of level 1."""
        return self.photos.key(self.puzzle(trajectory).whole.photo)

    def score(self, trajectory: Trajectory) -> Score:
        """Compared with the candidate that, by `meta`, was cut out of the hole, never with `answer`."""
        truth = self.puzzle(trajectory).answer()
        return score_letter(trajectory.text, CHOICES, truth, lambda letter: f"{letter}, {CHOICES[letter]},")

    def puzzle(self, trajectory: Trajectory) -> Puzzle:
        """The puzzle that an example's `meta` records; its pictures can be drawn again, at any size.

        Raises:
            MirageError: it is not there, or not whole.
        """
        meta = trajectory.meta
        try:
            puzzle = Puzzle(Piece(**meta["whole"]), {key: Piece(**piece) for key, piece in meta["candidates"].items()})
            puzzle.answer()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:
            raise MirageError(f'the "whole" and "candidates" of the example\'s meta are no jigsaw: {fault}') from fault
        return puzzle

    def _square(self, rng: random.Random, photo: str) -> Piece:
        """A square of half to three quarters of the photo's shorter side, so that there is room beside it."""
        width, height = self.photos.open(photo).size
        side = 2 * rng.randint(min(width, height) // 4, min(width, height) * 3 // 8)
        return Piece(photo, rng.randint(0, width - side), rng.randint(0, height - side), side)

    def _wrong(self, rng: random.Random, level: int, whole: Piece) -> Piece | None:
        """A wrong candidate; None where this draw gives none."""
        hole, (width, height) = whole.corner(), self.photos.open(whole.photo).size
        kind = DISTRACTORS[level - 1]
        if kind == "other photo":
            return self._square(rng, self.photos.other(rng, whole.photo)).corner()
        if kind == "turned":
            return Piece(hole.photo, hole.x, hole.y, hole.side, rng.choice(list(TURNS)))
        if kind == "coloured":
            return Piece(hole.photo, hole.x, hole.y, hole.side, rng.choice(list(COLOURS)))
        if kind == "shifted":
            right, down = (rng.choice((-1, 0, 1)) * rng.randint(hole.side // 8, hole.side // 4) for _ in range(2))
            moved = Piece(hole.photo, hole.x + right, hole.y + down, hole.side)
            inside = moved.x + moved.side <= width and moved.y + moved.side <= height
            return moved if inside and (right or down) else None
        places = (
            Piece(hole.photo, rng.randint(0, width - hole.side), rng.randint(0, height - hole.side), hole.side)
            for _ in range(12)
        )
        free = [place for place in places if not place.overlap(hole)]
        return min(free, key=whole.overlap, default=None)  # what the prompt shows already would give itself away


def differ(photos: Photos, one: Piece, other: Piece) -> bool:
    """Whether two candidates can be told apart by what they show and by their left and upper edges."""
    pixels = [np.asarray(piece.draw(photos, GLANCE), np.int64) for piece in (one, other)]  # [GLANCE, GLANCE, 3]
    gap = abs(pixels[0] - pixels[1])
    edges = np.concatenate((gap[0], gap[1:, 0]))
    return bool(gap.sum() >= APART * gap.size and edges.sum() >= APART * edges.size)


def _thought(puzzle: Puzzle) -> tuple[str, str]:
    """What is thought before and after the helper image."""
    truth = puzzle.answer()
    (wrong,) = set(CHOICES) - {truth}
    fault = _fault(puzzle.candidates[wrong], puzzle.whole.corner())
    after = f"What meets the edges goes on in {CHOICES[truth]}; {CHOICES[wrong]} {fault}."
    return "I picture the photo with its corner filled in.", after


def _fault(wrong: Piece, hole: Piece) -> str:
    """What is wrong with a candidate, in words."""
    if wrong.change:
        return f"is {wrong.change}"
    if wrong.photo != hole.photo:
        return "shows something else"
    if not wrong.overlap(hole):
        return "is from another place"
    # a piece that was cut too far right shows everything too far left
    down = "" if wrong.y == hole.y else "too high" if wrong.y > hole.y else "too low"
    along = "" if wrong.x == hole.x else "too far left" if wrong.x > hole.x else "too far right"
    return f"shows it {' and '.join(filter(None, (down, along)))}"


JIGSAW = Jigsaw("jigsaw", Scenes())
PHOTO_JIGSAW = Jigsaw("jigsaw-photos", BuiltIn())
FOLDER_JIGSAW = Jigsaw("jigsaw-folder", Folder())

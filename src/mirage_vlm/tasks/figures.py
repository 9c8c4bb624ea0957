"""Drawn figures with a question, each of which is answered by an operation on the figure.

The four kinds are those of COMT ("Chain of Multi-modal Thought", arXiv 2412.12932): something is added, taken away,
changed or chosen. A figure is plain numbers, so that it can be kept in a file, asked of and drawn again. All of it
lies on a grid of unit cells.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import PIL.Image

from mirage_vlm.tasks.board import BLUE, GREEN, INK, RED, Board, Cell, Point

Figure = Mapping[str, Any]
LETTERS = "ABCD"


class Kind(ABC):
    """A kind of figure."""

    name: str

    @abstractmethod
    def make(self, rng: random.Random, level: int) -> dict[str, Any]:
        """A fresh figure; higher levels are larger."""

    @abstractmethod
    def ask(self, figure: Figure) -> str:
        """The question, which says nothing of the answer."""

    @abstractmethod
    def solve(self, figure: Figure) -> str:
        """The answer, computed from the figure: a letter or a whole number."""

    @abstractmethod
    def think(self, figure: Figure) -> tuple[str, str]:
        """What is said before the figure after its operation is imagined, and what is read off it."""

    @abstractmethod
    def paint(self, figure: Figure, board: Board, done: bool) -> None:
        """Draw the figure, `done` after its operation."""

    @abstractmethod
    def side(self, figure: Figure) -> int:
        """Cells per side of the picture."""

    @abstractmethod
    def cells(self, figure: Figure) -> list[list[str]]:
        """What each cell of the picture shows before the operation, in a word; all of the figure follows from them."""

    def draw(self, figure: Figure, cell: int, done: bool = False) -> PIL.Image.Image:
        """The picture, `cell` pixels for each cell; after the operation it is the helper image."""
        board = Board(self.side(figure), cell)
        self.paint(figure, board, done)
        return board.image


class Creation(Kind):
    """The area of a figure with six corners, which a line cuts into two rectangles."""

    name = "creation"

    def make(self, rng: random.Random, level: int) -> dict[str, Any]:
        side = level + 3
        width, height = rng.randint(3, side), rng.randint(3, side)
        return {
            "side": side,
            "at": [rng.randint(0, side - height), rng.randint(0, side - width)],
            "size": [height, width],
            "notch": [rng.randint(1, height - 1), rng.randint(1, width - 1)],
            "corner": rng.randrange(4),
        }

    def ask(self, figure: Figure) -> str:
        return r"How many unit squares does the figure cover? Answer with a number in \boxed{}."

    def solve(self, figure: Figure) -> str:
        (height, width), (high, wide) = figure["size"], figure["notch"]
        return str(height * width - high * wide)

    def think(self, figure: Figure) -> tuple[str, str]:
        (height, width), (high, wide) = figure["size"], figure["notch"]
        one, two = (height - high) * width, high * (width - wide)
        return (
            "A line cuts the figure into two rectangles.",
            f"They are {height - high} by {width} and {high} by {width - wide}: {one} + {two} = {one + two}.",
        )

    def paint(self, figure: Figure, board: Board, done: bool) -> None:
        body, rest = self._parts(figure)
        if done:
            board.fill(body, BLUE)
            board.fill(rest, GREEN)
        board.outline(body | rest)
        if done:
            (top, left), (height, width), (high, _) = figure["at"], figure["size"], figure["notch"]
            cut = top + (high if figure["corner"] < 2 else height - high)
            board.dashes((left, cut), (left + width, cut))

    def side(self, figure: Figure) -> int:
        return figure["side"]

    def cells(self, figure: Figure) -> list[list[str]]:
        """Where the border runs: along the cell's top, its left `side`, both (`corner`) or neither (`open`)."""
        body, rest = self._parts(figure)
        inside, side = body | rest, range(figure["side"])

        def word(r: int, c: int) -> str:
            top = ((r, c) in inside) != ((r - 1, c) in inside)
            left = ((r, c) in inside) != ((r, c - 1) in inside)
            return {(True, True): "corner", (True, False): "top", (False, True): "side"}.get((top, left), "open")

        return [[word(r, c) for c in side] for r in side]

    @staticmethod
    def _parts(figure: Figure) -> tuple[set[Cell], set[Cell]]:
        """The rectangle that has the whole width, and the one beside the notch."""
        (top, left), (height, width), (high, wide) = figure["at"], figure["size"], figure["notch"]
        upper, right = figure["corner"] < 2, figure["corner"] % 2 == 1
        rows = range(high) if upper else range(height - high, height)
        columns = range(width - wide) if right else range(wide, width)
        rest = {(top + r, left + c) for r in rows for c in columns}
        body = {(top + r, left + c) for r in range(height) if r not in rows for c in range(width)}
        return body, rest


class Deletion(Kind):
    """Sticks on a grid, some of them red: how many unit squares are whole when those are taken away?"""

    name = "deletion"

    def make(self, rng: random.Random, level: int) -> dict[str, Any]:
        squares = level + 1
        sticks = [[d, r, c] for d in "hv" for r in range(squares + (d == "h")) for c in range(squares + (d == "v"))]
        sticks = [stick for stick in sticks if rng.random() < 0.92]
        red = sorted(rng.sample(range(len(sticks)), rng.randint(1, 2 * level)))
        return {"squares": squares, "sticks": sticks, "red": red}

    def ask(self, figure: Figure) -> str:
        return r"Take away the red sticks. How many unit squares are whole? Answer with a number in \boxed{}."

    def solve(self, figure: Figure) -> str:
        return str(len(self._whole(figure)))

    def think(self, figure: Figure) -> tuple[str, str]:
        whole = self._whole(figure)
        rows = [sum(r == row for r, _ in whole) for row in range(figure["squares"])]
        return "Without the red sticks:", f"Whole squares row by row: {' + '.join(map(str, rows))} = {len(whole)}."

    def paint(self, figure: Figure, board: Board, done: bool) -> None:
        for i, (direction, row, column) in enumerate(figure["sticks"]):
            red = i in figure["red"]
            if red and done:
                continue
            x, y = column + 0.5, row + 0.5
            dx, dy = (1, 0) if direction == "h" else (0, 1)
            near, far = (x + 0.08 * dx, y + 0.08 * dy), (x + 0.92 * dx, y + 0.92 * dy)
            board.line(near, far, RED if red else INK, 0.12)
        if done:
            for row, column in self._whole(figure):
                corners = [(x * board.cell, y * board.cell) for x, y in _middle(row, column)]
                board.pen.rectangle(corners, fill=GREEN)

    def side(self, figure: Figure) -> int:
        return figure["squares"] + 1

    def cells(self, figure: Figure) -> list[list[str]]:
        """The sticks that leave the middle of the cell to the right and down: `n`one, `b`lack or `r`ed, as `bn`."""
        colour = {tuple(stick): "r" if i in figure["red"] else "b" for i, stick in enumerate(figure["sticks"])}
        side = range(self.side(figure))
        return [[colour.get(("h", r, c), "n") + colour.get(("v", r, c), "n") for c in side] for r in side]

    @staticmethod
    def _whole(figure: Figure) -> list[Cell]:
        left = {tuple(stick) for i, stick in enumerate(figure["sticks"]) if i not in figure["red"]}
        size = range(figure["squares"])
        return [
            (r, c) for r in size for c in size if {("h", r, c), ("h", r + 1, c), ("v", r, c), ("v", r, c + 1)} <= left
        ]


def _middle(row: int, column: int) -> tuple[Point, Point]:
    """The inner half of a square of sticks."""
    return (column + 0.75, row + 0.75), (column + 1.25, row + 1.25)


class Update(Kind):
    """A shape with a dot is mirrored or turned: on which letter does the dot land?"""

    name = "update"
    CHANGES: ClassVar = {
        "left-right": "Mirror the shape at the dashed line.",
        "up-down": "Mirror the shape at the dashed line.",
        "quarter": "Turn the shape a quarter turn clockwise about the middle of the picture.",
        "half": "Turn the shape half a turn about the middle of the picture.",
        "back": "Turn the shape a quarter turn anticlockwise about the middle of the picture.",
    }

    def make(self, rng: random.Random, level: int) -> dict[str, Any]:
        side = 2 * ((level + 4) // 2)  # even, so that the middle is a corner
        while True:
            shape = grow(rng, side // 2, rng.randint(3, 3 + level))
            top, left = rng.choice((0, side // 2)), rng.choice((0, side // 2))
            cells = [[r + top, c + left] for r, c in shape]
            dot = rng.choice(cells)
            change = rng.choice(list(self.CHANGES))
            landed = {name: self._moved((dot[0], dot[1]), side, name) for name in self.CHANGES}
            others = sorted({place for place in landed.values() if place != landed[change]})
            free = [(r, c) for r in range(side) for c in range(side) if [r, c] not in cells]
            places = [place for place in others if list(place) not in cells][:3]
            pool = [p for p in free if p != landed[change] and p not in places]
            places += rng.sample(pool, 3 - len(places))
            if list(landed[change]) in cells:
                continue
            places.append(landed[change])
            rng.shuffle(places)
            return {"side": side, "cells": cells, "dot": dot, "change": change, "places": [list(p) for p in places]}

    def ask(self, figure: Figure) -> str:
        return f"{self.CHANGES[figure['change']]} " + (
            r"Which letter does the dot land on? Answer with A, B, C or D in \boxed{}."
        )

    def solve(self, figure: Figure) -> str:
        row, column = figure["dot"]
        landed = self._moved((row, column), figure["side"], figure["change"])
        return LETTERS[figure["places"].index(list(landed))]

    def think(self, figure: Figure) -> tuple[str, str]:
        (row, column), side = figure["dot"], figure["side"]
        there = self._moved((row, column), side, figure["change"])
        before = f"The dot is in row {row + 1}, column {column + 1}. After the move:"
        return before, f"It is in row {there[0] + 1}, column {there[1] + 1}, at {self.solve(figure)}."

    def paint(self, figure: Figure, board: Board, done: bool) -> None:
        side, change = figure["side"], figure["change"]
        cells = [(r, c) for r, c in figure["cells"]]
        dot = (figure["dot"][0], figure["dot"][1])
        if done:
            cells, dot = [self._moved(cell, side, change) for cell in cells], self._moved(dot, side, change)
        board.fill(cells, BLUE)
        board.outline(cells)
        if change == "left-right":
            board.dashes((side / 2, 0), (side / 2, side))
        elif change == "up-down":
            board.dashes((0, side / 2), (side, side / 2))
        for letter, (row, column) in zip(LETTERS, figure["places"], strict=True):
            board.write((row, column), letter)
        board.dot(dot)

    def side(self, figure: Figure) -> int:
        return figure["side"]

    def cells(self, figure: Figure) -> list[list[str]]:
        """`blue`, the `dot`, a letter or `empty`."""
        words = {(r, c): "blue" for r, c in figure["cells"]}
        words |= {(r, c): letter for letter, (r, c) in zip(LETTERS, figure["places"], strict=True)}
        words[figure["dot"][0], figure["dot"][1]] = "dot"
        return _grid(words, figure["side"])

    @staticmethod
    def _moved(cell: Cell, side: int, change: str) -> Cell:
        (row, column), last = cell, side - 1
        return {
            "left-right": (row, last - column),
            "up-down": (last - row, column),
            "quarter": (column, last - row),
            "half": (last - row, last - column),
            "back": (last - column, row),
        }[change]


class Selection(Kind):
    """Four shapes: which has the largest area, or the longest border?"""

    name = "selection"
    WANTED: ClassVar = {"area": "covers the most unit squares", "border": "has the longest border"}

    def make(self, rng: random.Random, level: int) -> dict[str, Any]:
        room = level + 2
        while True:
            shapes = [grow(rng, room, rng.randint(3, 3 + 2 * level)) for _ in LETTERS]
            wanted = rng.choice(list(self.WANTED))
            sizes = sorted(self._size(shape, wanted) for shape in shapes)
            if sizes[-1] > sizes[-2]:
                return {"room": room, "shapes": [[list(cell) for cell in shape] for shape in shapes], "wanted": wanted}

    def ask(self, figure: Figure) -> str:
        return f"Which shape {self.WANTED[figure['wanted']]}? " + r"Answer with A, B, C or D in \boxed{}."

    def solve(self, figure: Figure) -> str:
        sizes = [self._size([(r, c) for r, c in shape], figure["wanted"]) for shape in figure["shapes"]]
        return LETTERS[sizes.index(max(sizes))]

    def think(self, figure: Figure) -> tuple[str, str]:
        sizes = [self._size([(r, c) for r, c in shape], figure["wanted"]) for shape in figure["shapes"]]
        told = ", ".join(f"{letter} {size}" for letter, size in zip(LETTERS, sizes, strict=True))
        before = "Unit squares" if figure["wanted"] == "area" else "Borders"
        return f"{before}: {told}. The shape:", f"It is {self.solve(figure)}."

    def paint(self, figure: Figure, board: Board, done: bool) -> None:
        room = figure["room"]
        for i, shape in enumerate(figure["shapes"]):
            top, left = (room + 1) * (i // 2), (room + 1) * (i % 2)
            cells = [(r + top + 1, c + left) for r, c in shape]
            chosen = LETTERS[i] == self.solve(figure)
            if done and not chosen:
                continue
            board.fill(cells, GREEN if done else BLUE)
            board.outline(cells)
            board.write((top, left), LETTERS[i])

    def side(self, figure: Figure) -> int:
        return 2 * (figure["room"] + 1)

    def cells(self, figure: Figure) -> list[list[str]]:
        """`blue`, a letter or `empty`."""
        words, room = {}, figure["room"] + 1
        for i, (letter, shape) in enumerate(zip(LETTERS, figure["shapes"], strict=True)):
            top, left = room * (i // 2), room * (i % 2)
            words[top, left] = letter
            words |= {(top + 1 + r, left + c): "blue" for r, c in shape}
        return _grid(words, self.side(figure))

    @staticmethod
    def _size(shape: Iterable[Cell], wanted: str) -> int:
        cells = set(shape)
        if wanted == "area":
            return len(cells)
        return sum((r + i, c + j) not in cells for r, c in cells for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0)))


def _grid(words: Mapping[Cell, str], side: int) -> list[list[str]]:
    """The words of the cells row by row; the others are `empty`."""
    return [[words.get((r, c), "empty") for c in range(side)] for r in range(side)]


def grow(rng: random.Random, room: int, size: int) -> list[Cell]:
    """A connected set of so many cells in a square of `room` cells a side, or as many as fit; in order."""
    cells = {(rng.randrange(room), rng.randrange(room))}
    while len(cells) < min(size, room * room):
        beside = {(r + i, c + j) for r, c in cells for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))} - cells
        cells.add(rng.choice(sorted((r, c) for r, c in beside if 0 <= r < room and 0 <= c < room)))
    return sorted(cells)


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Creation(), Deletion(), Update(), Selection())}

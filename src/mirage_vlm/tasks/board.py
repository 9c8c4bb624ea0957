"""What figures are drawn on: a grid of unit cells."""

from __future__ import annotations

from collections.abc import Iterable

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

Cell = tuple[int, int]  # row, column
Point = tuple[float, float]  # x, y in cells
INK, FAINT, RED, BLUE, GREEN = "#1f2328", "#d5d9de", "#d1242f", "#8cb9f2", "#9fd6a8"


class Board:
    """A white square with a faint grid to draw on; places are in cells, x to the right and y down."""

    def __init__(self, side: int, cell: int):
        self.side, self.cell = side, cell
        self.image = PIL.Image.new("RGB", (side * cell, side * cell), "white")
        self.pen = PIL.ImageDraw.Draw(self.image)
        for i in range(side + 1):
            for line in (((i, 0), (i, side)), ((0, i), (side, i))):
                self.line(*line, FAINT, 0.02)

    def line(self, start: Point, end: Point, colour: str = INK, width: float = 0.09) -> None:
        ends = [(x * self.cell, y * self.cell) for x, y in (start, end)]
        self.pen.line(ends, fill=colour, width=max(1, round(width * self.cell)))

    def dashes(self, start: Point, end: Point, colour: str = RED) -> None:
        count = 3 * self.side
        (x, y), (dx, dy) = start, ((end[0] - start[0]) / count, (end[1] - start[1]) / count)
        for i in range(0, count, 2):
            self.line((x + i * dx, y + i * dy), (x + (i + 1) * dx, y + (i + 1) * dy), colour)

    def fill(self, cells: Iterable[Cell], colour: str) -> None:
        for row, column in cells:
            box = [column * self.cell, row * self.cell, (column + 1) * self.cell - 1, (row + 1) * self.cell - 1]
            self.pen.rectangle(box, fill=colour)

    def outline(self, cells: Iterable[Cell], colour: str = INK) -> None:
        """The border of a set of cells."""
        inside = set(cells)
        for r, c in inside:
            for other, start, end in (
                ((r - 1, c), (c, r), (c + 1, r)),
                ((r + 1, c), (c, r + 1), (c + 1, r + 1)),
                ((r, c - 1), (c, r), (c, r + 1)),
                ((r, c + 1), (c + 1, r), (c + 1, r + 1)),
            ):
                if other not in inside:
                    self.line(start, end, colour)

    def dot(self, cell: Cell, colour: str = RED) -> None:
        (r, c), size = cell, self.cell
        self.pen.ellipse([(c + 0.3) * size, (r + 0.3) * size, (c + 0.7) * size, (r + 0.7) * size], fill=colour)

    def write(self, cell: tuple[float, float], text: str, colour: str = INK) -> None:
        """A letter in the middle of a cell."""
        (r, c), size = cell, self.cell
        font = PIL.ImageFont.load_default(0.7 * size)
        self.pen.text(((c + 0.5) * size, (r + 0.5) * size), text, fill=colour, font=font, anchor="mm")

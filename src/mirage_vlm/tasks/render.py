"""Pictures of mazes, pixel for pixel gymnasium's FrozenLake, and the grid found again in a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageDraw

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.frozenlake import MAX_SIDE, Cell, Maze

if TYPE_CHECKING:
    from numpy.typing import NDArray

RED = (255, 0, 0)

_LETTERS = "SFHG"
_FACINGS = "LDRU"  # the order of gymnasium's actions


def draw_maze(
    maze: Maze,
    cell: int = 64,
    elf: Cell | None = None,
    path: Sequence[Cell] | None = None,
    facing: str = "D",
) -> PIL.Image.Image:
    """The picture of a maze, RGB, `maze.size * cell` pixels per side.

    It equals `FrozenLake-v1`'s `rgb_array` render at the same cell size. (gymnasium itself shrinks the cells
    of maps larger than 8 to fit a window of 512 pixels; here a cell keeps its size.)

    Args:
        maze: the map.
        cell: pixels per side of a cell.
        elf: the elf's cell, by default the start; on a hole the cracked hole is drawn, as gymnasium does.
        path: cells to join by red arrows, centre to centre, one for each step.
        facing: where the elf looks: `L`, `D`, `R` or `U`.
    """
    elf = maze.start if elf is None else elf
    pixels = np.empty((maze.size * cell, maze.size * cell, 3), np.uint8)
    for row, column in maze.cells():
        tile = _tile(maze[row, column], facing if (row, column) == elf else None, cell)
        pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = tile
    image = PIL.Image.fromarray(pixels)
    if path is not None:
        _draw_arrows(image, path, cell)
    return image


@lru_cache(maxsize=1024)
def _tile(letter: str, facing: str | None, cell: int) -> NDArray[np.uint8]:
    """[cell, cell, 3] one cell, with the elf looking `facing` or without it, cut from gymnasium's render."""
    lake = _lake(cell)
    column = _LETTERS.index(letter)
    lake.s = column if facing else (column + 1) % len(_LETTERS)
    lake.lastaction = _FACINGS.index(facing) if facing else None
    return lake.render()[:, column * cell : (column + 1) * cell].copy()


@lru_cache(maxsize=16)
def _lake(cell: int) -> Any:
    """gymnasium's environment on a map of one row that has every letter once."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import pygame
    from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

    lake: Any = FrozenLakeEnv(render_mode="rgb_array", desc=[_LETTERS])
    lake.cell_size = (cell, cell)
    lake.window_size = (cell * len(_LETTERS), cell)
    lake.window_surface = pygame.Surface(lake.window_size)  # given one, it never asks for a display
    return lake


def _draw_arrows(image: PIL.Image.Image, path: Sequence[Cell], cell: int) -> None:
    """One red arrow for each step; its tip is the centre of the cell that the step leads to."""
    draw = PIL.ImageDraw.Draw(image)
    width, head, half = max(2, round(cell * 0.08)), cell * 0.34, cell * 0.17
    centres = [((column + 0.5) * cell, (row + 0.5) * cell) for row, column in path]
    for (x0, y0), (x1, y1) in pairwise(centres):
        right, down = (x1 - x0) / cell, (y1 - y0) / cell  # a unit vector, steps being between neighbours
        back_x, back_y = x1 - right * head, y1 - down * head
        draw.line([(x0, y0), (back_x, back_y)], fill=RED, width=width)
        wings = [(back_x - down * half, back_y + right * half), (back_x + down * half, back_y - right * half)]
        draw.polygon([(x1, y1), *wings], fill=RED)


def guess_side(image: PIL.Image.Image) -> int:
    """Cells per side of a FrozenLake picture of any cell size, from 2 to 12.

    Every cell has a thin frame, so brightness changes along whole columns and rows at multiples of W / n. The
    largest n whose weaker lines are nearly as strong as the best n's wins (its divisors see lines too).

    Raises:
        MirageError: the picture is not square, or no grid is seen in it.
    """
    width, height = image.size
    if width != height:
        raise MirageError(f"a maze picture must be square, this one is {width}x{height}")
    grey = np.asarray(image.convert("L"), np.float32)
    edges = [_edge_strength(grey), _edge_strength(grey.T)]
    sides = [n for n in range(2, MAX_SIDE + 1) if width >= 8 * n]
    scores = {n: min(_line_contrast(edge, n) for edge in edges) for n in sides}
    best = max(scores.values(), default=0.0)
    if best < 1.5:
        raise MirageError("no grid of 2 to 12 cells a side is seen in the picture; is it a FrozenLake map?")
    return max(n for n, score in scores.items() if score >= 0.6 * best)


def resize_cells(image: PIL.Image.Image, cell: int = 64) -> PIL.Image.Image:
    """A FrozenLake picture of any cell size brought to `cell` pixels a cell; fails as `guess_side` does."""
    side = guess_side(image) * cell
    return image if image.size == (side, side) else image.resize((side, side), PIL.Image.Resampling.LANCZOS)


def _edge_strength(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """[W - 1] how much brightness changes from each column to the next, for most of the rows."""
    return np.median(np.abs(np.diff(grey, axis=1)), axis=0)  # [H, W] -> [W - 1]


def _line_contrast(edge: NDArray[np.float32], n: int) -> float:
    """The weaker quarter of the n - 1 inner lines at multiples of W / n, over what is usual between them."""
    width = len(edge) + 1
    reach = 1 + width // (n * 64)
    lines = np.arange(1, n) * width / n
    peaks = [edge[max(0, round(x) - 1 - reach) : round(x) + reach].max() for x in lines]
    return float(np.quantile(peaks, 0.25) / (edge.mean() + 0.5))

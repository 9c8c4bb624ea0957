"""The maze of the VSP tasks: maps, a generator, the solver and the simulator.

Plain Python on cells `(row, column)`, counted from 0; only the names of cells (`r3c2`) count from 1.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from mirage_vlm.errors import MirageError
from mirage_vlm.trajectory import Box

Cell = tuple[int, int]
Outcome = Literal["goal", "hole", "safe"]

MOVES: dict[str, Cell] = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
MOVE_WORDS: dict[str, str] = {"U": "up", "D": "down", "L": "left", "R": "right"}
MAX_SIDE = 12  # of the maps that are made and found again in pictures

_USUAL_HOLES = 0.2  # most maps of the benchmark: each cell a hole with this probability
_ODD_HOLES = (0.05, 0.4)  # the others: a probability drawn from this range
_USUAL_SHARE = 0.8


@dataclass(frozen=True)
class Maze:
    """A square map of `S` (start), `G` (goal, the gift), `H` (hole) and `F` (frozen, safe).

    Build one from outside data with `from_rows`, which checks it; `maze[row, column]` is a letter.
    """

    rows: tuple[str, ...]

    @classmethod
    def from_rows(cls, rows: Sequence[str]) -> Maze:
        """The map written as rows of letters.

        Raises:
            MirageError: it is not square with a side of 2 or more, has other letters, or not one S and one G.
        """
        if isinstance(rows, str) or not all(isinstance(row, str) for row in rows):
            raise MirageError("a map must be a list of strings, one for each row")
        size = len(rows)
        if size < 2 or any(len(row) != size for row in rows):
            raise MirageError(f"a map must be square, 2 x 2 or larger, not rows of {[*map(len, rows)]}")
        letters = "".join(rows)
        if strange := sorted(set(letters) - set("SFHG")):
            raise MirageError(f"a map has the letters S, F, H and G only, not {strange[0]!r}")
        for letter in "SG":
            if (count := letters.count(letter)) != 1:
                raise MirageError(f"a map needs exactly one {letter}, this one has {count}")
        return cls(tuple(rows))

    def __getitem__(self, cell: Cell) -> str:
        return self.rows[cell[0]][cell[1]]

    @property
    def size(self) -> int:
        """Cells per side."""
        return len(self.rows)

    @cached_property
    def start(self) -> Cell:
        """Where the elf begins."""
        return self._find("S")

    @cached_property
    def goal(self) -> Cell:
        """Where the gift is."""
        return self._find("G")

    @cached_property
    def holes(self) -> frozenset[Cell]:
        """The cells that are holes."""
        return frozenset(cell for cell in self.cells() if self[cell] == "H")

    def cells(self) -> Iterator[Cell]:
        """All cells, row by row."""
        return ((row, column) for row in range(self.size) for column in range(self.size))

    def step(self, cell: Cell, move: str) -> Cell:
        """The cell that `move` leads to; the same one where it would leave the board."""
        row, column = cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]
        return (row, column) if 0 <= row < self.size and 0 <= column < self.size else cell

    def with_goal(self, goal: Cell) -> Maze:
        """The same map with the gift on another cell, which must be frozen."""
        letters = [list(row) for row in self.rows]
        letters[self.goal[0]][self.goal[1]] = "F"
        letters[goal[0]][goal[1]] = "G"
        return Maze(tuple("".join(row) for row in letters))

    def _find(self, letter: str) -> Cell:
        index = "".join(self.rows).index(letter)
        return divmod(index, self.size)


@dataclass(frozen=True)
class Walk:
    """What became of a plan.

    Attributes:
        cells: the start, then the cell after each executed move (unchanged by a move off the board).
        outcome: `goal` (ends at the gift), `hole` (fell in; the walk ends there), `safe` (ends elsewhere,
            perhaps after passing the gift).
    """

    cells: tuple[Cell, ...]
    outcome: Outcome

    @property
    def executed(self) -> int:
        """Moves made, off-board ones included, the one into a hole too."""
        return len(self.cells) - 1


def generate_maze(level: int, rng: random.Random) -> Maze:
    """A random solvable map of side `level`, distributed like the benchmark's.

    Start and goal are any two cells. Each other cell is a hole with one probability for the whole map: 0.2
    for four maps in five, uniform in 0.05 to 0.4 for the others. Unsolvable maps are thrown away.
    """
    p = _USUAL_HOLES if rng.random() < _USUAL_SHARE else rng.uniform(*_ODD_HOLES)
    while True:
        letters = ["H" if rng.random() < p else "F" for _ in range(level * level)]
        start, goal = rng.sample(range(level * level), 2)
        letters[start], letters[goal] = "S", "G"
        maze = Maze(tuple("".join(letters[row * level : (row + 1) * level]) for row in range(level)))
        if shortest_path(maze):
            return maze


def shortest_path(maze: Maze) -> tuple[Cell, ...] | None:
    """The cells of a shortest safe path from start to goal, both included; None where there is none.

    Of all shortest paths it is the one whose moves come first in the order U, D, L, R, compared move by move:
    breadth-first search tries moves in that order, and the first way found to a cell stays.
    """
    came_from: dict[Cell, Cell] = {maze.start: maze.start}
    queue = deque([maze.start])
    rows, size, goal = maze.rows, maze.size, maze.goal
    while queue:
        cell = queue.popleft()
        if cell == goal:
            path = [cell]
            while path[-1] != maze.start:
                path.append(came_from[path[-1]])
            return tuple(reversed(path))
        row, column = cell
        for down, right in MOVES.values():
            nearby = r, c = row + down, column + right
            if 0 <= r < size and 0 <= c < size and nearby not in came_from and rows[r][c] != "H":
                came_from[nearby] = cell
                queue.append(nearby)
    return None


def search_waves(maze: Maze) -> tuple[tuple[Cell, ...], ...]:
    """Breadth-first search from the goal until it meets the start: the cells at distance 1, 2, …, in queue order.

    Neighbours are tried in the order U, D, L, R. The last wave ends with the start; where no way leads there, the
    waves cover all that can be reached.
    """
    seen, wave = {maze.goal}, [maze.goal]
    waves: list[tuple[Cell, ...]] = []
    while wave:
        found: list[Cell] = []
        for cell in wave:
            for move in MOVES:
                nearby = maze.step(cell, move)
                if nearby not in seen and maze[nearby] != "H":
                    seen.add(nearby)
                    found.append(nearby)
                    if nearby == maze.start:
                        return (*waves, tuple(found))
        if found:
            waves.append(tuple(found))
        wave = found
    return tuple(waves)


def distance_waves(maze: Maze) -> tuple[tuple[Cell, ...], ...]:
    """All cells at distance 1, 2, … from the goal, row by row, up to the distance of the start.

    Where no way leads there, all that can be reached.
    """
    seen, wave = {maze.goal}, {maze.goal}
    waves: list[tuple[Cell, ...]] = []
    while wave and maze.start not in wave:
        nearby = {maze.step(cell, move) for cell in wave for move in MOVES} - seen
        wave = {cell for cell in nearby if maze[cell] != "H"}
        seen |= wave
        if wave:
            waves.append(tuple(sorted(wave)))
    return tuple(waves)


def moves_of(path: Sequence[Cell]) -> str:
    """The moves (`UUR`) that lead along a path of neighbouring cells."""
    letter_of = {offset: letter for letter, offset in MOVES.items()}
    return "".join(letter_of[b[0] - a[0], b[1] - a[1]] for a, b in pairwise(path))


def simulate(maze: Maze, moves: Sequence[str]) -> Walk:
    """Walk a plan from the start: off-board moves do nothing, a hole ends the walk, the last cell decides."""
    cells = [maze.start]
    for move in moves:
        cells.append(maze.step(cells[-1], move))
        if maze[cells[-1]] == "H":
            return Walk(tuple(cells), "hole")
    return Walk(tuple(cells), "goal" if cells[-1] == maze.goal else "safe")


def box_of(cell: Cell, side: int) -> Box:
    """Where a cell lies in a picture of a maze of that side."""
    row, column = cell
    return column / side, row / side, (column + 1) / side, (row + 1) / side


def cell_name(cell: Cell) -> str:
    """The name of a cell, rows and columns counted from 1: `(2, 1)` is `r3c2`."""
    return f"r{cell[0] + 1}c{cell[1] + 1}"


def parse_cell(name: str) -> Cell:
    """The cell that a name such as `r3c2` means.

    Raises:
        MirageError: it is no such name.
    """
    match = re.fullmatch(r"r([1-9]\d*)c([1-9]\d*)", name, re.ASCII)
    if not match:
        raise MirageError(f"{name!r} is no cell: write r3c2 for row 3, column 2")
    return int(match[1]) - 1, int(match[2]) - 1


def narrate(cells: Sequence[Cell], moves: Sequence[str]) -> str:
    """A walk in words, `r3c2 up r2c2 right r2c3`: the first cell, then each move and the cell after it."""
    steps = (f" {MOVE_WORDS[move]} {cell_name(cell)}" for move, cell in zip(moves, cells[1:], strict=False))
    return cell_name(cells[0]) + "".join(steps)

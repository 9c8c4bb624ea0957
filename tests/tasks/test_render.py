"""Pictures against gymnasium's own, and the grid found again."""

import os
import random
import subprocess
import sys

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import gymnasium
import numpy as np
import PIL.Image
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.frozenlake import Maze, generate_maze, shortest_path
from mirage_vlm.tasks.render import RED, draw_maze, guess_side, resize_cells

ACTIONS = "LDRU"


def gymnasium_picture(maze, cell=None, elf=None, facing="D"):
    """What gymnasium draws, the environment's own state set as given."""
    lake = gymnasium.make("FrozenLake-v1", desc=list(maze.rows), render_mode="rgb_array").unwrapped
    lake.reset()
    if cell:
        lake.cell_size, lake.window_size = (cell, cell), (cell * maze.size, cell * maze.size)
    if elf:
        lake.s = elf[0] * maze.size + elf[1]
    lake.lastaction = None if facing == "D" else ACTIONS.index(facing)
    return lake.render()


@pytest.mark.parametrize("level", range(3, 9))
def test_equals_gymnasium_pixel_for_pixel(level):
    maze = generate_maze(level, random.Random(level))
    assert np.array_equal(np.asarray(draw_maze(maze)), gymnasium_picture(maze))


def test_equals_gymnasium_wherever_the_elf_stands_and_looks():
    maze = Maze.from_rows(["SFH", "FGF", "HFF"])
    for elf in [(0, 0), (0, 1), (0, 2), (1, 1)]:  # start, ice, hole, gift
        for facing in ACTIONS:
            ours = np.asarray(draw_maze(maze, elf=elf, facing=facing))
            assert np.array_equal(ours, gymnasium_picture(maze, elf=elf, facing=facing))


@pytest.mark.parametrize("cell", [20, 28, 33, 96])
def test_equals_gymnasium_at_other_cell_sizes(cell):
    maze = generate_maze(5, random.Random(cell))
    picture = draw_maze(maze, cell)
    assert picture.size == (5 * cell, 5 * cell)
    assert np.array_equal(np.asarray(picture), gymnasium_picture(maze, cell))


@pytest.mark.parametrize("cell", [28, 64])
def test_a_path_reddens_the_centres_of_its_cells_and_no_other_cell(cell):
    maze = Maze.from_rows(["SFFF", "HHFF", "FFFF", "FFGF"])
    path = shortest_path(maze)
    picture, bare = np.asarray(draw_maze(maze, cell, path=path)), np.asarray(draw_maze(maze, cell))
    for row, column in maze.cells():
        tile = np.s_[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        if (row, column) in path:
            assert (picture[tile] == RED).all(axis=-1).sum() > 0.02 * cell**2
        else:
            assert np.array_equal(picture[tile], bare[tile])
    assert all(tuple(picture[int((r + 0.5) * cell), int((c + 0.5) * cell)]) == RED for r, c in path)


def test_the_path_s_direction_can_be_seen():
    maze = Maze.from_rows(["FFF", "SHG", "FFF"])
    there, back = [(0, 0), (0, 1), (0, 2)], [(0, 2), (0, 1), (0, 0)]
    difference = np.asarray(draw_maze(maze, 28, path=there)) != np.asarray(draw_maze(maze, 28, path=back))
    assert difference.any(axis=-1).sum() > 50


@pytest.mark.parametrize("cell", [16, 28, 50, 64, 100])
def test_guess_side(cell):
    rng = random.Random(cell)
    for side in range(2, 13):
        for _ in range(3):
            maze = generate_maze(side, rng)
            assert guess_side(draw_maze(maze, cell)) == side
            assert guess_side(draw_maze(maze, cell, path=shortest_path(maze))) == side


def test_resize_cells():
    maze = generate_maze(6, random.Random(0))
    assert resize_cells(draw_maze(maze, 28)).size == (384, 384)
    assert resize_cells(draw_maze(maze).resize((500, 500))).size == (384, 384)
    assert np.array_equal(np.asarray(resize_cells(draw_maze(maze))), np.asarray(draw_maze(maze)))


def test_pictures_without_a_grid_are_refused():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    for picture in (PIL.Image.new("RGB", (256, 256)), PIL.Image.new("L", (3, 3)), PIL.Image.fromarray(noise)):
        with pytest.raises(MirageError, match="no grid"):
            guess_side(picture)
    with pytest.raises(MirageError, match="square, this one is 64x32"):
        guess_side(PIL.Image.new("RGB", (64, 32)))


def test_drawing_needs_no_display_and_prints_nothing():
    code = (
        "from mirage_vlm.tasks.render import draw_maze; from mirage_vlm.tasks.frozenlake import Maze\n"
        "draw_maze(Maze(('SF', 'FG')))"
    )
    hidden = {"DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "PYGAME_HIDE_SUPPORT_PROMPT"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    reply = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (reply.stdout, reply.stderr) == ("", "")

"""The maze against slow but obvious references."""

import pickle
import random
from itertools import product

import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.frozenlake import (
    MOVES,
    Maze,
    cell_name,
    generate_maze,
    moves_of,
    narrate,
    parse_cell,
    search_waves,
    shortest_path,
    simulate,
)


def all_plans_in_order(length):
    """Every plan of that length, in the order U, D, L, R compared move by move."""
    return ("".join(plan) for plan in product("UDLR", repeat=length))


def test_shortest_path_is_the_first_of_the_shortest_plans_that_reach_the_gift():
    rng = random.Random(1)
    for _ in range(60):
        maze = generate_maze(3, rng)
        path = shortest_path(maze)
        assert path is not None
        plans = (plan for length in range(1, 9) for plan in all_plans_in_order(length))
        assert moves_of(path) == next(plan for plan in plans if simulate(maze, plan).outcome == "goal")


def test_unsolvable_map_has_no_path():
    assert shortest_path(Maze.from_rows(["SHF", "HHF", "FFG"])) is None


@pytest.mark.parametrize(
    ("moves", "cells", "outcome"),
    [
        ("RR", ["r1c1", "r1c2", "r1c3"], "goal"),
        ("RRD", ["r1c1", "r1c2", "r1c3", "r2c3"], "safe"),  # passes the gift and leaves it
        ("RRDU", ["r1c1", "r1c2", "r1c3", "r2c3", "r1c3"], "goal"),
        ("RRU", ["r1c1", "r1c2", "r1c3", "r1c3"], "goal"),  # runs against the edge and stays at the gift
        ("ULL", ["r1c1", "r1c1", "r1c1", "r1c1"], "safe"),
        ("RDURR", ["r1c1", "r1c2", "r2c2"], "hole"),  # nothing is executed after the fall
        ("", ["r1c1"], "safe"),
    ],
)
def test_simulate(moves, cells, outcome):
    walk = simulate(Maze.from_rows(["SFG", "FHF", "FFF"]), moves)
    assert ([cell_name(cell) for cell in walk.cells], walk.outcome) == (cells, outcome)
    assert walk.executed == len(cells) - 1


def test_generated_maps_are_well_formed_solvable_and_not_all_alike():
    rng = random.Random(2)
    mazes = [generate_maze(level, rng) for level in (2, 3, 6, 8) for _ in range(100)]
    for maze in mazes:
        assert Maze.from_rows(maze.rows) == maze
        assert shortest_path(maze)
    assert len(set(mazes)) > 300


def test_generated_maps_have_the_benchmark_s_share_of_holes():
    rng = random.Random(3)
    published = {3: 1.3, 4: 2.4, 5: 4.2, 6: 6.1, 7: 9.4, 8: 12.2}  # means over the benchmark's levels
    for level, mean in published.items():
        ours = sum(len(generate_maze(level, rng).holes) for _ in range(400)) / 400
        assert ours == pytest.approx(mean, abs=0.25 + 0.15 * mean)


def test_same_seed_same_map():
    assert generate_maze(6, random.Random("a")) == generate_maze(6, random.Random("a"))


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (["SG", "FFF"], "square"),
        (["S"], "square"),
        ([], "square"),
        (["SF", "Fx"], "'x'"),
        (["SS", "GF"], "exactly one S"),
        (["SF", "FF"], "exactly one G"),
        ("SG", "list of strings"),
        ([["S", "G"], ["F", "F"]], "list of strings"),
    ],
)
def test_bad_maps_are_refused(rows, complaint):
    with pytest.raises(MirageError, match=complaint):
        Maze.from_rows(rows)


def test_maze_facts():
    maze = Maze.from_rows(["FHG", "FFF", "HSF"])
    assert (maze.size, maze.start, maze.goal, maze.holes) == (3, (2, 1), (0, 2), {(0, 1), (2, 0)})
    assert maze[2, 1] == "S"
    assert maze.with_goal((1, 1)).rows == ("FHF", "FGF", "HSF")
    assert pickle.loads(pickle.dumps(maze)) == maze


def test_names_of_cells():
    assert cell_name((2, 1)) == "r3c2"
    assert all(parse_cell(cell_name(cell)) == cell for cell in product(range(12), repeat=2))
    for bad in ("r0c1", "r1", "3,2", "r1c1 ", "", "r\u0661c1"):
        with pytest.raises(MirageError, match="no cell"):
            parse_cell(bad)


def test_narrate():
    assert narrate([(2, 1), (1, 1), (1, 2)], "UR") == "r3c2 up r2c2 right r2c3"
    assert moves_of([(2, 1), (1, 1), (1, 2)]) == "UR"
    assert set(MOVES) == set("UDLR")


def test_search_waves_are_the_distances_to_the_goal_as_far_as_the_start():
    rng = random.Random(2)
    for _ in range(60):
        maze = generate_maze(rng.randint(3, 6), rng)
        free = [cell for cell in maze.cells() if maze[cell] != "H"]
        distance = {cell: 0 if cell == maze.goal else len(free) for cell in free}
        for _ in free:  # Bellman and Ford
            for cell in free:
                nearest = min(distance.get(maze.step(cell, move), len(free)) for move in MOVES)
                distance[cell] = min(distance[cell], nearest + 1)
        waves = search_waves(maze)
        assert waves[-1][-1] == maze.start and distance[maze.start] == len(waves)
        for i, wave in enumerate(waves, start=1):
            wanted = {cell for cell in free if distance[cell] == i}
            assert len(set(wave)) == len(wave) and (set(wave) == wanted or (i == len(waves) and set(wave) < wanted))

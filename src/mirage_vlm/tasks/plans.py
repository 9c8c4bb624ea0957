"""Plans to reason about: random maps and walks with balanced outcomes that the length does not tell."""

from __future__ import annotations

import random

from mirage_vlm.tasks.frozenlake import Cell, Maze, Outcome, generate_maze, shortest_path, simulate

MAX_STEPS = 9

_OPPOSITE = {"U": "D", "D": "U", "L": "R", "R": "L"}
_GAITS = {"wander": 0.5, "stride": 0.3, "blunder": 0.2}


def draw_plan(level: int, rng: random.Random) -> tuple[Maze, str]:
    """A map and a plan (`LUUR`) of 1 to 9 moves.

    The outcome is drawn first, a third each, then the length, uniformly and whatever the outcome, so neither
    tells the other. Maps and walks follow by rejection. A glance at the end should not be enough: about half
    of the falls would end at the gift if there were no holes, and half of the safe walks pass it or stop
    beside it.

    Walks have one of three gaits: `wander`, random moves on the board as in the benchmark; `stride`, which
    never turns back at once and looks like a plan with detours; `blunder`, which runs against the edge too.
    """
    outcome: Outcome = rng.choice(("goal", "hole", "safe"))
    length = rng.randint(1, MAX_STEPS)
    gait = rng.choices(list(_GAITS), list(_GAITS.values()))[0]
    tempting = rng.random() < 0.5
    # A walk that is to fall may first avoid holes for a while, or nearly all would fall within three moves.
    careful = length if outcome != "hole" else rng.randint(0, length - 1) if rng.random() < 0.5 else 0
    while True:
        maze = generate_maze(level, rng)
        plan, cells = _walk(maze, length, gait, careful, rng)
        goal, end = maze.goal, cells[-1]
        if outcome == "goal" or (outcome == "hole" and tempting and maze[end] == "F"):
            goal = end
        elif outcome == "safe" and tempting:
            goal = rng.choice([*cells[:-1], *(maze.step(end, move) for move in _OPPOSITE)])
        if goal == maze.start or goal in maze.holes:
            continue
        if goal != maze.goal:
            maze = maze.with_goal(goal)
            if shortest_path(maze) is None:
                continue
        if simulate(maze, plan).outcome == outcome:
            return maze, plan


def _walk(maze: Maze, length: int, gait: str, careful: int, rng: random.Random) -> tuple[str, list[Cell]]:
    """A plan and the cells it visits, as if holes could be crossed; the first `careful` moves enter none."""
    plan, cells = "", [maze.start]
    while len(plan) < length:
        here = cells[-1]
        moves = [move for move in _OPPOSITE if gait == "blunder" or maze.step(here, move) != here]
        if len(plan) < careful:
            moves = [move for move in moves if maze[maze.step(here, move)] != "H"]
        if gait == "stride" and plan:
            moves = [move for move in moves if move != _OPPOSITE[plan[-1]]] or moves
        plan += rng.choice(moves)
        cells.append(maze.step(here, plan[-1]))
    return plan, cells

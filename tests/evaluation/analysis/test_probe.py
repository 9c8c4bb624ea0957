"""Probes find what was planted, find nothing in noise, and are ridge regressions by the book."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from test_material import planted

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis import probe
from mirage_vlm.evaluation.analysis.material import Picture
from mirage_vlm.evaluation.intervals import wilson
from mirage_vlm.tasks.frozenlake import Maze, generate_maze, shortest_path
from mirage_vlm.trajectory import Trajectory

SIDE = 3


def mazes(n, side=SIDE, seed=0):
    rng = random.Random(seed)
    found = {}
    while len(found) < n:
        found[generate_maze(side, rng)] = None
    return list(found)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def textbook(x, y, new, penalty):
    """Ridge on standardised inputs by the normal equations, the intercept a column that is not penalised."""
    x, y, new = x.double(), y.double(), new.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    a, b = ((part - mean) / std for part in (x, new))
    a = torch.cat([a, torch.ones(len(a), 1).double()], dim=1)
    b = torch.cat([b, torch.ones(len(b), 1).double()], dim=1)
    free = penalty * torch.eye(a.shape[1]).double()
    free[-1, -1] = 0
    return b @ torch.linalg.solve(a.T @ a + free, a.T @ y)


@pytest.mark.parametrize("noise", [0.05, 1.0, 30.0])
def test_ridge_by_the_book(noise):
    """The penalty is the one that leaving out each example in turn says is best, by fitting n times."""
    x, new = normal(30, 12), normal(9, 12, seed=1)
    y = x @ normal(12, 3, seed=2) + noise * normal(30, 3, seed=3)
    standard = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    scale = float(torch.linalg.eigvalsh((standard @ standard.T).double()).clamp(min=0).mean())
    errors = {}
    for penalty in probe.PENALTIES:
        # the scale of the inputs is that of all, as the closed form has it
        left = [textbook_at(standard, y, i, penalty * scale) - y[i].double() for i in range(len(x))]
        errors[penalty] = float(torch.stack(left).square().sum())
    best = min(errors, key=errors.get)
    wanted = textbook(x, y, new, best * scale)
    assert torch.allclose(probe.ridge(x, y, new), wanted, atol=1e-4 * float(y.abs().max()))


def textbook_at(standard, y, i, penalty):
    """The prediction for example i of a fit to all others."""
    rest = [j for j in range(len(y)) if j != i]
    a = torch.cat([standard, torch.ones(len(standard), 1)], dim=1).double()
    free = penalty * torch.eye(a.shape[1]).double()
    free[-1, -1] = 0
    return a[i] @ torch.linalg.solve(a[rest].T @ a[rest] + free, a[rest].T @ y[rest].double())


def test_what_is_constant_says_nothing():
    x, y = normal(20, 3), normal(20, 2, seed=1)
    wide = torch.cat([x, torch.full((20, 2), 1e4)], dim=1)
    new = torch.cat([normal(5, 3, seed=2), torch.full((5, 2), -1e4)], dim=1)
    assert torch.allclose(probe.ridge(wide, y, new), probe.ridge(x, y, new[:, :3]), atol=1e-5)
    assert torch.allclose(probe.ridge(torch.ones(20, 3), y, torch.zeros(5, 3)), y.double().mean(dim=0).expand(5, -1))


def test_questions():
    maps = mazes(30)
    asked = probe.questions(maps)
    for i, maze in enumerate(maps):
        way = shortest_path(maze)
        for cell in maze.cells():
            at = cell[0] * SIDE + cell[1]
            assert asked["hole"].wanted[i, at] == (maze[cell] == "H")
            assert asked["path"].wanted[i, at] == (cell in way)
            assert asked["start"].wanted[i, at] == (maze[cell] == "S")
            assert asked["goal"].wanted[i, at] == (maze[cell] == "G")


def test_planted_signals_are_found_and_noise_is_not():
    maps = mazes(200)
    asked = probe.questions(maps)
    truth = torch.cat([asked["hole"].wanted, asked["goal"].wanted], dim=1).float()
    latents = truth @ normal(truth.shape[1], 64) + 0.01 * normal(200, 64, seed=1)
    found = probe.probe({"latents": latents, "patches": normal(200, 64, seed=2)}, asked)
    assert found["fitted"] == found["tested"] == 100
    for name in ("hole", "goal"):
        own = found["questions"][name]
        assert own["latents"]["accuracy"] > 0.99
        for nothing in ("shuffled", "patches"):
            assert abs(own[nothing]["accuracy"] - own["majority"]["accuracy"]) < 0.1
    start = found["questions"]["start"]
    assert start["latents"]["accuracy"] < start["majority"]["ci95"][1] + 0.15, "which was not planted but for the holes"


def test_majority_and_intervals_against_a_loop():
    maps = mazes(40)
    asked = probe.questions(maps)
    found = probe.probe({"latents": normal(40, 6)}, asked, seed=5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5)).tolist()
    fit, test = [maps[i] for i in order[:20]], [maps[i] for i in order[20:]]
    hits = 0
    for cell in maps[0].cells():
        usual = sum(maze[cell] == "H" for maze in fit) > 10
        hits += sum((maze[cell] == "H") == usual for maze in test)
    holes = found["questions"]["hole"]["majority"]
    assert holes["n"] == 20 * SIDE**2 and holes["accuracy"] == hits / holes["n"]
    assert holes["ci95"] == list(wilson(hits, holes["n"]))
    goals = [maze.goal for maze in fit]
    most = max(goals.count(cell) for cell in goals)
    right = {cell: sum(maze.goal == cell for maze in test) / 20 for cell in goals if goals.count(cell) == most}
    assert found["questions"]["goal"]["majority"]["accuracy"] in right.values()
    assert found["questions"]["goal"]["majority"]["n"] == 20


def example(maze, latents, features=None, targets=()):
    trajectory = Trajectory((), meta={"map": list(maze.rows)})
    shown = () if features is None else (Picture(None, features, (maze.size, maze.size)),)
    return replace(planted(latents), trajectory=trajectory, pictures=shown, targets=targets)


def test_a_level_at_a_time_and_each_map_once():
    small, large = mazes(20), mazes(24, side=4, seed=1)
    examples = [example(maze, normal(2, 5, seed=i), normal(9, 5, seed=i)) for i, maze in enumerate(small)]
    examples += [example(maze, normal(2, 5, seed=i)) for i, maze in enumerate(large)]
    numbers = probe.measure([*examples, examples[0], replace(planted(normal(2, 5)), trajectory=Trajectory(()))])
    assert list(numbers["levels"]) == ["3", "4"] and numbers["left_out"] == 2
    three, four = numbers["levels"].values()
    assert (three["fitted"], three["tested"], three["latents_each"]) == (10, 10, 2) and four["fitted"] == 12
    assert list(three["questions"]["hole"]) == ["majority", "shuffled", "latents", "picture", "patches"]
    assert list(four["questions"]["hole"]) == ["majority", "shuffled", "latents"], "no pictures there"
    assert json.loads(json.dumps(numbers)) == numbers
    rows = probe.table(numbers)
    assert len(rows) == 1 + 2 * 4 and {len(row) for row in rows} == {len(rows[0])}
    assert rows[0][:3] == ["level", "read", "n"] and rows[5][-1] == "–"
    assert rows[0][rows[0].index("latents") + 1] == "95 %"
    figure = probe.draw(numbers)
    assert len(figure.axes) == 2
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    wanted = [100 * row["accuracy"] for question in four["questions"].values() for row in question.values()]
    assert heights == pytest.approx(wanted)


def test_sources_are_what_they_are_called():
    maps = mazes(10)
    latents, features, targets = normal(10, 2, 5), normal(10, 9, 5, seed=1), normal(10, 2, 5, seed=2)
    examples = [example(m, x, f, (t,)) for m, x, f, t in zip(maps, latents, features, targets, strict=True)]
    found = probe._sources(latents, examples)
    assert torch.equal(found["latents"], latents.flatten(1)) and torch.equal(found["targets"], targets.flatten(1))
    assert torch.equal(found["patches"], features.flatten(1))
    halves = torch.cat([features[:, :4].mean(dim=1), features[:, 4:8].mean(dim=1)], dim=1)
    assert torch.allclose(found["picture"], halves)


def test_too_few_maps_and_bad_ones():
    maps = mazes(probe.FEWEST)
    examples = [example(maze, normal(2, 5, seed=i)) for i, maze in enumerate(maps)]
    assert probe.measure(examples)["levels"]["3"]["fitted"] == probe.FEWEST // 2
    with pytest.raises(MirageError, match=f"at least {probe.FEWEST} different maps of one side"):
        probe.measure(examples[1:] + examples[1:])
    bad = replace(examples[0], trajectory=Trajectory((), meta={"map": ["SX", "FG"]}))
    with pytest.raises(MirageError, match="letters S, F, H and G only"):
        probe.measure([*examples, bad])
    assert Maze.from_rows(maps[0].rows) == maps[0]

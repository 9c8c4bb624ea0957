"""What can be read of the map from the latents by a linear probe, and what from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis.figures import COLOURS, new_figure
from mirage_vlm.evaluation.analysis.material import Example, block
from mirage_vlm.evaluation.intervals import wilson
from mirage_vlm.modeling.pooling import pool
from mirage_vlm.tasks.base import map_of
from mirage_vlm.tasks.frozenlake import Cell, Maze, shortest_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 8  # different maps of a level: four to fit, four to test
PENALTIES = [10.0**power for power in range(-5, 6)]  # in multiples of the mean eigenvalue
QUESTIONS = {
    "hole": "is it a hole? (each cell)",
    "path": "is it on the path? (each cell)",
    "start": "which cell is the start?",
    "goal": "which cell is the gift?",
}
ABOUT = {  # what a probe reads
    "majority": "nothing: the commonest answer",
    "shuffled": "another example's latents",
    "latents": "the latents",
    "targets": "the pooled helper image",
    "picture": "the prompt's picture, pooled alike",
    "patches": "every patch of the prompt's picture",
}
_COLOURS = {"majority": "#c9ccd1", "shuffled": "#8d939c", "picture": "#2f7f93", "patches": "#9cc4cf"}


@dataclass(frozen=True)
class Question:
    """What is asked of N maps.

    Attributes:
        wanted: [N, C] float64, zeros and ones.
        one: exactly one of the C is right, and the largest of the predictions is taken; otherwise each is decided by
            itself, at one half.
    """

    wanted: torch.Tensor
    one: bool

    def hits(self, predicted: torch.Tensor, rows: torch.Tensor) -> tuple[int, int]:
        """How many of [m, C] predictions for these rows are right, and of how many decisions."""
        wanted = self.wanted[rows]
        right = predicted.argmax(dim=1) == wanted.argmax(dim=1) if self.one else (predicted > 0.5) == (wanted > 0.5)
        return int(right.sum()), right.numel()


def measure(examples: Sequence[Example], seed: int = 0) -> dict[str, Any]:
    """Probe each level (side of the map) by itself: fitted on one half of its maps, tested on the other.

    A map counts once, so that no map of the test was fitted on. Of each response the first K latents are read together,
    K as `block` takes it.

    Args:
        seed: of the halves.

    Returns:
        `levels`, for each: `fitted` and `tested` numbers of maps, `latents_each` K, and for each of `QUESTIONS` for
        each source of `ABOUT` that there is the `accuracy` with its Wilson interval `ci95` and the number of
        decisions `n`. `left_out`: examples of levels with fewer than `FEWEST` maps, with fewer latents, without a map,
        or with one that is there already.

    Raises:
        MirageError: no level has enough maps, or a map is malformed.
    """
    levels: dict[int, dict[Maze, Example]] = {}
    for example in examples:
        if "map" in example.trajectory.meta:
            maze = map_of(example.trajectory.meta)
            levels.setdefault(maze.size, {}).setdefault(maze, example)
    found, used = {}, 0
    for level, maps in sorted(levels.items()):
        latents, chosen = block(list(maps.values()))
        if len(chosen) < FEWEST:
            continue
        used += len(chosen)
        mazes = [list(maps)[i] for i in chosen]
        sources = _sources(latents, [list(maps.values())[i] for i in chosen])
        found[str(level)] = {"latents_each": latents.shape[1], **probe(sources, questions(mazes), seed)}
    if not found:
        raise MirageError(
            f"a probe needs at least {FEWEST} different maps of one side in the examples' meta, and latents for them: "
            "make more with --n, or of fewer --levels"
        )
    return {"levels": found, "left_out": len(examples) - used}


def questions(mazes: Sequence[Maze]) -> dict[str, Question]:
    """What is asked of maps of one side; the path is the solver's, one of the shortest."""

    def ones(cells: Sequence[Sequence[Cell] | frozenset[Cell]]) -> torch.Tensor:
        side = mazes[0].size
        found = torch.zeros(len(mazes), side * side, dtype=torch.float64)
        for i, own in enumerate(cells):
            found[i, [row * side + column for row, column in own]] = 1
        return found

    return {
        "hole": Question(ones([maze.holes for maze in mazes]), one=False),
        "path": Question(ones([shortest_path(maze) or () for maze in mazes]), one=False),
        "start": Question(ones([[maze.start] for maze in mazes]), one=True),
        "goal": Question(ones([[maze.goal] for maze in mazes]), one=True),
    }


def _sources(latents: torch.Tensor, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """What probes read of each example, [N, F] each."""
    k = latents.shape[1]
    found = {"latents": latents}
    if all(example.targets for example in examples):
        found["targets"] = torch.stack([torch.cat(list(example.targets))[:k] for example in examples])
    pictures = [example.pictures[0] for example in examples if example.pictures]
    if len(pictures) == len(examples):
        if all(len(picture.features) >= k for picture in pictures):
            found["picture"] = torch.stack([pool(p.features, p.grid, k, "average") for p in pictures])
        if len({picture.grid for picture in pictures}) == 1:
            found["patches"] = torch.stack([picture.features for picture in pictures])
    return {name: vectors.flatten(1) for name, vectors in found.items()}


def probe(sources: Mapping[str, torch.Tensor], asked: Mapping[str, Question], seed: int = 0) -> dict[str, Any]:
    """Fit and test every source on every question; `majority` and `shuffled` are added.

    Args:
        sources: [N, F] each, `latents` among them.

    Returns:
        `fitted`, `tested`, and in `questions` for each question and source `accuracy`, `ci95`, `n`.
    """
    order = torch.randperm(len(sources["latents"]), generator=torch.Generator().manual_seed(seed))
    fit, test = order[: len(order) // 2], order[len(order) // 2 :]
    results: dict[str, dict[str, Any]] = {}
    for name, question in asked.items():
        wanted = question.wanted[fit]
        predicted = {"majority": wanted.mean(dim=0).expand(len(test), -1)}
        # turned on by one within each half: nobody keeps their own, and no test map's latents are fitted on
        predicted["shuffled"] = ridge(sources["latents"][fit.roll(1)], wanted, sources["latents"][test.roll(1)])
        predicted |= {source: ridge(read[fit], wanted, read[test]) for source, read in sources.items()}
        results[name] = {}
        for source in ABOUT:
            if source in predicted:
                hits, n = question.hits(predicted[source], test)
                results[name][source] = {"accuracy": hits / n, "ci95": list(wilson(hits, n)), "n": n}
    return {"fitted": len(fit), "tested": len(test), "questions": results}


def ridge(x: torch.Tensor, y: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Ridge regression in closed form, on standardised inputs, with an intercept that is not penalised.

    Of `PENALTIES` the one with the least squared error when each example is predicted by the others is taken, so the
    test half has no say in it.

    Args:
        x: [n, F] inputs to fit, n > 1.
        y: [n, C] outputs.
        new: [m, F].

    Returns:
        [m, C] float64 predictions for `new`.
    """
    x, y, new = x.double(), y.double(), new.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.inf)  # what is constant says nothing
    x, new = (x - mean) / std, (new - mean) / std
    centred = y - y.mean(dim=0)
    values, axes = torch.linalg.eigh(x @ x.T)  # n is far below F, so the dual
    values = values.clamp(min=0)
    turned = axes.T @ centred  # [n, C]
    scale = float(values.mean()) or 1.0
    best, least = PENALTIES[-1], torch.inf
    for penalty in PENALTIES:
        shrunk = values / (values + penalty * scale)
        leverage = axes.square() @ shrunk + 1 / len(y)
        left = (centred - axes @ (shrunk[:, None] * turned)) / (1 - leverage).clamp(min=1e-9)[:, None]
        if (error := float(left.square().sum())) < least:
            best, least = penalty, error
    weights = axes @ (turned / (values + best * scale)[:, None])
    return new @ x.T @ weights + y.mean(dim=0)


def table(numbers: Mapping[str, Any]) -> list[list[str]]:
    """Accuracy in percent of each question and source, by level; the first row names the columns.

    The interval is that of the latents.
    """
    sources = [
        s for s in ABOUT if any(s in q for level in numbers["levels"].values() for q in level["questions"].values())
    ]
    headings = list(sources)
    headings.insert(sources.index("latents") + 1, "95 %")
    rows = [["level", "read", "n", *headings]]
    for level, found in numbers["levels"].items():
        for question, by_source in found["questions"].items():
            shown = ["–" if s not in by_source else f"{100 * by_source[s]['accuracy']:.1f}" for s in sources]
            low, high = by_source["latents"]["ci95"]
            at = sources.index("latents") + 1
            shown.insert(at, f"{100 * low:.1f}–{100 * high:.1f}")
            rows.append([level, question, str(by_source["latents"]["n"]), *shown])
    return rows


def draw(numbers: Mapping[str, Any]) -> Figure:
    """A row for each level, a group of bars for each question."""
    levels = numbers["levels"]
    figure = new_figure(9, 1.0 + 2.4 * len(levels))
    for axes, (level, found) in zip(figure.subplots(len(levels), 1, squeeze=False)[:, 0], levels.items(), strict=True):
        for g, by_source in enumerate(found["questions"].values()):
            for b, (source, row) in enumerate(by_source.items()):
                low, high = row["ci95"]
                at = g + (b - (len(by_source) - 1) / 2) * 0.9 / len(by_source)
                axes.bar(
                    at,
                    100 * row["accuracy"],
                    width=0.85 / len(by_source),
                    color=_COLOURS.get(source) or COLOURS[source],
                    label=ABOUT[source] if g == 0 else None,
                    yerr=[[100 * max(0.0, row["accuracy"] - low)], [100 * max(0.0, high - row["accuracy"])]],
                    error_kw={"elinewidth": 0.8, "ecolor": "#30343b"},
                )
        axes.set_xticks(range(len(found["questions"])), [QUESTIONS[name] for name in found["questions"]], fontsize=8)
        axes.set_ylabel(f"% right, side {level}", fontsize=9)
        axes.set_ylim(0, 102)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure

"""A metric of a study's runs over their steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.plots import check_figure, save_figure
from mirage_vlm.evaluation.study import Row, Study, recipes_of
from mirage_vlm.tasks.base import count
from mirage_vlm.training.checkpoints import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#30343b", "#c4502f", "#2f7f93", "#b08a2e", "#6f5a9c", "#5b8c4a")

Curve = dict[int, float]  # step → value


def curves(study: Study, row: Row, metric: str) -> dict[int, Curve]:
    """The metric of a row's last recipe, seed by seed, as far as they have come."""
    found = {}
    for seed in study.seeds_of(row) if row.recipes else ():
        file = Path(recipes_of(study, row, seed)[-1].output_dir) / METRICS_FILE
        if file.exists():
            whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")  # a killed run leaves half a line
            lines = map(json.loads, whole.splitlines())
            curve = {line["step"]: _number(line[metric], metric, file) for line in lines if metric in line}
            if curve:
                found[seed] = curve
    return found


def _number(value: object, metric: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MirageError(f"{file}: {metric}: {value!r} is no number")
    return float(value)


def draw_curves(study: Study, metric: str, path: str | Path) -> None:
    """Write the figure.

    Raises:
        MirageError: no run has the metric; as `check_figure`; or the file cannot be written.
    """
    check_figure(path)
    save_figure(curve_figure(study, metric), path)


def curve_figure(study: Study, metric: str) -> Figure:
    """A line for each row, the mean of its seeds where all of them are, and a thin one for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    drawn = [(row, found) for row in study.rows if (found := curves(study, row, metric))]
    if not drawn:
        raise MirageError(f"{study.output}: no run has the metric {metric!r}")
    for (row, found), colour in zip(drawn, COLOURS * len(drawn), strict=False):
        for curve in found.values():
            axes.plot(list(curve), list(curve.values()), color=colour, linewidth=0.6, alpha=0.5)
        steps = sorted(set.intersection(*map(set, found.values())))
        mean = [sum(curve[step] for curve in found.values()) / len(found) for step in steps]
        axes.plot(steps, mean, color=colour, linewidth=2, label=f"{row.name} ({count(len(found), 'seed')})")
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure

"""What a study came to: a page with its tables, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mirage_vlm.evaluation.intervals import ahead_over_seeds, in_points, over_seeds
from mirage_vlm.evaluation.plots import EMPTY, INFORMATIVE, SELF, check_figure, save_figure
from mirage_vlm.evaluation.replace import REPLACEMENTS
from mirage_vlm.evaluation.study import Outcome, Row, Study, Test, correct, outcomes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Interval = tuple[float, float, float]  # mean, low, high


@dataclass(frozen=True)
class Line:
    """A row of the table: its runs, and their outcomes on the items that all rows share."""

    row: Row
    runs: Sequence[Outcome]

    def right(self, replacement: str = "self") -> np.ndarray:
        """[S, N] outcomes of each seed."""
        return np.array([correct(run.results, replacement) for run in self.runs], dtype=float)

    def accuracy(self) -> Interval:
        mean, low, high = over_seeds(self.right().tolist())
        return mean, max(0.0, low), min(1.0, high)

    def mean(self, replacement: str) -> float:
        """Accuracy in percent, without its interval."""
        return 100 * float(self.right(replacement).mean())

    def ahead(self, other: Line) -> Interval:
        """This row − another, item by item."""
        return ahead_over_seeds(self.right().tolist(), other.right().tolist())

    def gain(self, replacement: str) -> Interval:
        """Its own latents − a replacement, seed by seed and item by item."""
        return over_seeds((self.right() - self.right(replacement)).tolist())

    def best_empty(self) -> str | None:
        """Of the replacements that tell nothing of the example, that which costs least."""
        return max((r for r in self.replacements() if REPLACEMENTS[r].empty), key=self.mean, default=None)

    def replacements(self) -> list[str]:
        """Those that all its runs have, `self` left out."""
        there = [run.results.get("replacements", {}) for run in self.runs]
        return [name for name in REPLACEMENTS if name != "self" and all(name in found for found in there)]


def lines(study: Study, test: Test | None = None) -> list[Line]:
    """The rows of which at least one seed is done, in the order of the study; by default in the main test."""
    return [Line(row, runs) for row in study.rows if (runs := outcomes(study, row, test))]


def page(study: Study, command: str, picture: str | None = None) -> str:
    """Markdown: one table of all rows, and one of the replacement test.

    Args:
        command: that makes this page.
        picture: the figure, as the page links to it.
    """
    done = lines(study)
    reference = _reference(study, done)
    test = study.test
    levels = ", ".join(map(str, test.levels))
    head = ["# Results", ""]
    if picture is not None:
        head += [
            f"![accuracy of each row, with what replaces its latents]({picture})",
            "",
            "Bars: accuracy with the model's own latents, where it has any. Dots: what is left with the best of the "
            "empty replacements (zeros, noise, another example's latents, no latents, no span). Diamonds: with the "
            "helper image itself as latents. A long way from the end of a bar to its dot means that the content of the "
            "latents is used.",
            "",
        ]
    parts = [
        *head,
        f"Made by `{command}`. Test: {test.n} held-out `{test.task}` maps of sides {levels}, the same for every row. "
        "Accuracy in percent, the mean of the seeds, with a 95 % interval over seeds and maps (over maps alone where "
        "there is one seed).",
        "",
        f"| base | row | helper image | seeds | maps | steps | seconds | accuracy | 95 % | − {study.against} | 95 % |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in done:
        run = line.runs[0]
        seconds = sum(each.seconds for each in line.runs) / len(line.runs)
        cells = (line.row.base, line.row.name, line.row.helper, len(line.runs), f"{run.examples:,}", f"{run.steps:,}")
        parts.append("| " + " | ".join(map(str, (*cells, f"{seconds:,.0f}", *_shown(line, reference)))) + " |")
    tested = [line for line in done if line.replacements()]
    if tested:
        names = [name for name in REPLACEMENTS if any(name in line.replacements() for line in tested) or name == "self"]
        parts += ["", "With something else in the place of the latents:", ""]
        parts += ["| base | row | " + " | ".join(names) + " | self − best empty | 95 % |"]
        parts += ["|---|---|" + "---|" * (len(names) + 2)]
        for line in tested:
            there = ("self", *line.replacements())
            shown = [f"{line.mean(name):.1f}" if name in there else "–" for name in names]
            if (best := line.best_empty()) is None:
                shown += ["–", "–"]
            else:
                gain, *ends = line.gain(best)
                shown += [f"{100 * gain:+.1f} ({best})", in_points(ends)]
            parts.append(f"| {line.row.base} | {line.row.name} | " + " | ".join(shown) + " |")
    for test in study.also:
        parts += ["", *_further(study, test)]
    parts += ["", "| row | what it is |", "|---|---|"]
    parts += [f"| {line.row.name} | {line.row.about} |" for line in done]
    return "\n".join(parts) + "\n"


def _reference(study: Study, done: Sequence[Line]) -> Line | None:
    """The row that others are compared with, where it is done."""
    return next((line for line in done if line.row.name == study.against), None)


def _shown(line: Line, reference: Line | None) -> tuple[str, str, str, str]:
    """The cells of a table: accuracy and its interval, and what it is ahead of the reference by."""
    mean, low, high = line.accuracy()
    ahead = ("", "")
    if reference is not None and line is not reference:
        difference, *ends = line.ahead(reference)
        ahead = (f"{100 * difference:+.1f}", in_points(ends))
    return f"{100 * mean:.1f}", f"{100 * low:.1f}–{100 * high:.1f}", *ahead


def _further(study: Study, test: Test) -> list[str]:
    """The table of a further test."""
    levels = ", ".join(map(str, test.levels))
    parts = [
        f"**{test.name}**: {test.n} held-out `{test.task}` maps of sides {levels}.",
        "",
        f"| base | row | seeds | accuracy | 95 % | − {study.against} | 95 % |",
        "|---|---|---|---|---|---|---|",
    ]
    done = lines(study, test)
    reference = _reference(study, done)
    for line in done:
        cells = (line.row.base, line.row.name, len(line.runs), *_shown(line, reference))
        parts.append("| " + " | ".join(map(str, cells)) + " |")
    return parts


def draw(study: Study, path: str | Path) -> None:
    """Write the figure of a study.

    Raises:
        MirageError: as `check_figure`, or the file cannot be written.
    """
    check_figure(path)
    save_figure(figure(study), path)


def figure(study: Study) -> Figure:
    """A bar for each row, a dot where the best empty replacement of its latents leaves it, and one for the oracle."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    done = lines(study)
    drawn = Figure(figsize=(8, 1.6 + 0.36 * len(done)), layout="constrained")
    axes = drawn.add_subplot()
    for y, line in enumerate(done):
        mean, low, high = (100 * value for value in line.accuracy())
        axes.barh(y, mean, height=0.62, color="#c9ccd1" if line.row.helper != "both" else "#e6e7ea")
        axes.errorbar(mean, y, xerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]], color=SELF, capsize=3)
        axes.annotate(f"{mean:.1f}", (high, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
        if (best := line.best_empty()) is not None:
            axes.plot(line.mean(best), y, "o", color=EMPTY)
        if "oracle" in line.replacements():
            axes.plot(line.mean("oracle"), y, "D", color=INFORMATIVE, markersize=5)
    axes.set_yticks(range(len(done)), [f"{line.row.base}: {line.row.name}" for line in done])
    axes.set_ylim(len(done) - 0.4, -0.6)
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"accuracy in %, {study.test.n} held-out maps")
    axes.spines[["top", "right"]].set_visible(False)
    marks = [
        Line2D([], [], color=EMPTY, marker="o", linestyle="", label="best empty replacement of its latents"),
        Line2D([], [], color=INFORMATIVE, marker="D", linestyle="", label="oracle latents"),
    ]
    drawn.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return drawn

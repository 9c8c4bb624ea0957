"""What a study came to: a page with its tables, and a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mirage_vlm.evaluation.intervals import ahead_over_seeds, in_points, over_seeds, wilson
from mirage_vlm.evaluation.plots import EMPTY, INFORMATIVE, SELF, check_figure, save_figure
from mirage_vlm.evaluation.replace import REPLACEMENTS
from mirage_vlm.evaluation.study import HELPER, Outcome, Row, Study, Test, correct, outcomes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Interval = tuple[float, float, float]  # mean, low, high
ALONE = "†"  # marks an interval that does not know how seeds scatter


@dataclass(frozen=True)
class Line:
    """A row of the table: its runs, and their outcomes on the items that all rows share."""

    row: Row
    runs: Sequence[Outcome]

    def right(self, replacement: str = "self") -> np.ndarray:
        """[S, N] outcomes of each seed."""
        return np.array([correct(run.results, replacement) for run in self.runs], dtype=float)

    def accuracy(self) -> Interval:
        right = self.right()
        if len(right) == 1:
            return float(right.mean()), *wilson(int(right.sum()), right.size)
        mean, low, high = over_seeds(right.tolist())
        return mean, max(0.0, low), min(1.0, high)

    def optimal(self) -> float | None:
        """Share of right plans as short as can be, in percent; None where answers are no plans."""
        shares = [share for run in self.runs if (share := run.results["optimal_rate"]) is not None]
        return 100 * sum(shares) / len(shares) if shares else None

    def latent_rate(self) -> float:
        """Share of responses that consumed latents, in percent."""
        return self.share("latent_rate")

    def share(self, name: str) -> float:
        """A share of responses that every run has measured, in percent, the mean of its runs."""
        return 100 * sum(run.results[name] for run in self.runs) / len(self.runs)

    def mark(self, *others: Line) -> str:
        """What an interval of this row, or of it and others, bears."""
        return ALONE if any(len(line.runs) == 1 and line.row.recipes for line in (self, *others)) else ""

    def mean(self, replacement: str) -> float:
        """Accuracy in percent, without its interval."""
        return 100 * float(self.right(replacement).mean())

    def ahead(self, other: Line) -> Interval:
        """This row − another, item by item."""
        return ahead_over_seeds(self.right().tolist(), other.right().tolist())

    def gain(self, replacement: str) -> Interval:
        """Its own latents − a replacement, seed by seed and item by item."""
        return over_seeds((self.right() - self.right(replacement)).tolist())

    def seconds(self) -> float:
        """Of training, the mean of its runs."""
        return sum(run.seconds for run in self.runs) / len(self.runs)

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
    test = study.test
    head = [f"# {study.title}", ""]
    if picture is not None:
        head += [
            f"![accuracy of each row, with what replaces its latents]({picture})",
            "",
            "Bars: accuracy with the model's own latents, where it has any. Dots: what is left with the best of the "
            "empty replacements (zeros, noise, another example's latents, no latents, no span). Diamonds: with the "
            "right latents, those that it was taught to have. A long way from the end of a bar to its dot means that "
            "the content of the latents is used." + (" Not all rows of the tables are shown." if study.figure else ""),
            "",
        ]
    if study.summary:
        head += [study.summary.strip(), ""]
    also = [{line.row.name: line for line in lines(study, each)} for each in study.also]
    further = "".join(
        f"; {each.name}: {_about(each, [*found.values()])}" for each, found in zip(study.also, also, strict=True)
    )
    plans = any(line.optimal() is not None for line in done)
    think = any(line.latent_rate() > 0 for line in (*done, *chain.from_iterable(each.values() for each in also)))
    columns = _columns(study, "accuracy", ("latents",) if think else ())
    if plans:
        columns.insert(2, "optimal")
    more = "; optimal: right in the fewest moves" if plans else ""
    more += "; latents: the share of responses that consumed any" if think else ""
    parts = [
        *head,
        f"Made by `{command}`. Test: {_about(test, done)}, the same for every row{further}. Accuracy in percent, the "
        f"mean of the seeds, with a 95 % interval over seeds and items; {ALONE}: over items alone, where a row was "
        f"trained with one seed, so that the scatter of seeds is in none of its intervals{more}. Helper image: where a "
        "row sees it, or how it is told in training what the picture shows.",
        *_cut(study, (done, *(each.values() for each in also))),
        "",
        _header("base", "row", "helper image", "seeds", "examples", "steps", "seconds", *columns),
    ]
    for line in done:
        run = line.runs[0]
        helper = HELPER[line.row.helper]
        about = (line.row.base, line.row.name, helper, len(line.runs), f"{run.examples:,}", f"{run.steps:,}")
        tests = (line, *(others.get(line.row.name) for others in also))
        shown = [cell for each in tests for cell in (*_accuracy(each), *([_latents(each)] if think else []))]
        if plans:
            shown.insert(2, "–" if (share := line.optimal()) is None else f"{share:.1f}")
        parts.append(_cells(*about, f"{line.seconds():,.0f}", *shown))
    parts += _differences(study, {line.row.name: line for line in done}, also)
    parts += _replaced(done)
    parts += ["", _header("row", "what it is"), *(_cells(line.row.name, line.row.about) for line in done)]
    return "\n".join(parts) + "\n"


def _about(test: Test, done: Sequence[Line]) -> str:
    if test.data:
        n = done[0].runs[0].results["n"] if done else "the"
        return f"{n} examples of `{test.data}`"
    levels = ", ".join(map(str, test.levels))
    what = "maps of sides" if test.task.startswith("vsp-") else "examples of levels"
    return f"{test.n} held-out `{test.task}` {what} {levels}"


def _cells(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _header(*names: str) -> str:
    return _cells(*names) + "\n" + "|---" * len(names) + "|"


def _columns(study: Study, name: str, more: Sequence[str] = ()) -> list[str]:
    """A column for each test, one for its interval, and more."""
    return [column for each in (name, *(test.name for test in study.also)) for column in (each, "95 %", *more)]


def _accuracy(line: Line | None) -> tuple[str, str]:
    if line is None:
        return "–", "–"
    mean, low, high = line.accuracy()
    return f"{100 * mean:.1f}", f"{100 * low:.1f}–{100 * high:.1f}{line.mark()}"


def _latents(line: Line | None) -> str:
    return "–" if line is None else f"{line.latent_rate():.0f}"


def _ahead(line: Line | None, other: Line | None) -> tuple[str, str]:
    if line is None or other is None:
        return "–", "–"
    if not (line.right()[:, None] != other.right()[None]).any():
        return "+0.0", f"none of {line.right().shape[1]:,} examples differs"
    return _points(line.ahead(other), line.mark(other))


def _differences(study: Study, done: Mapping[str, Line], also: Sequence[Mapping[str, Line]]) -> list[str]:
    """What each row is ahead of those that it is compared with, with the training that both had."""
    parts = []
    for line in done.values():
        for name in line.row.against:
            if (other := done.get(name)) is None:
                continue
            pairs = [(found.get(line.row.name), found.get(name)) for found in (done, *also)]
            seconds = f"{line.seconds() / other.seconds():.2f}" if other.seconds() else "–"
            shown = chain.from_iterable(_ahead(*pair) for pair in pairs)
            parts.append(_cells(line.row.base, f"{line.row.name} − {name}", _seeds(line, other), seconds, *shown))
    if not parts:
        return []
    header = _header("base", "rows", "seeds", "seconds, ratio", *_columns(study, "points"))
    return ["", "The difference of two rows on the same items, in points:", "", header, *parts]


def _replaced(done: Sequence[Line]) -> list[str]:
    """Accuracies with something else in the place of the latents."""
    tested = [line for line in done if line.replacements()]
    if not tested:
        return []
    names = [name for name in REPLACEMENTS if any(name in ("self", *line.replacements()) for line in tested)]
    parts = ["", "With something else in the place of the latents:", ""]
    gaps = ("self − best empty", "95 %", *(("self − oracle", "95 %") if "oracle" in names else ()))
    parts.append(_header("base", "row", "seeds", *names, *gaps))
    for line in tested:
        there = ("self", *line.replacements())
        shown = [f"{line.mean(name):.1f}" if name in there else "–" for name in names]
        best = line.best_empty()
        for other, name in ((best, f" ({best})"), *([("oracle", "")] if "oracle" in names else [])):
            if other not in there:
                shown += ["–", "–"]
                continue
            gain, ends = _points(line.gain(other), line.mark())
            if not (differ := line.right() != line.right(other)).any():
                ends = f"none of {differ.size:,} responses differs"
            shown += [gain + name, ends]
        parts.append(_cells(line.row.base, line.row.name, len(line.runs), *shown))
    return parts


def _points(found: Interval, mark: str) -> tuple[str, str]:
    """A difference and its interval, in points."""
    mean, *ends = found
    return f"{100 * mean:+.1f}", in_points(ends) + mark


def _cut(study: Study, tests: Sequence[Iterable[Line]]) -> list[str]:
    """Which rows are cut short, so that an answer may be missing that would have come."""
    told = [
        f"`{line.row.name}` {rate:.0f} %{f' of {test.name}' if test.name else ''}"
        for test, found in zip((study.test, *study.also), tests, strict=True)
        for line in found
        if (rate := line.share("cut_rate")) >= 1
    ]
    return ["", f"Responses that were cut short at the most tokens: {', '.join(told)}."] if told else []


def _seeds(line: Line, other: Line) -> str:
    return f"{len(line.runs)} and {len(other.runs)}"


def draw(study: Study, path: str | Path) -> None:
    """Write the figure of a study.

    Raises:
        MirageError: as `check_figure`, or the file cannot be written.
    """
    check_figure(path)
    save_figure(figure(study), path)


def figure(study: Study) -> Figure:
    """A bar for each row to be shown, a dot where the best empty replacement of its latents leaves it, and one for the
    oracle."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    done = [line for line in lines(study) if not study.figure or line.row.name in study.figure]
    drawn = Figure(figsize=(8, 1.6 + 0.36 * len(done)), layout="constrained")
    axes = drawn.add_subplot()
    for y, line in enumerate(done):
        mean, low, high = (100 * value for value in line.accuracy())
        axes.barh(y, mean, height=0.62, color="#c9ccd1" if line.row.helper != "both" else "#e6e7ea")
        axes.errorbar(mean, y, xerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]], color=SELF, capsize=3)
        left = low > 12  # where no diamond can be; a short bar has no room for it
        axes.annotate(
            f"{mean:.1f}",
            (low if left else high, y),
            xytext=(-6 if left else 6, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=9,
        )
        if (best := line.best_empty()) is not None:
            axes.plot(line.mean(best), y, "o", color=EMPTY)
        if "oracle" in line.replacements():
            axes.plot(line.mean("oracle"), y, "D", color=INFORMATIVE, markersize=5)
    axes.set_yticks(range(len(done)), [f"{line.row.base}: {line.row.name}" for line in done])
    axes.set_ylim(len(done) - 0.4, -0.6)
    axes.set_xlim(0, 108)
    of_file = _about(study.test, done) if study.test.data else ""
    axes.set_xlabel(f"accuracy in %, {of_file or f'{study.test.n} held-out examples'}")
    axes.spines[["top", "right"]].set_visible(False)
    marks = [
        Line2D([], [], color=EMPTY, marker="o", linestyle="", label="best empty replacement of its latents"),
        Line2D([], [], color=INFORMATIVE, marker="D", linestyle="", label="oracle latents"),
    ]
    drawn.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return drawn

"""Pictures of results. They need matplotlib, which the extra `plot` installs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.replace import REPLACEMENTS
from mirage_vlm.formats import atomic_writer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
SELF, EMPTY, INFORMATIVE = "#30343b", "#c4502f", "#2f7f93"  # bars that can be told apart in grey, too


def check_figure(path: str | Path) -> None:
    """Whether a figure can be drawn there.

    Raises:
        MirageError: the name has another ending than .png and .svg, or matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise MirageError(f"{path}: a figure is written as {' or '.join(SUFFIXES)}; name the file so")
    if find_spec("matplotlib") is None:
        raise MirageError("a figure needs matplotlib: pip install 'mirage-vlm[plot]'")


def replacement_bars(summary: Mapping[str, Mapping[str, Any]], verdict: str, path: str | Path) -> None:
    """Draw the replacement test: a bar for each replacement's accuracy with its 95 % interval, the verdict above.

    Args:
        summary: as `summarise_replacements` gives it, or `replacements` of a results.json.
        verdict: the title.
        path: the file, .png or .svg; there in full or not at all.

    Raises:
        MirageError: as `check_figure`, or the file cannot be written.
    """
    check_figure(path)
    save_figure(bars(summary, verdict), path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to a .png or .svg file, there in full or not at all; the same figure gives the same bytes.

    Raises:
        MirageError: the file cannot be written.
    """
    import matplotlib

    drawn = io.BytesIO()
    suffix = Path(path).suffix.lower().removeprefix(".")
    with matplotlib.rc_context({"svg.hashsalt": "mirage"}):  # no date, no random names in the SVG
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(drawn, format=suffix, dpi=150, metadata=metadata)
    with atomic_writer(Path(path)) as file:
        file.write(drawn.getvalue())


def bars(summary: Mapping[str, Mapping[str, Any]], verdict: str) -> Figure:
    """The figure that `replacement_bars` writes: `self` on top, then the order of the summary."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = sorted(summary, key=lambda name: name != "self")
    figure = Figure(figsize=(8, 1.7 + 0.32 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    kinds = {"the model's own": SELF, "empty: nothing of the example": EMPTY, "informative": INFORMATIVE}
    for y, name in enumerate(names):
        row = summary[name]
        accuracy = 100 * row["accuracy"]
        low, high = (100 * end for end in row["ci95"])
        colour = SELF if name == "self" else EMPTY if REPLACEMENTS[name].empty else INFORMATIVE
        axes.barh(y, accuracy, height=0.68, color=colour, label=name)
        axes.errorbar(
            accuracy, y, xerr=[[max(0.0, accuracy - low)], [max(0.0, high - accuracy)]], color="#8d939c", capsize=3
        )
        axes.annotate(f"{accuracy:.1f}", (high, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(f"accuracy in %, with 95 % intervals, n = {summary['self']['n']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(fill(verdict, 92), fontsize=10)
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in kinds.items()],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    return figure

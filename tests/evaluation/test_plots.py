"""The figure of the replacement test: its bars are the numbers, its file is whole, its faults are one line."""

import sys

import matplotlib.colors
import PIL.Image
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.plots import EMPTY, INFORMATIVE, SELF, bars, check_figure, replacement_bars

ROWS = {
    "zero": (0.5, [0.4, 0.6]),
    "self": (0.9, [0.85, 0.95]),
    "oracle": (1.0, [0.95, 1.0]),
    "count-matched": (0.97, [0.9, 0.99]),
    "first-repeat": (0.0, [0.0, 0.1]),
    "remove": (0.2, [0.1, 0.3]),
}
SUMMARY = {name: {"n": 100, "accuracy": accuracy, "ci95": ends} for name, (accuracy, ends) in ROWS.items()}
VERDICT = "the latents are used: worse without them: zero -40.0 (-50.0 to -30.0)"


def test_bars_are_the_accuracies_with_their_intervals():
    figure = bars(SUMMARY, VERDICT)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["self", *(name for name in ROWS if name != "self")]
    assert axes.yaxis_inverted(), "the first is on top"
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * ROWS[name][0] for name in names])
    assert [bar.get_y() + bar.get_height() / 2 for bar in axes.patches] == pytest.approx(range(len(names)))
    lines = [collection.get_segments()[0] for collection in axes.collections]
    for name, line in zip(names, lines, strict=True):
        assert sorted(x for x, _ in line) == pytest.approx([100 * end for end in ROWS[name][1]])
    wanted = {"self": SELF, "zero": EMPTY, "remove": EMPTY}
    for name, bar in zip(names, axes.patches, strict=True):
        assert bar.get_facecolor() == matplotlib.colors.to_rgba(wanted.get(name, INFORMATIVE)), name
    assert figure.get_suptitle() == VERDICT and "n = 100" in axes.get_xlabel()


def test_files(tmp_path):
    before = "matplotlib.pyplot" in sys.modules  # another test's
    for name in ("a.png", "b.svg", "c.PNG"):
        replacement_bars(SUMMARY, VERDICT, tmp_path / "new" / name)
    with PIL.Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    svg = (tmp_path / "new" / "b.svg").read_bytes()
    replacement_bars(SUMMARY, VERDICT, tmp_path / "new" / "b.svg")
    assert b"<svg" in svg and (tmp_path / "new" / "b.svg").read_bytes() == svg
    assert ("matplotlib.pyplot" in sys.modules) == before, "no global state, no window"


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(MirageError, match=r"x.gif: a figure is written as .png or .svg"):
        check_figure("x.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(MirageError, match="cannot write"):
        replacement_bars(SUMMARY, VERDICT, tmp_path / "file" / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MirageError, match=r"^a figure needs matplotlib: pip install 'mirage-vlm\[plot\]'$"):
        replacement_bars(SUMMARY, VERDICT, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()

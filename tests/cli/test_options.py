"""What several commands share."""

import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch

from mirage_vlm.cli.main import WAITING, run
from mirage_vlm.cli.options import new_console, new_table, open_sources, show_table, style_of
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.devices import choose_device
from mirage_vlm.tasks import get_task

MAPS = Path(__file__).parents[1] / "data" / "vsp" / "planning.jsonl"
OWN = """
from mirage_vlm.tasks.vsp import Planning

class Short(Planning):
    name = "shorts:SHORT"
    styles = ("terse", "plain")
    mixture = ("terse", "plain")

    def make(self, rng, level, style="terse", cell=64):
        self.check_style(style)
        return super().make(rng, level, "plain", cell)

    def check_style(self, style):
        super().check_style("plain" if style == "terse" else style)

SHORT = Short()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "shorts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "shorts:SHORT"
    sys.modules.pop("shorts", None)


# -- styles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [*get_task("vsp-planning").styles, "mixed"])
def test_plain_maps_take_the_style_that_is_asked_for(style):
    (source,) = open_sources([MAPS], [], (3,), 1, style, 0, 2)
    wanted = "cot" if style == "mixed" else style
    assert [example.meta["style"] for example in source.examples] == [wanted] * 2
    assert source.origin == {"path": str(MAPS), "style": style, "limit": 2}


@pytest.mark.parametrize(
    ("task", "style"), [("vsp-perception", "glimpse"), ("vsp-perception", "look"), ("vsp-planning", "waves")]
)
def test_every_style_of_a_task_is_taken(task, style):
    (source,) = open_sources([], [task], (3,), 2, style, 0, None)
    assert [example.meta["style"] for example in source.examples] == [style] * 2
    assert source.origin["style"] == style


def test_without_a_style_a_task_has_cot_or_its_first(own):
    assert style_of("vsp-planning", None) == "cot" and style_of("vsp-perception", None) == "direct"
    assert style_of(own, None) == "terse" and style_of(own, "mixed") == "mixed"


def test_the_styles_of_a_users_own_task_are_taken(own):
    (source,) = open_sources([], [own], (3,), 2, "terse", 0, None)
    assert len(source.examples) == 2
    with pytest.raises(MirageError, match=r"shorts:SHORT has no style 'cot'; choose from terse, plain, mixed"):
        open_sources([], [own], (3,), 2, "cot", 0, None)


def test_a_style_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(MirageError, match="vsp-reasoning has no style 'waves'; choose from direct, cot, plain"):
        open_sources([], ["vsp-reasoning"], (3,), 1, "waves", 0, None)
    with pytest.raises(MirageError, match="maps have no style 'prose'; choose from direct, cot"):
        open_sources([MAPS], [], (3,), 1, "prose", 0, None)
    with pytest.raises(MirageError, match="vsp-planning has no style 'mixed'; choose from direct, cot"):
        style_of("vsp-planning", "mixed", mixed=False)


# -- devices ---------------------------------------------------------------------------------------------------------


def test_the_device_is_cuda_where_there_is_one(monkeypatch):
    for there, found in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device() == torch.device(found)


@pytest.mark.parametrize("name", ["cuda", "cuda:99", "mps", "xpu", "meta", "nonsense", "", "cuda:-1", "gpu", "cpu:x"])
@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="for a machine without")
def test_a_device_that_is_not_here_is_one_line(name):
    with pytest.raises(MirageError, match="there is cpu") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        ["solve", "--question", "Why?"],
        ["demo"],
        ["eval", "--task", "vsp-planning", "--n", "1"],
        ["analyse", "nearest", "--task", "vsp-planning", "--n", "1"],
        ["bench", "decode"],
        ["data", "mix", "vsp-planning", "--model", "bundled", "--out", "never"],
    ],
    ids=lambda line: line[0],
)
def test_every_command_says_so(line, capsys):
    with pytest.raises(SystemExit) as end:
        run([*line, "--device", "abacus"])
    shown = capsys.readouterr()
    assert end.value.code == 2 and not shown.out
    (line,) = shown.err.splitlines()
    assert "--device" in line and "abacus" in line


# -- what is printed -------------------------------------------------------------------------------------------------


class Terminal(StringIO):
    def isatty(self):
        return True


def printed(file, monkeypatch):
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setenv("COLUMNS", "80")
    table = new_table("a title of many words " * 8)
    table.add_column("narrow", no_wrap=True)
    table.add_column("wide")
    table.add_row("x", "word " * 60)
    console = new_console()
    show_table(table, console)
    return file.getvalue()


def test_a_pipe_gets_whole_lines(monkeypatch):
    lines = printed(StringIO(), monkeypatch).splitlines()
    assert any("word " * 59 in line for line in lines)
    assert lines[0].count("title") == 8


def test_a_terminal_gets_lines_of_its_width(monkeypatch):
    shown = printed(Terminal(), monkeypatch)
    _, *lines = shown.splitlines()  # the title is left to the terminal, which folds it
    assert len(lines) > 4 and max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines) <= 80


# -- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "100"}, "None")],
)
def test_threads_wait_passively_unless_the_user_says_otherwise(given, found):
    """Before torch is loaded, which is when OpenMP reads it."""
    code = """
import os, sys
from mirage_vlm.cli import main
assert "torch" not in sys.modules
try:
    main.run(["--version"])
except SystemExit:
    pass
print(os.environ.get("OMP_WAIT_POLICY"))
"""
    environment = {k: v for k, v in os.environ.items() if k not in WAITING} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == found, done.stderr

"""Importing: somebody's data becomes a file of this project, which is read back and scored as `mirage eval` would."""

import io
import json

import datasets
import PIL.Image
import pytest
import typer

from mirage_vlm.cli.import_data import import_data
from mirage_vlm.errors import MirageError
from mirage_vlm.formats import read_data
from mirage_vlm.tasks import score
from mirage_vlm.trajectory import Text

MAP = """
question: q
images: [p]
helpers: [h]
choices: {columns: [c1, c2]}
answer: {column: a, kind: index}
id: key
"""


def encoded(colour, kind):
    content = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), colour).save(content, kind)
    return content.getvalue()


@pytest.fixture
def mirage(capsys):
    """Runs the command with a command line; gives what it printed."""
    app = typer.Typer()
    app.command()(import_data)

    def call(*arguments):
        capsys.readouterr()
        assert app([str(argument) for argument in arguments], standalone_mode=False) in (None, 0)
        return capsys.readouterr().out

    return call


@pytest.fixture
def data(tmp_path):
    """Three rows in parquet, the last two with the same helper image."""
    (tmp_path / "map.yaml").write_text(MAP)
    rows = {
        "key": ["x", "y", "z"],
        "q": ["Which?"] * 3,
        "p": [{"bytes": encoded(colour, "JPEG"), "path": None} for colour in ("red", "green", "blue")],
        "h": [{"bytes": encoded(colour, "PNG"), "path": None} for colour in ("white", "black", "black")],
        "c1": ["left", "up", "in"],
        "c2": ["right", "down", "out"],
        "a": [0, 1, 0],
    }
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "rows.parquet"))
    return tmp_path


def test_there_and_back_and_scored(data, mirage):
    out = data / "made/mine.jsonl"
    printed = mirage(data / "rows.parquet", "--map", data / "map.yaml", "--out", out)
    assert printed == f"{out}: 3 examples\n"
    examples = read_data(out)
    assert [(e.task, e.meta["id"], e.answer) for e in examples] == [
        ("choice", k, a) for k, a in zip("xyz", "ABA", strict=True)
    ]
    for example, wrong in zip(examples, "BAB", strict=True):
        assert score(example).correct  # the gold response
        assert not score(example.with_response((Text(rf"So \boxed{{{wrong}}}"),))).correct
        assert not score(example.with_response((Text(r"\boxed{A or B}"),))).correct
    (picture, _), (span, _) = examples[0].messages[0].segments, examples[0].response
    assert picture.load().convert("RGB").getpixel((1, 1))[0] > 200  # red
    assert span.helper.load().convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_pictures_are_files_with_the_content_that_they_had(data, mirage):
    mirage(data / "rows.parquet", "--map", data / "map.yaml", "--out", data / "mine.jsonl")
    files = sorted((data / "mine-images").iterdir())
    assert sorted(path.suffix for path in files) == [".jpg"] * 3 + [".png"] * 2  # one that is met twice is one file
    written = {path.read_bytes() for path in files}
    assert written == {
        *(encoded(colour, "JPEG") for colour in ("red", "green", "blue")),
        *(encoded(colour, "PNG") for colour in ("white", "black")),
    }
    for line in (data / "mine.jsonl").read_text().splitlines():
        (picture, _) = json.loads(line)["messages"][0]["content"]
        assert picture["image"].startswith("mine-images/")  # so that the folder can be moved


def test_a_limit_and_a_preset(data, mirage):
    table = "mirror,Question,Options,Correct Answer\n1,Up?,(a) Yes (b) No,(b)\n2,Up?,(a) Yes (b) No,(c)\n"
    (data / "Questions.csv").write_text(table)
    (data / "MMVP Images").mkdir()
    (data / "MMVP Images/1.jpg").write_bytes(encoded("red", "JPEG"))
    out = data / "mmvp.jsonl"
    assert mirage(data, "--as", "mmvp", "--limit", 1, "--out", out) == f"{out}: 1 example\n"
    (example,) = read_data(out)
    assert score(example).correct
    assert not score(example.with_response((Text(r"\boxed{Yes}"),))).correct


def test_a_fault_leaves_no_file(data, mirage):
    (data / "bad.jsonl").write_text('{"q": "?", "a": "x"}\n{"q": "?", "a": null}\n')
    (data / "open.yaml").write_text("question: q\nanswer: {column: a}\n")
    out = data / "out.jsonl"
    with pytest.raises(MirageError, match=r"bad\.jsonl:2: a: is empty"):
        mirage(data / "bad.jsonl", "--map", data / "open.yaml", "--out", out)
    assert not out.exists()


def test_a_picture_that_is_cut_off_is_named(data, mirage):
    rows = {"q": ["?"], "p": [{"bytes": encoded("red", "PNG")[:45], "path": None}], "a": ["x"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(data / "cut.parquet"))
    (data / "open.yaml").write_text("question: q\nimages: [p]\nanswer: {column: a}\n")
    with pytest.raises(MirageError, match=r"cut\.parquet\[0\]: p: is no picture that can be read"):
        mirage(data / "cut.parquet", "--map", data / "open.yaml", "--out", data / "cut.jsonl")
    assert not (data / "cut.jsonl").exists()


def test_names_of_benchmarks(mirage):
    assert {"blink", "vstar", "vsp-maze-main", "mentisoculi-paper-fold"} <= set(mirage("--as", "list").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rows.parquet", "--out", "x.jsonl"), "give --as PRESET (--as list names them) or --map FILE.yaml"),
        (("rows.parquet", "--as", "sat", "--map", "map.yaml", "--out", "x.jsonl"), "give --as PRESET"),
        (("rows.parquet", "--map", "map.yaml"), "--out FILE.jsonl"),
        (("rows.parquet", "--map", "map.yaml", "--out", "x.json"), "--out FILE.jsonl"),
        (("rows.parquet", "--map", "map.yaml", "--out", "there.jsonl"), "there.jsonl: exists already"),
        (("rows.parquet", "--as", "sat", "--out", "x.jsonl"), "rows.parquet: has no column 'question'"),
        (("none.parquet", "--map", "map.yaml", "--out", "x.jsonl"), "none.parquet: no such file or folder"),
    ],
)
def test_refused(data, mirage, monkeypatch, arguments, message):
    monkeypatch.chdir(data)
    (data / "there.jsonl").touch()
    with pytest.raises(MirageError) as caught:
        mirage(*arguments)
    assert message in str(caught.value)
    assert not (data / "x.jsonl").exists()

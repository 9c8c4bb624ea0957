"""The command: a picture, the numbers behind it with all settings, a table; faults in one line."""

from __future__ import annotations

import json

import PIL.Image
import pytest
from typer.testing import CliRunner

from mirage_vlm import __version__
from mirage_vlm.cli.main import app
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis.kinds import ANALYSES
from mirage_vlm.evaluation.analysis.material import ROLES


def run(*arguments):
    return CliRunner().invoke(app, ["analyse", *map(str, arguments)])


def test_attention_of_the_bundled_model(tmp_path):
    made = ["--task", "vsp-planning", "--levels", "3", "--n", "4", "--seed", "7"]
    shown = run("attention", *made, "--out", tmp_path / "found")
    assert shown.exit_code == 0, shown.output
    assert "attention: bundled, 4 of 4 responses have latents" in shown.output
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["attention.json", "attention.png"]
    with PIL.Image.open(tmp_path / "found" / "attention.png") as figure:
        assert figure.format == "PNG" and min(figure.size) > 200
    results = json.loads((tmp_path / "found" / "attention.json").read_text())
    assert results["data"] == {
        "task": "vsp-planning", "levels": [3], "n": 4, "seed": 7, "style": "cot", "limit": None,
    }  # fmt: skip
    assert (results["kind"], results["model"], results["seed"]) == ("attention", "bundled", 7)
    assert results["versions"]["mirage_vlm"] == __version__ and "model.safetensors" in results["sha256"]["model"]
    assert results["generation"]["temperature"] == 0 and results["generation"]["return_latents"] is True
    assert (results["n"], results["with_latents"], results["method"]) == (4, 4, None) and results["date"]
    groups = results["numbers"]["groups"]
    assert groups["text"]["examples"] == groups["answer"]["examples"] == 4
    assert groups["text"]["tokens"][ROLES.index("latents")] == 4
    assert all(sum(layer) == pytest.approx(1, abs=1e-5) for group in groups.values() for layer in group["mass"])
    again = run("attention", *made, "--out", tmp_path / "again")
    other = json.loads((tmp_path / "again" / "attention.json").read_text())
    assert again.exit_code == 0 and {**other, "date": ""} == {**results, "date": ""}


def test_of_a_file(tmp_path):
    file = tmp_path / "maps.jsonl"
    file.write_text('{"level": 3, "id": "m", "map": ["SFF", "FHF", "FFG"]}\n' * 2)
    shown = run("similarity", "--data", file, "--limit", 2, "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    results = json.loads((tmp_path / "similarity.json").read_text())
    assert results["data"]["path"] == str(file) and results["sha256"]["data"]
    assert results["numbers"]["latents"]["across_mean"] == pytest.approx(1), "twice the same map"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heat", "--task", "vsp-planning"], "unknown analysis 'heat'; choose one of attention, nearest, similarity"),
        (["attention"], "give either --data or --task"),
        (["attention", "--task", "vsp-planning", "--data", "x.jsonl"], "give either --data or --task"),
        (["attention", "--task", "vsp-planning", "--levels", "x"], "--levels must be whole numbers"),
        (["attention", "--task", "chess"], "there is no task 'chess'"),
        (["attention", "--task", "vsp-planning", "--n", "0"], "there is nothing to analyse: no examples"),
        (["probe", "--task", "vsp-planning", "--method", "tsne"], "only a projection has a method"),
        (["projection", "--task", "vsp-planning", "--method", "svd"], "unknown method 'svd'"),
        (["probe", "--task", "vsp-planning", "--n", "2"], "a probe needs at least 8 different maps"),
        (["nearest", "--task", "vsp-planning", "--n", "2", "--model", "bundled-base"], "the model consumed no latent"),
    ],
)
def test_faults_are_one_line(tmp_path, arguments, message):
    found = run(*arguments, "--out", tmp_path / "out")
    assert isinstance(found.exception, MirageError) and message in str(found.exception)
    assert "\n" not in str(found.exception) and not (tmp_path / "out").exists()


def test_nothing_is_drawn_without_matplotlib_or_over_a_file(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("mine")
    found = run("attention", "--task", "vsp-planning", "--out", tmp_path / "out")
    assert "is a file; name a folder for attention.png and attention.json" in str(found.exception)
    monkeypatch.setattr("mirage_vlm.evaluation.plots.find_spec", lambda name: None)
    found = run("attention", "--task", "vsp-planning", "--out", tmp_path / "other")
    assert str(found.exception) == "a figure needs matplotlib: pip install 'mirage-vlm[plot]'"


@pytest.mark.parametrize("kind", [kind for kind in ANALYSES if kind != "attention"])
def test_every_kind_ends_in_its_two_files(tmp_path, kind):
    n = 12 if kind == "probe" else 3
    shown = run(kind, "--task", "vsp-reasoning", "--levels", "4", "--n", n, "--style", "direct", "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{kind}.json", f"{kind}.png"]
    assert json.loads((tmp_path / f"{kind}.json").read_text())["numbers"]

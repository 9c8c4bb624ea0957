"""`mirage solve`, `demo` and `eval` on the bundled model, and what they say of bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mirage_vlm.tasks.frozenlake import Maze
from mirage_vlm.tasks.render import draw_maze

ROWS = ["SFF", "FHF", "FFG"]
PARITY = Path(__file__).parent.parent / "data" / "parity" / "a"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "map.png"
    draw_maze(Maze.from_rows(ROWS)).save(path)
    return path


def mirage(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "mirage_vlm.cli.main", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    return done


def refusal(*arguments):
    """The one line that bad input gets."""
    done = mirage(*arguments, code=2)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line


def test_solve_prints_json(picture):
    found = json.loads(mirage("solve", picture, "--json").stdout)
    assert found["latent_spans"] == 1 and found["latent_tokens"] == 4
    assert found["answer"] in ("R,R,D,D", "D,D,R,R")
    assert found["answer"] in found["text"]


def test_solve_takes_any_cell_size_and_the_other_task(tmp_path):
    path = tmp_path / "small.png"
    draw_maze(Maze.from_rows(ROWS), cell=40).save(path)
    found = json.loads(mirage("solve", path, "--task", "vsp-reasoning", "--plan", "RD", "--json").stdout)
    assert found["answer"] == "B"


def test_demo_shows_the_span_in_place_and_the_verdict(tmp_path):
    saved = tmp_path / "demo.png"
    shown = mirage("demo", "--seed", 3, "--level", 4, "--save", saved).stdout
    assert "4 latent tokens⟧" in shown and "--seed 3" in shown
    assert "right:" in shown or "wrong:" in shown
    assert saved.read_bytes().startswith(b"\x89PNG")


def test_eval_writes_results(tmp_path):
    data, out, kept = tmp_path / "maps.jsonl", tmp_path / "results.json", tmp_path / "decoded.jsonl"
    data.write_text(json.dumps({"level": 3, "id": 0, "map": ROWS}) + "\n")
    mirage("eval", "--data", data, "--out", out, "--trajectories", kept)
    results = json.loads(out.read_text())
    for row in (results, results["by_level"]["3"]):
        assert row["n"] == 1 and row["latent_rate"] == 1.0
        assert {"accuracy", "optimal_rate", "invalid_rate"} <= row.keys()
    (line,) = kept.read_text().splitlines()
    parts = json.loads(line)["messages"][-1]["content"]
    (span,) = [part for part in parts if part["type"] == "latent"]
    assert span["latents"]["shape"][0] == 4


def test_bad_pictures(tmp_path):
    broken, oblong = tmp_path / "broken.png", tmp_path / "oblong.png"
    broken.write_bytes(b"\x89PNG not really")
    draw_maze(Maze.from_rows(ROWS)).crop((0, 0, 100, 64)).save(oblong)
    assert "broken.png" in refusal("solve", broken)
    assert "nowhere.png" in refusal("solve", tmp_path / "nowhere.png")
    assert "oblong.png" in refusal("solve", oblong)


def test_bad_checkpoints(picture, tmp_path):
    assert "no-such" in refusal("solve", picture, "--model", tmp_path / "no-such")
    plain = tmp_path / "plain"
    shutil.copytree(PARITY, plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("latent_")}))
    message = refusal("solve", picture, "--model", plain)
    assert "no latent tokens" in message and "from_base" in message


def test_bad_data(tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "results.json"
    data.write_text('{"messages": [\n')
    assert f"{data}:1" in refusal("eval", "--data", data, "--out", out)
    data.write_text(json.dumps({"level": 3, "id": 0, "map": ["SFF", "FHF"]}) + "\n")
    assert "map" in refusal("eval", "--data", data, "--out", out)
    assert "--data" in refusal("eval", "--out", out)
    assert "vsp-planning" in refusal("eval", "--task", "vsp-flying", "--out", out)
    assert not out.exists()


def test_a_prompt_longer_than_the_context(tmp_path):
    data, out = tmp_path / "long.jsonl", tmp_path / "results.json"
    text = "which way does the red path go " * 2000
    data.write_text(json.dumps({"messages": [{"role": "user", "content": text}], "answer": "x"}) + "\n")
    message = refusal("eval", "--data", data, "--out", out)
    assert "context" in message and not out.exists()

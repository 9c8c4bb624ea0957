"""`mirage solve`, `demo` and `eval` on the bundled model, and what they say of bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mirage_vlm.cli.options import load_model
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.base import boxed
from mirage_vlm.tasks.frozenlake import Maze
from mirage_vlm.tasks.render import draw_maze, resize_cells
from mirage_vlm.trajectory import Image, Trajectory

ROWS = ["SFF", "FHF", "FFG"]
PARITY = Path(__file__).parent.parent / "data" / "parity" / "a"
CASES = Path(__file__).parent.parent / "data" / "cases"

# how a picture has to lie in a file that says it is to be turned so
TURN = PIL.Image.Transpose
BACK = {
    2: TURN.FLIP_LEFT_RIGHT,
    3: TURN.ROTATE_180,
    4: TURN.FLIP_TOP_BOTTOM,
    5: TURN.TRANSPOSE,
    6: TURN.ROTATE_90,
    7: TURN.TRANSVERSE,
    8: TURN.ROTATE_270,
}


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


def test_a_map_as_a_phone_or_another_program_saves_it_has_the_same_plan(tmp_path):
    grey = np.asarray(PIL.Image.open(CASES / "map-grey.png"))
    PIL.Image.fromarray(grey / np.float32(255)).save(tmp_path / "map-float.tif")
    plain = Image(CASES / "map.png").load()
    files = {
        "map.png": "map.png",
        "map-exif6.png": "map.png",
        "map-exif6.jpg": "map.png",
        "map-grey.png": "map-grey.png",
    }
    files |= {"map-16bit.png": "map-grey.png", "map-alpha.png": "map-alpha.png"}
    sources = {name: CASES / name for name in files} | {"map-float.tif": tmp_path / "map-float.tif"}
    for orientation in range(1, 9):
        for kind in ("png", "webp", "tiff"):
            exif = PIL.Image.Exif()
            exif[0x0112] = orientation
            lying = plain.transpose(BACK[orientation]) if orientation > 1 else plain
            name = f"map-{orientation}.{kind}"
            lying.save(tmp_path / name, exif=exif, **({"lossless": True} if kind == "webp" else {}))
            sources[name] = tmp_path / name
    vlm = load_model("bundled")
    prompts = [
        Trajectory(get_task("vsp-planning").prompt(Image(resize_cells(Image(source).load())), "cot"))
        for source in sources.values()
    ]
    found = dict(zip(sources, (answer.text for answer in vlm.generate(prompts)), strict=True))
    for name, text in found.items():
        assert boxed(text) == boxed(found[files.get(name, "map.png")]), name
    assert found["map-16bit.png"] == found["map-float.tif"] == found["map-grey.png"]
    assert len({found[name] for name in found if name[4].isdigit() and "bit" not in name} | {found["map.png"]}) == 1
    assert boxed(found["map.png"]) == "D,R"


def test_solve_takes_urls_and_limits(picture):
    plain = json.loads(mirage("solve", picture, "--json").stdout)
    assert json.loads(mirage("solve", picture.as_uri(), "--json").stdout) == plain
    limits = ("--min-pixels", 784, "--max-pixels", 200704)
    assert json.loads(mirage("solve", picture, "--json", *limits).stdout) == plain, "they are the checkpoint's own"
    assert json.loads(mirage("solve", picture, "--json", "--max-pixels", 784).stdout) != plain, "one patch"
    assert "max_pixels must be a whole number of at least 1, not 0" in refusal("solve", picture, "--max-pixels", 0)
    assert "min_pixels is 9, above max_pixels, which is 8" in refusal(
        "solve", picture, "--min-pixels", 9, "--max-pixels", 8
    )


def test_bad_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: is a named pipe, not a picture file" in refusal("solve", tmp_path / "pipe")
    assert "is a folder, not a picture file" in refusal("solve", tmp_path)
    assert "a file URL of another machine" in refusal("solve", "file://elsewhere/map.png")
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

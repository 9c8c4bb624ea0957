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

from mirage_vlm.cli.main import run
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


@pytest.fixture
def here(capsys):
    """Runs a command line in this process, which spares the seconds of importing torch."""

    def call(*arguments, code=0):
        with pytest.raises(SystemExit) as end:
            run([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert (end.value.code or 0) == code, shown.err
        return shown.out if code == 0 else shown.err

    return call


def test_a_letter_is_said_with_what_it_stands_for(here, picture):
    line = ["solve", picture, "--task", "vsp-reasoning", "--plan", "RD"]
    assert here(*line).splitlines()[-1] == "B: in a hole"
    found = json.loads(here(*line, "--json"))
    assert found["answer"] == "B" and found["meaning"] == "in a hole"
    assert "meaning" not in json.loads(here("solve", picture, "--json"))


def test_a_response_that_was_cut_says_so(here, picture):
    assert "⟦cut after 8 positions" in here("solve", picture, "--max-new-tokens", 8)
    assert "cut after" not in here("solve", picture)


def test_an_answer_is_not_wrapped_in_a_pipe(here, picture):
    (line,) = here("solve", picture).splitlines()
    assert len(line) > 100


def test_several_pictures_or_none(here, picture):
    asked = ["--question", "Which of them?", "--max-new-tokens", 6, "--json"]
    for pictures in ([], [picture], [picture, picture, picture]):
        assert json.loads(here("solve", *pictures, *asked))["finish_reason"] in ("stop", "length")
    for pictures in ([], [picture, picture]):
        (line,) = here("solve", *pictures, code=2).splitlines()
        assert "asks about one picture" in line and "--question" in line
    (line,) = here("solve", picture, "--task", "jigsaw", code=2).splitlines()
    assert "3 pictures" in line
    (line,) = here("solve", picture, "--task", "geometry", code=2).splitlines()
    assert "--question" in line


def test_the_pictures_of_a_demo_are_those_of_solve(here, tmp_path):
    here("demo", "--task", "jigsaw", "--seed", 3, "--save", tmp_path / "j.png")
    files = [tmp_path / name for name in ("j.png", "j-2.png", "j-3.png")]
    found = json.loads(here("solve", *files, "--task", "jigsaw", "--json"))
    assert found["model"] == "bundled-tasks" and found["meaning"].endswith(" image")


@pytest.mark.parametrize("task", ["vsp-planning", "vsp-perception", "geometry", "jigsaw", "choice"])
def test_a_plan_for_a_task_that_has_none_is_refused(here, picture, task):
    (line,) = here("solve", picture, "--task", task, "--plan", "LUUR", code=2).splitlines()
    assert f"{task} takes no plan" in line


def test_a_plan_is_asked_for_by_its_option(here, picture):
    (line,) = here("solve", picture, "--question", "Why?", "--plan", "LU", code=2).splitlines()
    assert "--plan" in line and "--question" in line
    assert "--plan LUUR" in here("solve", picture, "--task", "vsp-reasoning", code=2)


@pytest.mark.parametrize(
    "task", ["vsp-reasoning", "vsp-perception", "geometry", "jigsaw", "sat", "geometry-seen", "jigsaw-seen", "sat-seen"]
)
def test_a_demo_of_every_task(here, task):
    shown = here("demo", "--task", task, "--seed", 3)
    assert "question: " in shown and "response: " in shown and "--seed 3" in shown
    assert "right: " in shown or "wrong: " in shown


def test_a_demo_in_colour(here, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for task in ("vsp-planning", "sat"):
        assert "▀" in here("demo", "--task", task, "--seed", 3)


OWN = """
from mirage_vlm.tasks.geometry import Geometry

class Own(Geometry):
    name = "figures_of_mine:OWN"
    sizes = range(2, 3)
    styles = ("direct", "plain")

OWN = Own()
"""


def test_a_demo_of_ones_own_task(here, tmp_path, monkeypatch):
    """Its only level and its first style are taken."""
    (tmp_path / "figures_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert "--seed 3" in here("demo", "--task", "figures_of_mine:OWN", "--seed", 3)


def test_what_cannot_be_shown_is_one_line(here):
    (line,) = here("demo", "--task", "choice", code=2).splitlines()
    assert "no generator" in line
    (line,) = here("demo", "--task", "geometry", "--level", 9, code=2).splitlines()
    assert "from 1 to 4" in line
    (line,) = here("demo", "--style", "prose", code=2).splitlines()
    assert "choose from direct, cot" in line


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

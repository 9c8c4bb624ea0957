"""Studies: trained and tested once, resumed, and reported as an independent computation has it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support import SCRATCH

from mirage_vlm.cli.main import run as command
from mirage_vlm.cli.options import load_model
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation import study as study_module
from mirage_vlm.evaluation import study_report
from mirage_vlm.evaluation.curves import curves
from mirage_vlm.evaluation.intervals import ahead_over_seeds, over_seeds, student
from mirage_vlm.evaluation.study import Taken, correct, load_study, outcomes, recipes_of, run_row
from mirage_vlm.evaluation.study_report import lines, page
from mirage_vlm.training import run
from mirage_vlm.training.recipe import load_recipe

BASE = """\
stage: sft
output_dir: {folder}/base
model: {{scratch: {scratch}, latent_size: 2, image_scale: 0.4375, attn: eager}}
data: [{{task: vsp-planning, levels: [3], n: 8, style: words}}]
train: {{max_steps: 1}}
"""
RECIPE = """\
stage: {stage}
output_dir: ignored
model: {{path: ignored, attn: eager}}
data: [{{task: vsp-planning, levels: [3], n: 8, seed: 7, style: {style}}}]
train: {{max_steps: 2, learning_rate: 1.0e-3}}
"""
STUDY = """\
output: {folder}/study
bases: [{{name: P, path: {folder}/base/final}}]
test: {{task: vsp-planning, levels: [3], n: 12, seed: 5, max_new_tokens: 24}}
also: [{{name: unseen, task: vsp-planning, levels: [4], n: 4, seed: 6, max_new_tokens: 24}}]
seeds: [1, 2]
title: What came out
summary: What it says.
rows:
  - {{name: plain, base: P, style: plain, recipes: [{folder}/plain.yaml], about: direct answers}}
  - name: paper
    base: P
    style: direct
    recipes: [{folder}/one.yaml, {folder}/two.yaml]
    helper: training
    replacements: [zero, markers]
    overrides: [train.learning_rate=2.0e-3]
    against: [plain]
  - {{name: base, base: P, style: plain, recipes: [], max_new_tokens: 20}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "base.yaml").write_text(BASE.format(folder=folder, scratch=SCRATCH))
    run.train(load_recipe(folder / "base.yaml"))
    for name, stage, style in (("plain", "sft", "plain"), ("one", "stage1", "direct"), ("two", "stage2", "direct")):
        (folder / f"{name}.yaml").write_text(RECIPE.format(stage=stage, style=style))
    (folder / "study.yaml").write_text(STUDY.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def done(folder):
    """Both rows with both seeds."""
    study = load_study(folder / "study.yaml")
    for row in study.rows:
        for seed in study.seeds_of(row):
            run_row(study, row, seed, load_model, lambda line: None)
    return study


def test_each_run_has_its_seed_base_and_folder(folder, done):
    one, two = recipes_of(done, done.row("paper"), 2)
    assert (one.model.path, two.model.path) == (f"{folder}/base/final", f"{one.output_dir}/final")
    assert one.output_dir == f"{folder}/study/paper/seed-2/1-one"
    assert (one.train.seed, one.data[0].seed, one.train.learning_rate) == (2, 2007, 2e-3)
    for row in done.rows:
        for seed in done.seeds:
            for recipe in recipes_of(done, row, seed):
                assert (
                    json.loads((Path(recipe.output_dir) / "final" / "recipe.json").read_text())["train"]["seed"] == seed
                )


def test_all_rows_are_tested_on_the_same_maps(done):
    names = {
        tuple(item["name"] for item in outcome.results["items"]) for row in done.rows for outcome in outcomes(done, row)
    }
    assert len(names) == 1


def test_a_row_may_have_its_own_longest_response(folder, done, tmp_path):
    (base,), (plain, _) = (outcomes(done, done.row(name)) for name in ("base", "plain"))
    longest = [run.results["generation"]["max_new_tokens"] for run in (base, plain)]
    assert longest == [20, 24]
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(folder=folder).replace("max_new_tokens: 20", "max_new_tokens: 19"))
    with pytest.raises(MirageError, match=r"base/seed-1/results\.json: is of another test"):
        lines(load_study(path))


def test_what_is_done_is_not_done_again(done, monkeypatch):
    monkeypatch.setattr(study_module, "run_recipe", None)
    monkeypatch.setattr(study_module, "run_all", None)
    told = []
    for row in done.rows:
        run_row(done, row, 1, load_model, told.append)
    assert len(told) == 6 and all(line.endswith(".json: is there") for line in told)


def test_a_run_that_another_process_is_at_is_left_to_it(folder, done, capsys):
    place = done.folder(done.row("plain"), 2)
    code = "import sys, time, filelock as f; lock = f.FileLock(sys.argv[1]); lock.acquire(); print('mine', flush=True)"
    code += "; time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code, str(place / ".lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(Taken, match="plain/seed-2: another process is at it"):
            run_row(done, done.row("plain"), 2, load_model, lambda line: None)
        with pytest.raises(SystemExit) as end:
            command(["study", str(folder / "study.yaml"), "--rows", "plain"])
        other.kill()
    told = capsys.readouterr().out
    assert not end.value.code and "seed-2: another process is at it" in told and "seed-1/results.json: is there" in told
    run_row(done, done.row("plain"), 2, load_model, lambda line: None)  # the lock of a dead process is no lock


def test_results_of_another_study_are_refused(folder, done, tmp_path):
    changed = {"n: 12": "n: 11", "train.learning_rate=2.0e-3": "train.learning_rate=3.0e-3"}
    changed |= {"seed: 5, max_new_tokens: 24": "seed: 5, max_new_tokens: 25", "[zero, markers]": "[zero, shuffle]"}
    told = ("is of another test", "another recipe (train differ)", "is of another test", "has no shuffle in the place")
    for (old, new), message in zip(changed.items(), told, strict=True):
        path = tmp_path / "study.yaml"
        path.write_text(STUDY.format(folder=folder).replace(old, new))
        study = load_study(path)
        with pytest.raises(MirageError, match=re.escape(message)):
            run_row(study, study.row("paper"), 1, load_model, lambda line: None)
        with pytest.raises(MirageError, match=re.escape(message)):
            lines(study)


def test_a_model_from_before_a_setting_was_there_is_taken(done):
    file = done.folder(done.row("paper"), 1) / "2-two" / "final" / "recipe.json"
    kept = file.read_text()
    recipe = json.loads(kept)
    del recipe["train"]["keep_examples"]
    file.write_text(json.dumps(recipe))
    told = []
    run_row(done, done.row("paper"), 1, load_model, told.append)
    file.write_text(kept)
    assert len(told) == 2 and all(line.endswith(".json: is there") for line in told)


def test_a_run_whose_test_is_missing_is_only_tested(done, monkeypatch):
    file = done.folder(done.row("paper"), 2) / "results.json"
    before = json.loads(file.read_text())
    file.unlink()
    monkeypatch.setattr(study_module, "run_recipe", None)
    run_row(done, done.row("paper"), 2, load_model, lambda line: None)
    after = json.loads(file.read_text())
    assert after["items"] == before["items"] and after["replacements"] == before["replacements"]


def test_the_page_says_what_the_results_say(done):
    text = page(done, "mirage study x.yaml")
    (row,) = [line for line in text.splitlines() if line.startswith("| P | paper | in training |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:6] == ["2", "8", "4"]
    rights = [np.mean(correct(o.results)) for o in outcomes(done, done.row("paper"))]
    assert float(cells[7]) == pytest.approx(100 * np.mean(rights), abs=0.06)
    further = [np.mean(correct(o.results)) for o in outcomes(done, done.row("paper"), done.also[0])]
    assert float(cells[9]) == pytest.approx(100 * np.mean(further), abs=0.06)
    (row,) = [line for line in text.splitlines() if line.startswith("| P | paper − plain | 2 and 2 |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    plain = [np.mean(correct(o.results)) for o in outcomes(done, done.row("plain"))]
    assert float(cells[4]) == pytest.approx(100 * (np.mean(rights) - np.mean(plain)), abs=0.06)
    plain = [np.mean(correct(o.results)) for o in outcomes(done, done.row("plain"), done.also[0])]
    assert float(cells[6]) == pytest.approx(100 * (np.mean(further) - np.mean(plain)), abs=0.06)
    assert "\nWhat it says.\n" in text
    (header,) = [line for line in text.splitlines() if line.startswith("| base | row | seeds | self |")]
    assert header.endswith("| self | zero | markers | self − best empty | 95 % |")
    (tested,) = [line for line in text.splitlines() if re.match(r"\| P \| paper \| 2 \| [\d.]+ \|", line)]
    zero = [np.mean(correct(o.results, "zero")) for o in outcomes(done, done.row("paper"))]
    numbers = tested.strip("|").split("|")
    assert float(numbers[4]) == pytest.approx(100 * np.mean(zero), abs=0.06)
    markers = [np.mean(correct(o.results, "markers")) for o in outcomes(done, done.row("paper"))]
    name, best = max(("zero", zero), ("markers", markers), key=lambda pair: np.mean(pair[1]))
    gain, _, said = numbers[6].strip().partition(" ")
    assert float(gain) == pytest.approx(100 * (np.mean(rights) - np.mean(best)), abs=0.06)
    assert said == f"({name})" or np.mean(zero) == np.mean(markers)
    if all(correct(o.results) == correct(o.results, name) for o in outcomes(done, done.row("paper"))):
        assert numbers[7].strip() == "none of 24 responses differs"


def test_one_seed_is_marked_and_a_cut_is_told(done, monkeypatch):
    text = page(done, "mirage study x.yaml")
    (base,) = [line for line in text.splitlines() if line.startswith("| P | base | no | 1 |")]
    run = outcomes(done, done.row("base"))[0].results
    assert f"| {100 * run['ci95'][0]:.1f}–{100 * run['ci95'][1]:.1f} |" in base, "Wilson's; no seed trained it"
    (plain,) = [line for line in text.splitlines() if line.startswith("| P | plain | no | 2 |")]
    (ahead,) = [line for line in text.splitlines() if line.startswith("| P | paper − plain | 2 and 2 |")]
    assert "†" not in plain and "†" not in ahead
    monkeypatch.setattr(study_report, "outcomes", lambda *of: outcomes(*of)[: 1 if of[1].name == "paper" else 2])
    text = page(done, "mirage study x.yaml")
    (ahead,) = [line for line in text.splitlines() if line.startswith("| P | paper − plain | 1 and 2 |")]
    (paper,) = [line for line in text.splitlines() if line.startswith("| P | paper | in training | 1 |")]
    assert paper.count("†") == 2 and ahead.count("†") + ahead.count("differs") == 2
    cut = {row.name: [o.results["cut_rate"] for o in outcomes(done, row)] for row in done.rows}
    for name, rates in cut.items():
        shown = f"`{name}` {100 * np.mean(rates[: 1 if name == 'paper' else 2]):.0f} %"
        assert (shown in text) == (np.mean(rates[: 1 if name == "paper" else 2]) >= 0.01)


def test_where_latents_are_consumed_the_page_says_how_often(done, monkeypatch):
    assert "latents |" not in page(done, "mirage study x.yaml"), "no response of these models has any"

    def thinking(study, row, test=None):
        found = outcomes(study, row, test)
        rates = (0.25, 0.75) if row.name == "paper" and test is None else (0.0, 0.0)
        return [replace(o, results=o.results | {"latent_rate": rate}) for o, rate in zip(found, rates, strict=False)]

    monkeypatch.setattr(study_report, "outcomes", thinking)
    text = page(done, "mirage study x.yaml")
    (header,) = [line for line in text.splitlines() if line.startswith("| base | row | helper image |")]
    assert header.endswith("| accuracy | 95 % | optimal | latents | unseen | 95 % | latents |")
    columns = [name.strip() for name in header.strip("|").split("|")]
    for row, rate in (("plain | no", "0"), ("paper | in training", "50")):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| P | {row} |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == len(columns)
        assert [cell for cell, name in zip(cells, columns, strict=True) if name == "latents"] == [rate, "0"]


def test_the_figure_shows_the_rows_that_it_is_told(done):
    pytest.importorskip("matplotlib")
    for told, shown in (((), ["P: plain", "P: paper", "P: base"]), (("base", "paper"), ["P: paper", "P: base"])):
        study = replace(done, figure=told)
        (axes,) = study_report.figure(study).axes
        assert [label.get_text() for label in axes.get_yticklabels()] == shown
        assert ("Not all rows" in page(study, "mirage study x.yaml", "x.png")) == bool(told)


def test_a_curve_is_what_the_runs_wrote_down(done):
    row = done.row("paper")
    found = curves(done, row, "loss")
    assert set(found) == {1, 2}
    for seed, curve in found.items():
        file = Path(recipes_of(done, row, seed)[-1].output_dir) / "metrics.jsonl"
        written = [json.loads(line) for line in file.read_text().splitlines()]
        assert curve == {line["step"]: line["loss"] for line in written if "loss" in line} and curve
    assert curves(done, done.row("base"), "loss") == {}


def test_the_command(folder, done, capsys):
    pytest.importorskip("matplotlib")
    report, figure = folder / "page.md", folder / "figure.png"
    with pytest.raises(SystemExit) as end:
        command(["study", str(folder / "study.yaml"), "--report", str(report), "--figure", str(figure)])
    assert not end.value.code and figure.read_bytes().startswith(b"\x89PNG")
    assert "| paper |" in report.read_text() and "](figure.png)" in report.read_text()
    assert report.read_text().startswith("# What came out\n")
    curve = folder / "curve.png"
    with pytest.raises(SystemExit) as end:
        command(["study", str(folder / "study.yaml"), "--curve", "loss", "--figure", str(curve)])
    assert not end.value.code and curve.read_bytes().startswith(b"\x89PNG")
    for wrong, said in (
        (["--curve", "reward", "--figure", str(curve)], "no run has"),
        (["--curve", "loss"], "--figure"),
    ):
        with pytest.raises(SystemExit) as end:
            command(["study", str(folder / "study.yaml"), *wrong])
        assert end.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        command(["study", str(folder / "study.yaml"), "--seeds", "9"])
    assert end.value.code == 2 and "the study has no 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[plain]", "[paper]", "rows[1].against: there is no other row 'paper'"),
        ("name: paper", "name: plain", "rows[0].name: 'plain' is there twice"),
        ("base: P, style", "base: Q, style", "rows[0].base: there is no base 'Q'"),
        ("style: plain", "style: prose", "rows[0].style: 'prose' is not one of"),
        ("[zero, markers]", "[zeros]", "rows[1].replacements: there is no zeros"),
        ("max_new_tokens: 20", "max_new_tokens: 0", "rows[2].max_new_tokens: must be positive"),
        ("title: What", "figure: [base, all]\ntitle: What", "figure: there is no row 'all'"),
        ("helper: training", "helper: yes", "rows[1].helper: expected str"),
        ("name: unseen", "name: x y", "also[0].name: give one, of letters, digits, - and _"),
        ("2.0e-3", "fast", "override 'train.learning_rate=fast'"),
    ],
)
def test_what_is_wrong_is_named(folder, tmp_path, old, new, message):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(folder=folder).replace(old, new, 1))
    with pytest.raises(MirageError, match=re.escape(message)):
        load_study(path)


def test_a_test_may_be_a_data_file(folder, done, tmp_path):
    """Its maps, worded in each row's style; a file that has changed is another test."""
    data, maps = tmp_path / "maps.jsonl", ["SFF", "FHF", "FFG"]
    data.write_text("".join(json.dumps({"level": 3, "id": i, "map": maps}) + "\n" for i in range(3)))
    text = STUDY.format(folder=folder).replace(f"{folder}/study", f"{tmp_path}/study", 1)
    also = f"also: [{{name: file, data: {data}, max_new_tokens: 24}}, {{name: two, data: {data}, n: 2}}]"
    (tmp_path / "study.yaml").write_text(re.sub(r"also: .*", also, text))
    study = load_study(tmp_path / "study.yaml")
    row = study.row("base")
    run_row(study, row, 1, load_model, lambda line: None)
    results = json.loads(study.results(row, 1, study.also[0]).read_text())
    assert results["n"] == 3 and results["data"] == {"path": str(data), "style": "plain", "limit": None}
    assert json.loads(study.results(row, 1, study.also[1]).read_text())["n"] == 2
    assert f"file: 3 examples of `{data}`" in page(study, "mirage study")
    run_row(study, row, 1, load_model, lambda line: None)
    data.write_text(data.read_text() + json.dumps({"level": 3, "id": 9, "map": maps}) + "\n")
    with pytest.raises(MirageError, match="has changed since it was tested on"):
        run_row(study, row, 1, load_model, lambda line: None)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("{data: nowhere.jsonl}", "test.data: nowhere.jsonl: no such file"),
        ("{data: DATA, task: vsp-planning}", "test.task: give either a task or data"),
        ("{data: DATA, seed: 3}", "test: data has neither levels nor seed"),
        ("{data: DATA, n: -1}", "test.n: must not be negative"),
        ("{task: vsp-planning}", "test: missing levels, n, seed"),
        ("{}", "test: missing task, levels, n, seed"),
    ],
)
def test_a_test_is_either_of_a_file_or_of_a_task(folder, tmp_path, test, message):
    (tmp_path / "maps.jsonl").write_text("{}")
    text = re.sub(r"\ntest: .*", "\ntest: " + test.replace("DATA", str(tmp_path / "maps.jsonl")), STUDY)
    (tmp_path / "study.yaml").write_text(text.replace("{{", "{").replace("}}", "}").replace("{folder}", str(folder)))
    with pytest.raises(MirageError, match=re.escape(message)):
        load_study(tmp_path / "study.yaml")


# -- intervals over seeds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 3.7, 10, 599, 1e6])
def test_student_against_scipy(freedom):
    for level in (0.5, 0.95, 0.99):
        assert student(freedom, level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=2e-4)


def test_one_seed_has_the_usual_interval():
    outcomes = [1.0] * 70 + [0.0] * 30
    usual = stats.t.interval(0.95, 99, 0.7, stats.sem(outcomes))
    assert over_seeds([outcomes]) == pytest.approx((0.7, *usual), rel=1e-3)


def test_seeds_on_items_without_end_have_students_interval():
    """Where only seeds differ, and for the difference of two Welch's test (scipy)."""
    one, other = ([[value] * 4 for value in row] for row in ([0.2, 0.5, 0.9], [0.1, 0.3, 0.2, 0.2]))
    means = [row[0] for row in one]
    usual = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert over_seeds(one) == pytest.approx((np.mean(means), *usual), rel=1e-3)
    welch = stats.ttest_ind(means, [row[0] for row in other], equal_var=False).confidence_interval(0.95)
    assert ahead_over_seeds(one, other)[1:] == pytest.approx((welch.low, welch.high), rel=1e-3)


def test_the_same_items_pair_two_ways_of_training():
    rng = np.random.default_rng(0)
    hard = rng.random(500)
    one, other = ((hard[None] < 0.6).repeat(3, 0).astype(float), (hard[None] < 0.5).repeat(3, 0).astype(float))
    mean, low, high = ahead_over_seeds(one.tolist(), other.tolist())
    usual = stats.t.interval(0.95, 499, mean, stats.sem(one[0] - other[0]))
    assert (low, high) == pytest.approx(usual, rel=1e-3)


@pytest.mark.parametrize("between", [0.0, 0.05, 0.3])
def test_the_interval_holds_the_truth_as_often_as_it_says(between):
    """Seeds and items of random skill and ease, 1,000 times. With three seeds Satterthwaite is a bit bold."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1_000):
        skill, ease = between * rng.normal(size=(3, 1)), rng.normal(size=(1, 60))
        table = 0.5 + skill + 0.3 * ease + 0.2 * rng.normal(size=(3, 60))
        _, low, high = over_seeds(table.tolist())
        held += low <= 0.5 <= high
    assert held / 1_000 > 0.92


def test_seeds_must_share_their_items():
    with pytest.raises(MirageError, match="the same items, at least one, for each seed"):
        over_seeds([[1.0, 0.0], [1.0]])
    with pytest.raises(MirageError, match="the same items, not 1 and 2"):
        ahead_over_seeds([[1.0]], [[1.0, 0.0]])

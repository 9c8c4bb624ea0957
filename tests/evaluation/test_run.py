"""Whole evaluations: what is written, that a killed one goes on to the same results, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import ragged
from typer.testing import CliRunner

from mirage_vlm.cli.main import app, run
from mirage_vlm.cli.options import open_sources
from mirage_vlm.decoding import Engine, EngineConfig, GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.evaluate import evaluate
from mirage_vlm.evaluation.kept import Kept, differences
from mirage_vlm.evaluation.replace import replacement_test
from mirage_vlm.evaluation.run import Run, Settings, Source, plan, run_all
from mirage_vlm.formats import read_jsonl
from mirage_vlm.modeling.bundled import resolve
from mirage_vlm.trajectory import Trajectory

VSP = Path(__file__).parent.parent / "data" / "vsp"
GENERATION = GenerationConfig(max_new_tokens=40)
NAMES = ("self", "zero", "shuffle", "random-model")


def timeless(results):
    return {key: value for key, value in results.items() if key not in ("date", "seconds", "seconds_in_all")}


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def examples():
    found = [*ragged(), *ragged()[2:]]
    return [replace(e, answer="D", meta={"id": i}) for i, e in enumerate(found)]


class Killed(BaseException):
    """What ends a process in the middle, as Ctrl-C would."""


def killing(after):
    """A progress callback that kills at so many responses."""
    seen = 0

    def progress(done):
        nonlocal seen
        seen += done
        if seen >= after:
            raise Killed

    return progress


# -- responses that are kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.0, "seeds": range(9, 1, -1)}]
)
def test_kept_responses_are_those_of_generate(tiny, examples, tmp_path, changes):
    """Against `generate` on all examples at once: killed and resumed again and again, two rows at a time."""
    generation = GenerationConfig(max_new_tokens=40, **changes)
    path, settings, attempts = tmp_path / "partial", {"a": 1}, 0
    while True:
        kept = Kept(path, settings)
        try:
            found = evaluate(tiny, examples, generation, EngineConfig(max_rows=2), killing(kept.resumed + 2), kept)
            break
        except Killed:
            attempts += 1
            assert len(path.read_bytes().splitlines()) > 1 + kept.resumed, "it has come further"
    plain = evaluate(tiny, examples, generation)
    assert attempts > 2
    assert [s.score for s in found] == [s.score for s in plain]
    assert [s.decoding.token_ids for s in found] == [s.decoding.token_ids for s in plain]
    for one, other in zip(found, plain, strict=True):
        assert one.trajectory.text == other.trajectory.text and one.trajectory.meta == other.trajectory.meta
        assert [span.k for span in one.trajectory.spans] == [span.k for span in other.trajectory.spans]
        for mine, theirs in zip(one.trajectory.spans, other.trajectory.spans, strict=True):
            assert (mine.latents - theirs.latents).abs().max() < 1e-4


@pytest.mark.parametrize("after", [3, 11, 19, 30])
def test_a_replacement_test_resumes(tiny, examples, tmp_path, after):
    """Killed in `self` or in any of the others; all responses of all replacements come out as in one go."""
    whole = replacement_test(tiny, examples, NAMES, GENERATION, seed=3)
    path = tmp_path / "partial"
    with pytest.raises(Killed):
        replacement_test(tiny, examples, NAMES, GENERATION, EngineConfig(max_rows=3), killing(after), 3, Kept(path))
    kept = Kept(path)
    assert kept.resumed >= after
    counted = []
    found = replacement_test(tiny, examples, NAMES, GENERATION, EngineConfig(max_rows=3), counted.append, 3, kept)
    assert sum(counted) == len(NAMES) * len(examples)
    for name in NAMES:
        assert [s.decoding.token_ids for s in found[name]] == [s.decoding.token_ids for s in whole[name]], name


def test_nothing_is_decoded_twice(tiny, examples, tmp_path, monkeypatch):
    path = tmp_path / "partial"
    with pytest.raises(Killed):
        evaluate(tiny, examples, GENERATION, EngineConfig(max_rows=2), killing(4), Kept(path))
    kept, asked = Kept(path), []
    submit = Engine.submit

    def noted(self, prompt, *rest, **more):
        asked.append(prompt.meta["id"])
        return submit(self, prompt, *rest, **more)

    monkeypatch.setattr(Engine, "submit", noted)
    done = {i for i in range(len(examples)) if ("self", i) in kept}
    evaluate(tiny, examples, GENERATION, None, None, kept)
    assert done and sorted(asked) == sorted(set(range(len(examples))) - done)
    evaluate(tiny, examples, GENERATION, None, None, Kept(path))
    assert len(asked) == len(examples) - len(done), "a finished evaluation decodes nothing"


def test_a_line_that_was_cut_off_is_dropped_and_written_anew(tiny, examples, tmp_path):
    path = tmp_path / "partial"
    evaluate(tiny, examples, GENERATION, None, None, Kept(path, {"a": 1}))
    content = path.read_bytes()
    for cut in (5, len(content.splitlines()[0]) + 3, len(content) - 20, len(content) - 1):
        path.write_bytes(content[:cut])
        kept = Kept(path, {"a": 1})
        assert kept.resumed == max(0, content[:cut].count(b"\n") - 1)
        evaluate(tiny, examples, GENERATION, None, None, kept)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines[0] == {"settings": {"a": 1}}
        assert sorted(line["example"] for line in lines[1:]) == list(range(len(examples)))


def test_latents_are_kept_to_the_bit(tiny, examples, tmp_path):
    path = tmp_path / "partial"
    found = evaluate(tiny, examples, replace(GENERATION, logprobs=True), None, None, Kept(path))
    again = Kept(path)
    for i, (scored, example) in enumerate(zip(found, examples, strict=True)):
        response = again.response("self", i, example)
        assert response.prompt == example.prompt and response.decoding == scored.decoding
        for mine, theirs in zip(response.spans, scored.trajectory.spans, strict=True):
            assert mine.k == theirs.k and mine.latents.equal(theirs.latents)


def test_other_settings_and_damage_are_named(tmp_path):
    path = tmp_path / "results.json.partial"
    path.write_text(
        json.dumps({"settings": {"generation": {"temperature": 0.0, "seed": 1}, "model": "a"}}) + "\nx\n{}\n"
    )
    said = r"partial was left by .*\(generation.temperature is 0.7, was 0.0; model is \"b\", was \"a\"\).*--restart"
    with pytest.raises(MirageError, match=said):
        Kept(path, {"generation": {"temperature": 0.7, "seed": 1}, "model": "b"})
    with pytest.raises(MirageError, match=r"partial:2: is damaged; remove it or start over with --restart"):
        Kept(path, {"generation": {"temperature": 0.0, "seed": 1}, "model": "a"})
    assert Kept(path, {"model": "b"}, restart=True).resumed == 0 and not path.exists()
    path.mkdir()
    with pytest.raises(MirageError, match="cannot be read or removed"):
        Kept(path)


def test_differences():
    assert list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}})) == [
        "a.c is null, was 2",
        "a.d is 3, was null",
    ]
    assert not list(differences({"a": [1, 2]}, {"a": [1, 2]}))


def test_a_partial_file_that_cannot_be_written(tiny, examples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MirageError, match=r"cannot write .*file/x.partial"):
        evaluate(tiny, examples, GENERATION, None, None, Kept(tmp_path / "file" / "x.partial"))
    with pytest.raises(MirageError, match="n = 2"):
        evaluate(tiny, examples, GenerationConfig(n=2), None, None, Kept())
    with pytest.raises(MirageError, match="got 1 seeds"):
        evaluate(tiny, examples, GenerationConfig(seeds=[1]), None, None, Kept())


# -- a run and its files ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path):
    folder = tmp_path / "model"
    tiny.save_pretrained(folder)
    return folder


def settings(**changes):
    return Settings(**{"generation": GENERATION, "engine": EngineConfig(), "replacements": NAMES, "seed": 3, **changes})


def test_a_killed_run_writes_what_an_unbroken_one_writes(tiny, saved, examples, tmp_path):
    def go(name, **more):
        source = Source({"task": "made", "n": len(examples)}, examples)
        place = Run(str(saved), source, tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl")
        return next(iter(run_all([place], settings(), lambda _: tiny, **more)))

    whole = go("whole")
    for after in (3, 20):
        with pytest.raises(Killed):
            go("broken", progress=killing(after))
        assert (tmp_path / "broken.json.partial").exists() and not (tmp_path / "broken.json").exists()
        told = []
        assert timeless(go("broken", tell=told.append)) == timeless(whole)
        assert len(told) == 1 and f"of {len(examples) * len(NAMES)} responses" in told[0]
        assert not (tmp_path / "broken.json.partial").exists()
        assert timeless(read(tmp_path / "broken.json")) == timeless(read(tmp_path / "whole.json"))
        ours, theirs = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("broken", "whole"))
        assert [t.decoding for t in ours] == [t.decoding for t in theirs]
        assert [s.latents.shape for t in ours for s in t.spans] == [s.latents.shape for t in theirs for s in t.spans]
        for name in ("json", "jsonl"):
            (tmp_path / f"broken.{name}").unlink()


def test_the_fields_of_results(tiny, saved, examples, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("bytes")
    mixed = [
        replace(e, meta={"level": i % 2, "map": ["SF", "FG"]}, task="vsp-planning" if i < 3 else None)
        for i, e in enumerate(examples)
    ]
    place = Run(str(saved), Source({"path": str(data)}, mixed), tmp_path / "r.json")
    (found,) = run_all([place], settings(), lambda _: tiny)
    assert found == read(place.out)
    sha = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in saved.iterdir()}
    assert found["sha256"]["model"] == sha and {"model.safetensors", "config.json"} <= sha.keys()
    assert found["sha256"]["data"] == hashlib.sha256(b"bytes").hexdigest()
    assert found["seed"] == 3 and found["engine"]["max_rows"] == 64 and found["generation"]["max_new_tokens"] == 40
    assert set(found["by_task"]) == {"vsp-planning", "none"}
    planning = found["by_task"]["vsp-planning"]
    assert planning["n"] == 3 and planning["by_level"]["0"]["n"] == 2
    assert sum(part["n"] * part["accuracy"] for part in found["by_task"].values()) == pytest.approx(
        found["n"] * found["accuracy"]
    )
    for name, row in found["replacements"].items():
        assert row["n"] == len(row["correct"]) == len(mixed)
        assert row["correct"].count("1") / len(mixed) == row["accuracy"], name
    assert found["replacements"]["self"]["correct"] == "".join(str(int(i["correct"])) for i in found["items"])
    assert 0 < found["seconds"] <= found["seconds_in_all"]
    for kind in ("latent", "invalid", "cut"):
        low, high = found[f"{kind}_ci95"]
        assert 0 <= low <= found[f"{kind}_rate"] <= high <= 1


def test_limits_of_pixels_are_among_the_settings(tiny, saved, examples, tmp_path):
    source = [Source({"task": "one"}, examples[:1]), Source({"task": "two"}, examples[:1])]
    runs = plan([str(saved)], source, tmp_path / "out")
    limited = settings(replacements=(), pictures={"min_pixels": None, "max_pixels": 12544})
    found = list(run_all(runs, limited, lambda _: tiny))
    assert [results["pictures"] for results in found] == [{"max_pixels": 12544}] * 2
    assert [timeless(results) for results in run_all(runs, limited, lambda _: pytest.fail("not again"))] == [
        timeless(results) for results in found
    ]
    with pytest.raises(MirageError, match=r"holds another evaluation \(pictures is null, was"):
        list(run_all(runs, settings(replacements=()), lambda _: tiny))
    (plain,) = run_all(runs[:1], settings(replacements=()), lambda _: tiny)
    assert "pictures" not in plain


def test_examples_are_told_apart_by_their_hash(tiny, examples, tmp_path):
    def sha(chosen):
        place = Run("no/such-model", Source({"task": "made"}, chosen))
        (found,) = run_all([place], settings(replacements=()), lambda _: tiny)
        return found["sha256"]

    first = sha(examples[:2])
    assert first["model"] is None and "not found" in first["remark"] and first["data"] is None
    assert sha(examples[:2]) == first
    other = Trajectory(examples[1].messages, answer="U", meta=examples[1].meta)
    assert len({sha(c)["examples"] for c in (examples[:2], examples[1::-1], examples[:1], [examples[0], other])}) == 4


# -- several ---------------------------------------------------------------------------------------------------------


def test_names_of_files_are_short_and_all_different():
    def names(models, labels):
        sources = [Source({"path": label}, [Trajectory(())]) for label in labels]
        return [run.out.name for run in plan(models, sources, Path("o"), Path("t"), Path("f"))]

    assert names(["bundled", "runs/a/final"], ["maps.jsonl", "vsp-planning"]) == [
        "bundled-maps.json",
        "bundled-vsp-planning.json",
        "final-maps.json",
        "final-vsp-planning.json",
    ]
    assert names(["runs/a/final", "runs/b/Final"], ["../x y/test.jsonl"]) == [
        "runs-a-final-test.json",
        "runs-b-Final-test.json",
    ]
    collide = names(["x", "x-y"], ["y-z", "z"])
    assert len(set(collide)) == 4 and collide[0] == "x-y-z.json" and "x-y-z-2.json" in collide
    assert names(["m"], ["a b", "a-b", "é"]) == ["m-a-b.json", "m-a-b-2.json", "m-x.json"]
    runs = plan(["a", "b"], [Source({"task": "t"}, [Trajectory(())])], None, Path("t"), Path("f"))
    assert [(r.out, r.trajectories, r.figure) for r in runs][1] == (None, Path("t/b-t.jsonl"), Path("f/b-t.png"))
    assert runs[0].partial is None


def test_several_runs_and_what_is_there_already(tiny, saved, examples, tmp_path):
    other = tmp_path / "other"
    tiny.save_pretrained(other)
    sources = [Source({"task": "one"}, examples[:3]), Source({"task": "two"}, examples[3:])]
    runs = plan([str(saved), str(other)], sources, tmp_path / "out", tmp_path / "t")
    loads, told, done = [], [], []

    def go(changed=None, **more):
        chosen = changed or settings(replacements=("self", "zero"))
        return list(run_all(runs, chosen, lambda name: loads.append(name) or tiny, tell=told.append, **more))

    first = go()
    assert loads == [str(saved), str(other)], "each model is loaded once"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(run.out.name for run in runs)
    assert [len(read_jsonl(run.trajectories)) for run in runs] == [3, 5, 3, 5]
    assert [r["model"] for r in first] == [str(saved)] * 2 + [str(other)] * 2
    dates = [path.stat().st_mtime_ns for path in (run.out for run in runs)]
    runs[2].out.unlink()
    again = go(progress=done.append)
    assert loads[2:] == [str(other)] and [timeless(r) for r in again] == [timeless(r) for r in first]
    assert sum(done) == 2 * 2 * len(examples) and len(told) == 3
    assert [run.out.stat().st_mtime_ns for run in runs[:2]] == dates[:2]
    warm = settings(generation=GenerationConfig(max_new_tokens=40, temperature=0.5), replacements=("self", "zero"))
    with pytest.raises(MirageError, match=r"holds another evaluation \(generation.temperature is 0.5, was 0.0\)"):
        go(warm)
    with pytest.raises(MirageError, match="shuffle is not in it"):
        go(settings(replacements=("self", "shuffle")))
    runs[0].trajectories.unlink()
    with pytest.raises(MirageError, match=r"-one.jsonl is missing"):
        go()
    assert go(warm, restart=True)[0]["generation"]["temperature"] == 0.5


def test_a_checkpoint_that_is_not_there_stops_before_the_first_is_measured(tiny, saved, examples, tmp_path):
    runs = plan([str(saved), str(tmp_path)], [Source({"task": "one"}, examples)], tmp_path / "out")
    with pytest.raises(MirageError, match=r"not a checkpoint"):
        list(run_all(runs, settings(), lambda _: tiny))
    assert not (tmp_path / "out").exists()


# -- the command -----------------------------------------------------------------------------------------------------

SMALL = ["--levels", "3", "--n", "4"]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        run(["eval", *map(str, arguments)])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error


def test_what_the_command_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mirage_vlm.cli.evaluate.load_model", lambda *_: pytest.fail("it is refused before that"))
    maps, (file, folder) = VSP / "planning.jsonl", (tmp_path / "file", tmp_path / "folder")
    file.write_text("kept")
    folder.mkdir()
    planning = ["--task", "vsp-planning", *SMALL]
    assert "give --data or --task" in refused(capsys)
    assert "nowhere.jsonl: no such file" in refused(capsys, "--data", maps, "--data", tmp_path / "nowhere.jsonl")
    assert "there is no task 'x'" in refused(capsys, "--task", "x", *planning)
    assert "vsp-planning is named twice" in refused(capsys, *planning, *planning)
    assert "planning.jsonl is named twice" in refused(capsys, "--data", maps, "--data", VSP / ".." / "vsp" / maps.name)
    assert "--model: bundled is named twice" in refused(capsys, *planning, "--model", "bundled", "--model", "bundled")
    for wrong in (("--min-pixels", 0), ("--max-pixels", -1), ("--min-pixels", 900, "--max-pixels", 800)):
        assert "min_pixels" in (error := refused(capsys, *planning, *wrong)) or "max_pixels must be" in error
    several = [*planning, "--data", maps]
    assert "--out: " in (error := refused(capsys, *several, "--out", file)) and "2 evaluations" in error
    assert "--out: " in (error := refused(capsys, *planning, "--out", folder)) and "is a folder" in error
    assert "must be different files" in refused(capsys, *planning, "--out", file, "--trajectories", file)
    assert "vsp-planning: there is nothing to evaluate" in refused(capsys, "--task", "vsp-planning", "--n", 0)
    assert "add --replace" in refused(capsys, *planning, "--figure", tmp_path / "x.png")
    assert ".png or .svg" in refused(capsys, *planning, "--replace", "zero", "--figure", tmp_path / "x.gif")
    assert "unknown replacement 'nul'" in refused(capsys, *planning, "--replace", "nul")
    assert file.read_text() == "kept" and not list(folder.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_task_beside_data_is_that_of_rows_that_have_none(tmp_path):
    rows = tmp_path / "rows.jsonl"
    question = {"messages": [{"role": "user", "content": "q"}]}
    rows.write_text("".join(json.dumps(question | more) + "\n" for more in ({"answer": "A"}, {"task": "sat"})))
    (source,) = open_sources([rows], ["choice"], None, 5, "cot", 0, None)
    assert [example.task for example in source.examples] == ["choice", "sat"]
    assert source.origin == {"path": str(rows), "task": "choice", "style": "cot", "limit": None}
    with pytest.raises(MirageError, match="name one --task for them, not choice, sat"):
        open_sources([rows], ["choice", "sat"], None, 5, "cot", 0, None)
    with pytest.raises(MirageError, match="there is no task 'x'"):
        open_sources([rows], ["x"], None, 5, "cot", 0, None)
    both = open_sources([VSP / "planning.jsonl"], ["vsp-reasoning"], (3,), 2, "cot", 0, 2)
    assert [source.label for source in both] == [str(VSP / "planning.jsonl"), "vsp-reasoning"]


def test_the_command_with_several(tmp_path):
    out = tmp_path / "out"
    arguments = ["eval", "--task", "vsp-planning", *SMALL, "--data", str(VSP / "reasoning.jsonl"), "--limit", "2"]
    shown = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "all evaluations" in shown.output
    assert sorted(path.name for path in out.iterdir()) == ["bundled-reasoning.json", "bundled-vsp-planning.json"]
    found = read(out / "bundled-vsp-planning.json")
    assert found["n"] == 2 and found["data"]["limit"] == 2 and "replacements" not in found
    weights = Path(resolve("bundled")) / "model.safetensors"
    assert found["sha256"]["model"]["model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_files(tmp_path):
    """SIGKILL, in `self` and again in a replacement, against an unbroken run of the same command."""

    def command(name):
        made = ["--task", "vsp-planning", "--levels", "3,4", "--n", "12", "--batch-size", "4"]
        files = ["--out", tmp_path / f"{name}.json", "--trajectories", tmp_path / f"{name}.jsonl"]
        return ["eval", *made, "--replace", ",".join(NAMES), *map(str, files)]

    partial = tmp_path / "broken.json.partial"
    for lines in (4, 22):
        process = subprocess.Popen(
            [sys.executable, "-m", "mirage_vlm.cli.main", *command("broken")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if partial.exists() and partial.read_bytes().count(b"\n") >= lines:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL, errors
        assert not (tmp_path / "broken.json").exists()
    assert 22 <= partial.read_bytes().count(b"\n") < 49
    with partial.open("ab") as file:
        file.write(b'{"replacement": "shuffle", "exam')  # as if it had been cut off there
    shown = CliRunner().invoke(app, command("broken"))
    assert shown.exit_code == 0 and "goes on after" in shown.output, shown.output
    assert not partial.exists()
    assert CliRunner().invoke(app, command("whole")).exit_code == 0
    assert timeless(read(tmp_path / "broken.json")) == timeless(read(tmp_path / "whole.json"))
    ours, theirs = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("broken", "whole"))
    assert [t.decoding for t in ours] == [t.decoding for t in theirs] and len(ours) == 12
    assert all(span.latents is not None for t in ours for span in t.spans)


def test_another_seed_is_told_from_a_killed_one(tmp_path, capsys):
    out = tmp_path / "r.json"
    line = {"settings": {"model": "bundled", "seed": 0}}
    (tmp_path / "r.json.partial").write_text(json.dumps(line) + "\n")
    error = refused(capsys, "--task", "vsp-planning", *SMALL, "--seed", 1, "--out", out)
    assert "seed is 1, was 0" in error or "and " in error
    assert "--restart" in error and not out.exists()
    with pytest.raises(SystemExit) as left:
        run(["eval", "--task", "vsp-planning", *SMALL, "--seed", "1", "--out", str(out), "--restart"])
    assert left.value.code == 0 and read(out)["seed"] == 1 and not (tmp_path / "r.json.partial").exists()

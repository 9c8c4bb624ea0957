"""The layout of lmms-eval, against small files of that layout."""

import hashlib
import json
import math
import statistics
from pathlib import Path

import pytest

from mirage_vlm.cli.main import run as command
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.lmms_layout import to_lmms, write_lmms
from mirage_vlm.formats import write_jsonl
from mirage_vlm.sources import Answer, Choices, Mapping, load
from mirage_vlm.trajectory import Decoding, Text

VSP = Path(__file__).parents[1] / "data" / "vsp" / "planning.jsonl"

# what a run of lmms-eval writes, with the values of a run of its own in place
RESULTS = json.loads("""
{"results": {"mmstar": {"alias": "mmstar", "exact_match,none": 0.5, "exact_match_stderr,none": 0.5}},
 "group_subtasks": {"mmstar": []},
 "configs": {"mmstar": {"task": "mmstar", "dataset_path": "Lin-Chen/MMStar", "output_type": "generate_until",
   "generation_kwargs": {"max_new_tokens": 16}, "metadata": {"version": 0.0},
   "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": true}]}},
 "versions": {"mmstar": 0.0}, "n-shot": {"mmstar": 0}, "higher_is_better": {"mmstar": {"exact_match": true}},
 "n-samples": {"mmstar": {"original": 2, "effective": 2}},
 "config": {"model": "llava", "model_args": "pretrained=a/b", "batch_size": "1", "device": null, "limit": 2.0,
   "gen_kwargs": "", "random_seed": 0},
 "date": "20250101_120000", "task_hashes": {"mmstar": "ab"}, "model_source": "llava", "model_name": "a/b",
 "model_name_sanitized": "a__b", "total_evaluation_time_seconds": "12.5"}
""")
SAMPLE = json.loads("""
{"doc_id": 0, "target": "A", "filtered_resps": ["A"], "doc_hash": "00", "prompt_hash": "11", "target_hash": "22",
 "exact_match": 1.0, "input": "Which?"}
""")


@pytest.fixture
def decoded(tmp_path):
    """Four questions answered, three rightly; the results as `mirage eval` keeps them."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"q": f"Which, {i}?", "c": ["x", "y"], "a": "B"}) + "\n" for i in range(4)))
    examples = load(Mapping("q", Answer("a"), choices=Choices(column="c")), path)
    responses = [r"\boxed{B}", "So \\boxed{y}", r"\boxed{A}", r"\boxed{B}"]
    trajectories = [
        example.with_response((Text(response),), Decoding((1, 2, 3), "stop"))
        for example, response in zip(examples, responses, strict=True)
    ]
    results = {
        "model": "org/model",
        "data": {"path": "data.jsonl", "limit": None},
        "generation": {"max_new_tokens": 16},
        "engine": {"max_rows": 8},
        "machine": {"device": "cpu"},
        "versions": {"mirage_vlm": "1.0"},
        "date": "2026-01-02T03:04:05+00:00",
        "seconds": 12.5,
        "seed": 0,
        "items": [{"name": str(i), "correct": right} for i, right in enumerate([True, True, False, True])],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_jsonl(tmp_path / "trajectories.jsonl", trajectories)
    return results, trajectories


def write(tmp_path):
    return write_lmms(tmp_path / "results.json", tmp_path / "trajectories.jsonl", tmp_path / "out")


def test_files_have_the_names_and_keys_of_the_layout(tmp_path, decoded):
    aggregated, samples = write(tmp_path)
    assert aggregated == tmp_path / "out/org__model/20260102_030405_results.json"
    assert samples == tmp_path / "out/org__model/20260102_030405_samples_choice_data.jsonl"
    found = json.loads(aggregated.read_text())
    assert set(found) == set(RESULTS)
    for key, value in RESULTS.items():
        mine = found[key]["choice_data"] if isinstance(value, dict) and "mmstar" in value else found[key]
        theirs = value["mmstar"] if isinstance(value, dict) and "mmstar" in value else value
        if isinstance(theirs, dict):
            assert set(theirs) <= set(mine), key
        if key != "versions":
            assert type(mine) is type(theirs), key
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert list(line)[:6] == list(SAMPLE)[:6]
        assert all(type(line[key]) is type(value) for key, value in SAMPLE.items())


def test_values(tmp_path, decoded):
    aggregated, samples = (path.read_text() for path in write(tmp_path))
    found, lines = json.loads(aggregated), [json.loads(line) for line in samples.splitlines()]
    row = found["results"]["choice_data"]
    outcomes = [1, 1, 0, 1]
    assert row["exact_match,none"] == statistics.mean(outcomes)
    assert row["exact_match_stderr,none"] == pytest.approx(statistics.stdev(outcomes) / math.sqrt(4))
    assert row["exact_match_ci95,none"] == pytest.approx([0.3006, 0.9544], abs=1e-4)  # Wilson's, worked out by hand
    assert found["n-samples"]["choice_data"] == {"original": 4, "effective": 4}
    assert [line["exact_match"] for line in lines] == outcomes
    assert [line["doc_id"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["filtered_resps"] == ["So \\boxed{y}"]
    assert lines[2]["verdict"] == "A is wrong: it is B"
    assert {line["target"] for line in lines} == {"B"}
    assert {line["target_hash"] for line in lines} == {hashlib.sha256(b"B").hexdigest()}
    assert len({line["doc_hash"] for line in lines}) == 4
    assert lines[3]["input"].startswith("Which, 3?\n(A) x\n(B) y\n")


def test_evaluations_of_the_same_second_are_all_kept(tmp_path, decoded):
    """Of another data file, of a file of the same name, and the first of them again."""
    results, _ = decoded
    written = []
    for path in ("data.jsonl", "other.jsonl", "there/data.jsonl", "data.jsonl"):
        (tmp_path / "results.json").write_text(json.dumps(results | {"data": {"path": path, "limit": None}}))
        written.append(write(tmp_path))
    folder = tmp_path / "out/org__model"
    names = [[str(path.relative_to(folder)) for path in files] for files in written]
    assert names == [
        ["20260102_030405_results.json", "20260102_030405_samples_choice_data.jsonl"],
        ["20260102_030405-2_results.json", "20260102_030405-2_samples_choice_other.jsonl"],
        ["20260102_030405-3_results.json", "20260102_030405-3_samples_choice_data.jsonl"],
        names[0],
    ]
    assert len(list(folder.iterdir())) == 6
    paths = [json.loads(files[0].read_text())["configs"] for files in written]
    assert [next(iter(tasks.values()))["dataset_path"] for tasks in paths[:3]] == [
        "data.jsonl",
        "other.jsonl",
        "there/data.jsonl",
    ]


def test_made_examples_keep_the_name_of_their_task(decoded):
    results, trajectories = decoded
    aggregated, samples = to_lmms(results | {"data": {"task": "choice", "levels": [1]}}, trajectories)
    assert (list(aggregated["results"]), list(samples)) == (["choice"], ["choice"])


def test_both_must_be_of_the_same_evaluation(decoded):
    results, trajectories = decoded
    with pytest.raises(MirageError, match="here: 4 items, but 3 trajectories"):
        to_lmms(results, trajectories[:3], "here")
    with pytest.raises(MirageError, match="here: example 2: they are not of the same evaluation"):
        to_lmms(results, [*trajectories[:2], trajectories[3], trajectories[2]], "here")
    with pytest.raises(MirageError, match="here: example 0: they are not of the same evaluation"):
        to_lmms(results, [trajectories[0].with_response(trajectories[0].response), *trajectories[1:]], "here")


def test_files_that_cannot_be_read(tmp_path, decoded):
    with pytest.raises(MirageError, match=r"none\.json: cannot be read"):
        write_lmms(tmp_path / "none.json", tmp_path / "trajectories.jsonl", tmp_path)


def test_mirage_eval_writes_it(tmp_path, capsys):
    line = ["eval", "--data", str(VSP), "--limit", "2", "--max-new-tokens", "8"]
    with pytest.raises(SystemExit) as end:
        command([*line, "--lmms", str(tmp_path / "logs")])
    assert end.value.code == 2 and "add --out and --trajectories" in capsys.readouterr().err
    files = [str(tmp_path / name) for name in ("r.json", "t.jsonl", "logs")]
    with pytest.raises(SystemExit) as end:
        command([*line, "--out", files[0], "--trajectories", files[1], "--lmms", files[2]])
    assert not end.value.code
    (results,) = (tmp_path / "logs").glob("*/*_results.json")
    (samples,) = (tmp_path / "logs").glob("*/*_samples_vsp-planning_planning.jsonl")
    assert json.loads(results.read_text())["n-samples"]["vsp-planning_planning"]["effective"] == 2
    assert len(samples.read_text().splitlines()) == 2


def test_mirage_eval_writes_one_for_each_data_file(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(line + "\n" for line in VSP.read_text().splitlines()[2:5]))
    line = ["eval", "--data", str(VSP), "--data", str(other), "--limit", "2", "--max-new-tokens", "4"]
    files = {name: str(tmp_path / name) for name in ("out", "trajectories", "lmms")}
    with pytest.raises(SystemExit) as end:
        command([*line, *(part for name, path in files.items() for part in (f"--{name}", path))])
    assert not end.value.code
    found = [json.loads(path.read_text()) for path in (tmp_path / "lmms").glob("*/*_results.json")]
    assert sorted(task for results in found for task in results["results"]) == [
        "vsp-planning_other",
        "vsp-planning_planning",
    ]
    assert len(list((tmp_path / "lmms").glob("*/*_samples_*.jsonl"))) == 2

"""Rows that cannot be decoded or scored: errors with a reason, wrong in all counts, and no harm to the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
from support import ragged

from mirage_vlm.cli.main import run as command
from mirage_vlm.decoding import Engine, EngineConfig, GenerationConfig
from mirage_vlm.errors import MirageError, NoRoom
from mirage_vlm.evaluation.compare import compare, items
from mirage_vlm.evaluation.evaluate import evaluate, summarise
from mirage_vlm.evaluation.kept import Kept
from mirage_vlm.evaluation.replace import replacement_test, summarise_replacements
from mirage_vlm.formats import read_jsonl
from mirage_vlm.tasks import Score, Task
from mirage_vlm.trajectory import Image, LatentSpan, Message, Trajectory, assistant_turn, user_turn

GENERATION = GenerationConfig(max_new_tokens=40, temperature=1.0, seed=5)
NAMES = ("self", "zero", "shuffle", "oracle")
MAP = {"level": 3, "map": ["SFF", "FHF", "FFG"]}


class Fussy(Task):
    """Cannot score some responses."""

    name = "fussy:FUSSY"

    def make(self, *_, **__):
        raise NotImplementedError

    def prompt(self, *_, **__):
        raise NotImplementedError

    def score(self, trajectory: Trajectory) -> Score:
        if trajectory.meta["bad"]:
            raise MirageError("cannot score: it is bad")
        return Score(True, True, None, "fine")


@pytest.fixture
def good():
    """Seven prompts with an answer and a helper image."""
    found = [e for e in (*ragged(), *ragged()) if any(span.helper for span in e.spans)][:7]
    return [replace(e, answer="D", meta={"id": i, "level": i % 2}) for i, e in enumerate(found)]


def gone(example, tmp_path):
    """The same with a picture that has vanished."""
    image = Image(tmp_path / "vanished.png")
    return replace(example, messages=(user_turn(image, "Which way?"), *example.messages[1:]))


def thin(example):
    return replace(example, messages=(user_turn(Image(PIL.Image.new("RGB", (3000, 10))), "?"), *example.messages[1:]))


def long(example):
    return replace(example, messages=(user_turn("way " * 9000), *example.messages[1:]))


def spoilt(good, tmp_path):
    """Three rows among the good ones that fail each in its way, and where."""
    rows = [*good]
    rows[1], rows[3], rows[6] = gone(rows[1], tmp_path), thin(rows[3]), long(rows[6])
    return rows, (1, 3, 6)


@pytest.mark.parametrize("most", [1, 2, 64])
def test_the_others_come_out_as_they_do_without_it(tiny, good, tmp_path, most):
    rows, bad = spoilt(good, tmp_path)
    seen = []
    found = evaluate(tiny, rows, GENERATION, EngineConfig(max_rows=most), seen.append, strict=False)
    plain = evaluate(tiny, good, GENERATION, EngineConfig(max_rows=most))
    assert sum(seen) == len(rows)
    for i, (one, other) in enumerate(zip(found, plain, strict=True)):
        if i in bad:
            assert one.error and one.decoding.finish_reason == "error"
            assert not one.score.correct and not one.score.valid
            assert not one.trajectory.response and one.latents == one.tokens == 0
        else:
            assert one.error is None and one.decoding == other.decoding and one.score == other.score
    assert "vanished.png" in found[1].error and "aspect ratio" in found[3].error and "context" in found[6].error


def test_strict_and_a_library_call_raise(tiny, good, tmp_path):
    rows, _ = spoilt(good, tmp_path)
    for kept in (None, Kept()):
        with pytest.raises(MirageError, match=r"vanished\.png"):
            evaluate(tiny, rows, GENERATION, kept=kept)
    placed = [replace(row, where=f"x.jsonl:{i}") for i, row in enumerate(rows, 4)]
    with pytest.raises(MirageError, match=r"^x\.jsonl:5: .*vanished\.png"):
        evaluate(tiny, placed, GENERATION, kept=Kept())


def test_counts(tiny, good, tmp_path):
    rows, bad = spoilt(good, tmp_path)
    found = evaluate(tiny, rows, GENERATION, strict=False)
    results = summarise(found)
    assert results["errors"] == 3 and results["n"] == 7
    assert sum(level["errors"] for level in results["by_level"].values()) == 3
    right = sum(each.score.correct for each in found)
    assert results["accuracy"] == right / 7
    listed = items(found)
    assert [i for i, item in enumerate(listed) if "error" in item] == list(bad)
    plain = items(evaluate(tiny, good, GENERATION))
    named = {item["name"] for item in plain}
    assert {item["name"] for i, item in enumerate(listed) if i not in bad} <= named
    assert compare({"items": listed}, {"items": listed})["errors"] == [3, 3]


def test_a_scorer_that_refuses(tiny, good, monkeypatch):
    monkeypatch.setattr("mirage_vlm.tasks.get_task", lambda name: Fussy())
    rows = [replace(e, task="fussy:FUSSY", meta={"bad": i == 2}) for i, e in enumerate(good)]
    found = evaluate(tiny, rows, GENERATION, strict=False)
    assert [each.score.correct for each in found] == [True, True, False, True, True, True, True]
    assert found[2].error == "cannot score: it is bad" and found[2].decoding.token_ids
    with pytest.raises(MirageError, match="example 3: cannot score: it is bad"):
        evaluate(tiny, rows, GENERATION)


def test_where_nothing_can_be_evaluated_it_says_so_and_forgets(tiny, good, tmp_path):
    path = tmp_path / "partial"
    with pytest.raises(MirageError, match=r"none of 2 could be evaluated; example 1: .*vanished"):
        evaluate(tiny, [gone(e, tmp_path) for e in good[:2]], GENERATION, kept=Kept(path), strict=False)
    assert not path.exists(), "the pictures may be there the next time"


def test_too_little_memory_is_no_fault_of_a_row(tiny, good):
    with pytest.raises(NoRoom, match="max_batch_tokens"):
        evaluate(tiny, good, GENERATION, EngineConfig(max_batch_tokens=16), strict=False)


def test_a_fault_of_the_engine_ends_it(tiny, good, monkeypatch):
    def broken(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Engine, "_advance", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(tiny, good, GENERATION, strict=False)


def test_a_failure_is_kept_and_not_tried_again(tiny, good, tmp_path):
    rows, _ = spoilt(good, tmp_path)
    path = tmp_path / "partial"
    found = evaluate(tiny, rows, GENERATION, kept=Kept(path), strict=False)
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "vanished.png")
    kept = Kept(path)
    assert kept.resumed == 7 and kept.failed == 3
    again = evaluate(tiny, rows, GENERATION, kept=kept, strict=False)
    assert [e.error for e in again] == [e.error for e in found]
    assert [e.decoding for e in again] == [e.decoding for e in found]


def test_an_error_with_one_replacement_is_one_with_all(tiny, good, tmp_path):
    """Two rows fail as prompts, one has a helper image that has vanished; the others are as without them."""
    rows = [*good]
    rows[1], rows[3] = gone(rows[1], tmp_path), thin(rows[3])
    helper = assistant_turn(LatentSpan(Image(tmp_path / "helper.png")), "x")
    rows[5] = replace(rows[5], messages=(*rows[5].prompt, helper))
    found = replacement_test(tiny, rows, NAMES, replace(GENERATION, temperature=0.0), seed=3, strict=False)
    for name in NAMES:
        assert [i for i, each in enumerate(found[name]) if each.error] == [1, 3, 5], name
    assert "helper.png" in found["self"][5].error
    summary = summarise_replacements(found)
    assert all(row["errors"] == 3 for row in summary.values())
    assert all(row["correct"][i] == "0" for row in summary.values() for i in (1, 3, 5))
    own = evaluate(tiny, good, replace(GENERATION, temperature=0.0))
    for i in (0, 2, 4, 6):
        assert found["self"][i].decoding.token_ids == own[i].decoding.token_ids
    zero = replacement_test(tiny, good, ("zero",), replace(GENERATION, temperature=0.0), seed=3)["zero"]
    for i in (0, 2, 4, 6):
        assert found["zero"][i].decoding.token_ids == zero[i].decoding.token_ids, "hooks know the rows by number"


@pytest.fixture
def data(tmp_path) -> Path:
    """Four maps, of which one has a picture that is too thin, and one no plan."""
    PIL.Image.new("RGB", (3000, 10)).save(tmp_path / "thin.png")
    content = [{"type": "image", "image": "thin.png"}, {"type": "text", "text": "Which way?"}]
    bad = {"messages": [{"role": "user", "content": content}], "task": "vsp-planning", "meta": {"map": MAP["map"]}}
    lines = [{**MAP, "id": 1}, bad, {**MAP, "id": 2}, {**bad, "meta": {}}]
    path = tmp_path / "maps.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def mirage(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        command([str(argument) for argument in arguments])
    assert (end.value.code or 0) == code


def test_the_command_counts_shows_and_goes_on(data, tmp_path, capsys):
    out, decoded, lmms = tmp_path / "r.json", tmp_path / "t.jsonl", tmp_path / "lmms"
    mirage("eval", "--data", data, "--out", out, "--trajectories", decoded, "--lmms", lmms)
    results = json.loads(out.read_text())
    assert results["errors"] == 2 and results["n"] == 4 and results["invalid_rate"] == 0.5
    assert [(one["row"], one["where"]) for one in results["failed"]] == [(2, f"{data}:2"), (4, f"{data}:4")]
    shown = capsys.readouterr().out
    assert f"2 of 4 rows failed and count as wrong; the first, {data}:2: " in shown and "aspect" in shown
    kept = read_jsonl(decoded, check_files=False)
    assert [row.decoding.finish_reason for row in kept] == ["stop", "error", "stop", "error"]
    samples = [json.loads(line) for path in lmms.rglob("*samples*") for line in path.read_text().splitlines()]
    assert sorted(sample["exact_match"] for sample in samples)[:2] == [0.0, 0.0]


def test_strict_ends_before_anything_is_decoded(data, tmp_path, capsys):
    mirage("eval", "--data", data, "--out", tmp_path / "r.json", "--strict", code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {data}:2: ") and not (tmp_path / "r.json").exists()


def test_without_failures_nothing_is_said(tmp_path, capsys):
    path = tmp_path / "maps.jsonl"
    path.write_text(json.dumps({**MAP, "id": 1}) + "\n")
    mirage("eval", "--data", path, "--out", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["errors"] == 0 and results["failed"] == []
    assert "failed" not in capsys.readouterr().out


def test_bare_messages_still_decode(tiny):
    from mirage_vlm.decoding.generate import responses

    refused = []
    found = {}
    prompts = [(Message("user", ()),), thin(Trajectory((user_turn("x"),))), (user_turn("which way"),)]
    for done in responses(tiny, prompts, GENERATION, refused=lambda i, fault: refused.append(i)):
        found |= done
    assert refused == [1] and sorted(found) == [0, 2]

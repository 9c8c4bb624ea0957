"""Timing side by side: who runs when, what counts, and what is told of the machine."""

from __future__ import annotations

import gc
import json
from collections import Counter

import pytest
import torch

from mirage_vlm.benchmarks import harness
from mirage_vlm.benchmarks.harness import Beginning, Result, Timed, as_json, interleave, over

CPU = torch.device("cpu")


def silent(what: str) -> None:
    pass


class Clock:
    """In place of `time.perf_counter`: stands still but for what the ways take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", found)
    return found


def test_ways_take_turns_and_each_begins_a_round(clock):
    calls: list[str] = []
    interleave({name: lambda name=name: calls.append(name) for name in "abc"}, 6, 0, CPU, silent)
    rounds = [calls[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert Counter(names[0] for names in rounds) == {"a": 2, "b": 2, "c": 2}


def test_repetitions_are_timed_and_warm_ups_are_not(clock):
    takes = iter([100.0, 3.0, 1.0, 2.0])

    def way() -> float:
        took = next(takes)
        clock.now += took
        return took

    runs = interleave({"a": way}, 3, 1, CPU, silent)["a"]
    assert runs.seconds == pytest.approx((3.0, 1.0, 2.0))
    assert runs.median == pytest.approx(2.0)
    assert runs.output == 2.0, "of the last repetition"


def test_a_way_may_take_its_own_time(clock):
    def way() -> Timed:
        clock.now += 50.0  # preparations
        return Timed(2.5, "done")

    runs = interleave({"a": way}, 2, 0, CPU, silent)["a"]
    assert runs.seconds == (2.5, 2.5) and runs.output == "done"


def test_what_is_being_done_is_told():
    told: list[str] = []
    interleave({"a": lambda: None}, 2, 1, CPU, told.append)
    assert told == ["warm-up: a", "round 1 of 2: a", "round 2 of 2: a"]


def test_the_garbage_collector_is_left_as_it_was():
    frozen = gc.get_freeze_count()
    interleave({"a": lambda: None}, 1, 0, CPU, silent)
    assert gc.get_freeze_count() == frozen

    def broken() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        interleave({"a": broken}, 1, 0, CPU, silent)
    assert gc.get_freeze_count() == frozen


def test_ratios_are_throughput_over_throughput():
    assert over(30.0, 10.0) == 3.0
    assert over(None, 10.0) is None and over(10.0, None) is None


def test_the_json_says_where_when_and_how():
    result = Result("decode", {"batches": [1]}, ratios={"x": 2.0, "lost": None})
    found = as_json(result, quick=True, command="mirage bench decode", device=CPU, begun=Beginning.now())
    found = json.loads(json.dumps(found))
    assert found["benchmark"] == "decode" and found["quick"] is True and found["command"] == "mirage bench decode"
    assert found["ratios"] == {"x": 2.0, "lost": None}
    assert found["machine"]["processor"] and found["machine"]["cores"] >= 1
    assert found["machine"]["threads"] == torch.get_num_threads() and found["machine"]["gpu"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert found["date"].endswith("+00:00")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor : 0\nmodel name : A 9000\n\nprocessor : 1\nmodel name : B\n", "A 9000"),
        ("cpu family : 25\nmodel : 1\nmodel name : AMD EPYC\n", "AMD EPYC (cpu family 25, model 1)"),
    ],
)
def test_the_processors_name(monkeypatch, text, name):
    monkeypatch.setattr(harness.Path, "read_text", lambda *_: text)
    assert harness._processor() == name

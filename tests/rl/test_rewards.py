"""Rewards on responses written by hand, and what is refused."""

import math
import os
import re
import sys

import numpy as np
import pytest
import torch

from mirage_vlm.errors import MirageError
from mirage_vlm.rl.rewards import REWARDS, reward_of
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.trajectory import Decoding, LatentSpan, Text, Trajectory


@pytest.fixture(scope="module")
def example() -> Trajectory:
    return GeneratedDataset("vsp-planning", (4,), 1, 0, "direct", "test")[0]


def said(example: Trajectory, text: str, spans: int = 0, reason: str = "stop", tokens: int = 10) -> Trajectory:
    segments = (*[LatentSpan(k=2)] * spans, Text(text))
    return example.with_response(segments, Decoding(tuple(range(tokens)), reason))


def test_accuracy_and_optimality(example):
    moves = example.answer
    there_and_back = {"U": "UD", "D": "DU", "L": "LR", "R": "RL"}
    first = moves.replace(",", "")[0]
    detour = ",".join(first + there_and_back[first][1] + moves.replace(",", ""))
    responses = [
        said(example, rf"\boxed{{{moves}}}"),
        said(example, rf"\boxed{{{detour}}}"),
        said(example, r"\boxed{}"),
        said(example, "no idea"),
    ]
    assert reward_of("accuracy")(responses) == [1, 1, 0, 0]
    assert reward_of("optimality")(responses) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "reason", "worth"),
    [
        (r"<think>a</think>\boxed{U}", "stop", 1),
        ("\n<think>a\nb</think>\n\\boxed{U}.", "stop", 1),
        (r"<think>a</think>\boxed{U}", "length", 0),
        (r"<think>\boxed{U}</think>", "stop", 0),
        (r"<think>a</think>\boxed{U}\boxed{D}", "stop", 0),
        (r"<think>\boxed{U}</think>\boxed{U}", "stop", 0),
        (r"<think>a</think><think>b</think>\boxed{U}", "stop", 0),
        (r"<think>a<think>b</think>\boxed{U}", "stop", 0),
        (r"a<think>b</think>\boxed{U}", "stop", 0),
        (r"\boxed{U}", "stop", 0),
        ("<think>a</think>", "stop", 0),
    ],
)
def test_format(example, text, reason, worth):
    assert reward_of("format")([said(example, text, reason=reason)]) == [worth]


def test_the_others(example):
    short, long = said(example, r"\boxed{U}", spans=1, tokens=0), said(example, "x", tokens=300)
    assert reward_of("brevity")([short, long]) == [1.0, 0.25]
    assert reward_of("thought")([short, long]) == [1, 0]
    assert reward_of("boxed")([short, long]) == [1, 0]
    empty = example.with_response((LatentSpan(k=0),), Decoding((), "stop"))
    assert reward_of("thought")([empty]) == [0], "a span in which nothing was thought"


def mine(trajectories):
    return [len(each.text) for each in trajectories]


def not_a_number(trajectories):
    return [math.nan for _ in trajectories]


def too_few(trajectories):
    return [1.0]


def fails(trajectories):
    return 1 / 0


def words(trajectories):
    return ["good" for _ in trajectories]


def of_libraries(trajectories):
    return [np.float32(0.5), torch.tensor(2.0)]


def gives_up(trajectories):
    raise MirageError("no map")


def test_a_users_own(example):
    both = [said(example, "abc"), said(example, "")]
    assert reward_of(f"{__name__}:mine")(both) == [3.0, 0.0]
    assert reward_of(f"{__name__}:of_libraries")(both) == [0.5, 2.0]


def test_a_users_own_in_the_working_directory(example, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def two(trajectories):\n    return [2.0 for _ in trajectories]\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    assert reward_of("rewards_of_mine:two")([said(example, "x")]) == [2.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:not_a_number", "gave nan, which is no finite number, for the response 'abc'"),
        (f"{__name__}:words", "gave 'good', which is no finite number, for the response 'abc'"),
        (f"{__name__}:too_few", "gave 1 numbers for 2 responses"),
        (f"{__name__}:gives_up", ": no map"),
        (f"{__name__}:fails", "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_reward_must_not_give(example, name, message):
    with pytest.raises(MirageError, match=re.escape(f"the reward {name!r}{' ' * (message[0] != ':')}{message}")):
        reward_of(name)([said(example, "abc"), said(example, "d")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "there is no reward 'acuracy'; choose from accuracy"),
        ("no.such.module:reward", "cannot be had: No module named"),
        (f"{__name__}:nothing", "cannot be had: module"),
        (f"{__name__}:pytest", "is not a function"),
    ],
)
def test_what_is_not_a_reward(name, message):
    with pytest.raises(MirageError, match=re.escape(message)):
        reward_of(name)


def test_what_cannot_be_scored():
    for trajectory, message in (
        (Trajectory((), meta={"map": ["SG"]}), "neither a task nor an answer"),
        (Trajectory((), task="vsp-planning"), 'no "map" in its meta'),
    ):
        with pytest.raises(MirageError, match=message):
            REWARDS["accuracy"]([trajectory])

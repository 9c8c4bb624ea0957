"""`mirage bench`: what is written, what is printed, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from mirage_vlm.benchmarks import scaling, suite
from mirage_vlm.benchmarks.harness import Result, Sheet
from mirage_vlm.benchmarks.scaling import Point, ScalingSettings
from mirage_vlm.benchmarks.suite import Options, names_of
from mirage_vlm.cli.main import run

TINY = ScalingSettings(
    base=Point(k=2, batch=1),
    k=(1, 2),
    spans=(0, 1),
    images=(1, 2),
    batch=(1, 2),
    new_tokens=6,
    train_k=(1, 2),
    train_batch=1,
    train_level=3,
    repetitions=1,
    warmups=0,
)


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs a command line; returns what it printed."""

    def call(*arguments, code=0):
        line = ["bench", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mirage", *line])
        with pytest.raises(SystemExit) as end:
            run(line)
        shown = capsys.readouterr()
        assert (end.value.code or 0) == code, shown.err
        return shown

    return call


@pytest.fixture
def faked(monkeypatch) -> list[tuple[str, Options]]:
    """No benchmark is run; a list of what was asked for."""
    asked: list[tuple[str, Options]] = []

    def fake(self, name, tell, trace, save):
        asked.append((name, self))
        tell("working")
        sheet = Sheet(f"{name}: things", ("way", "batch", "speed"), [("engine", "8", 1234.5), ("other", "64", None)])
        return Result(name, {"x": 1}, [{"seconds": [1.0]}], {f"{name}_over_other": 2.0}, [sheet])

    monkeypatch.setattr(Options, "run", fake)
    return asked


def test_a_real_run_writes_one_json(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling.ScalingSettings, "quick", classmethod(lambda cls: TINY))
    out = tmp_path / "new" / "scaling.json"
    shown = bench("scaling", "--quick", "--repetitions", 2, "--out", out)
    found = json.loads(out.read_text())
    assert found["benchmark"] == "scaling" and found["quick"] is True
    assert found["command"] == f"mirage bench scaling --quick --repetitions 2 --out {out}"
    assert found["settings"]["repetitions"] == 2 and found["settings"]["dtype"] == "float32"
    assert found["machine"]["device"] == "cpu" and found["versions"]["transformers"]
    assert {"decode_k2_over_k1", "train_stage2_over_stage1_k2"} <= found["ratios"].keys()
    assert all(len(m["seconds"]) == 2 and m["median"] > 0 for m in found["measurements"])
    assert "decode_k2_over_k1" in shown.out and "latents of a span" in shown.out
    assert [path.name for path in out.parent.iterdir()] == ["scaling.json"]


def test_all_is_one_json_with_all_ratios_in_one_object(bench, tmp_path, faked):
    out = tmp_path / "all.json"
    shown = bench("all", "--quick", "--out", out)
    assert [name for name, _ in faked] == ["decode", "train", "scaling"]
    found = json.loads(out.read_text())
    assert found["ratios"] == {f"{name}_over_other": 2.0 for name in ("decode", "train", "scaling")}
    assert set(found["benchmarks"]) == {"decode", "train", "scaling"}
    assert found["benchmarks"]["train"]["settings"] == {"x": 1}
    assert "1,234" in shown.out and "–" in shown.out


def test_without_out_nothing_is_written(bench, tmp_path, faked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench("decode")
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_is_kept_when_the_next_one_fails(bench, tmp_path, faked, monkeypatch):
    out, good = tmp_path / "all.json", Options.run

    def second_fails(self, name, tell, trace, save):
        if name == "train":
            save(Result(name, {"half": 1}))
            raise suite.MirageError("no")
        return good(self, name, tell, trace, save)

    monkeypatch.setattr(Options, "run", second_fails)
    bench("all", "--out", out, "--device", "cpu", code=2)
    found = json.loads(out.read_text())["benchmarks"]
    assert set(found) == {"decode", "train"} and found["train"]["settings"] == {"half": 1}


def test_options_reach_the_settings():
    options = Options(dtype="bfloat16", new_tokens=7, repetitions=2, compiled=False)
    settings = options._decode()
    assert settings.dtype == "bfloat16" and not settings.compiled
    assert {(case.new_tokens, case.repetitions) for case in settings.cases} == {(7, 2)}
    assert Options(quick=True)._decode().compiled is False
    assert [case.name for case in Options(model="random")._decode().cases] == ["random"]
    assert Options(compiled=False)._gpu().compiled == (False,)
    assert Options(compiled=True)._gpu().compiled == (True,)
    assert Options()._gpu().compiled == (False, True) and Options()._gpu().dtype == "bfloat16"


def test_what_all_means(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert names_of("all", Options()) == ("decode", "train", "scaling", "gpu")
    assert names_of("all", Options(quick=True)) == ("decode", "train", "scaling")
    assert names_of("all", Options(device="cpu")) == ("decode", "train", "scaling")
    assert names_of("gpu", Options(quick=True)) == ("gpu",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu", "--device", "cpu"], "3 and 7 billion"),
        (["decode", "--device", "nonsense"], "nonsense"),
        (["decode", "--new-tokens", "1"], "--new-tokens must be at least 2, not 1"),
        (["train", "--repetitions", "0"], "--repetitions must be at least 1, not 0"),
        (["train", "--new-tokens", "8"], "--new-tokens is an option of the decode benchmark alone"),
        (["train", "--model", "bundled"], "--model bundled is not a model of train"),
        (["train", "--batches", "8"], "--batches is an option of the decode and gpu benchmarks alone"),
        (["gpu", "--model", "random"], "--model random is not a model of gpu"),
        (["decode", "--batches", "0,8"], "--batches must be positive, not 0, 8"),
        (["decode", "--batches", "many"], "--batches must be whole numbers with commas"),
        (["scaling", "--compile"], "--compile is an option of the decode and gpu benchmarks alone"),
    ],
)
def test_refusals_are_one_line(bench, arguments, message):
    (line,) = bench(*arguments, code=2).err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("arguments", [["gpu"], ["decode", "--device", "cuda"]])
def test_no_cuda_device_is_one_line(bench, arguments):
    (line,) = bench(*arguments, code=2).err.splitlines()
    assert "finds no CUDA device" in line

"""Numbers of decoding: of the right kind and finite, or refused by name, wherever they come in."""

from __future__ import annotations

import math
import typing
from dataclasses import fields

import numpy as np
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

from mirage_vlm import values
from mirage_vlm.adapters.messages import ModelArgs, generation
from mirage_vlm.cli.main import app
from mirage_vlm.decoding import Engine, EngineConfig, GenerationConfig
from mirage_vlm.decoding.config import GenerationChanges
from mirage_vlm.errors import MirageError

WHOLE = ("max_new_tokens", "latent_size", "max_spans", "max_latents", "top_k", "n", "seed")
REAL = ("temperature", "top_p", "latent_noise")
OPTIONAL = ("latent_size", "max_spans", "max_latents")
NOT_WHOLE = ["8", 1.5, 2.0, math.nan, math.inf, True, np.bool_(True), torch.tensor(True), [1], b"1", 10**30, -(10**30)]
NOT_REAL = ["0.5", math.nan, math.inf, -math.inf, -0.5, True, np.float32("nan"), 10**400, [0.5], 1j, None]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number_is_refused_by_name(name, value):
    with pytest.raises(MirageError, match=name) as told:
        GenerationConfig(**{name: value})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", NOT_REAL, ids=lambda v: repr(v)[:12])
def test_what_is_no_finite_number_is_refused_by_name(name, value):
    with pytest.raises(MirageError, match=name) as told:
        GenerationConfig(**{name: value})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": None},
        {"n": None},
        {"top_p": 1.1},
        {"seeds": [1.5]},
        {"seeds": "12"},
        {"seeds": 3},
        {"seeds": [2**63]},
        {"logprobs": "false"},
        {"logprobs": 1},
        {"return_latents": None},
        {"evict_images": "yes"},
        {"latent_hook": 3},
        {"stop_rule": 1},
    ],
)
def test_other_wrong_kinds(changes):
    (name,) = changes
    with pytest.raises(MirageError, match=name.replace("stop_rule", "stop rule")):
        GenerationConfig(**changes)


@pytest.mark.parametrize("name", ["max_rows", "block_size", "prefill_tokens", "max_batch_tokens", "look_every"])
@pytest.mark.parametrize("value", ["8", 1.5, True, 0, -1, math.nan])
def test_numbers_of_the_engine(name, value):
    with pytest.raises(MirageError, match=name):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    "changes",
    [{"memory_fraction": math.nan}, {"memory_fraction": "0.5"}, {"image_cache": 1.5}, {"native": 1}, {"compile": "no"}],
)
def test_other_settings_of_the_engine(changes):
    with pytest.raises(MirageError, match=next(iter(changes))):
        EngineConfig(**changes)


def test_numbers_of_numpy_and_torch_are_numbers():
    made = GenerationConfig(
        max_new_tokens=np.int64(8), temperature=np.float32(0.5), seed=torch.tensor(3), seeds=np.arange(2), n=np.int32(2)
    )
    assert made == GenerationConfig(max_new_tokens=8, temperature=0.5, seed=3, seeds=(0, 1), n=2)
    assert {type(getattr(made, name)) for name in ("max_new_tokens", "seed", "n")} == {int}
    assert type(made.temperature) is float and type(GenerationConfig(temperature=1).temperature) is float
    assert all(type(seed) is int for seed in made.seeds)
    assert all(getattr(GenerationConfig(**{name: None}), name) is None for name in OPTIONAL)


def test_the_checks_say_what_they_want():
    told = {
        (values.whole, "8"): "x must be a whole number, not '8'",
        (values.real, "8"): "x must be a number, not '8'",
        (values.real, math.nan): "x must be a finite number, not nan",
    }
    for (check, value), message in told.items():
        with pytest.raises(MirageError) as fault:
            check("x", value)
        assert str(fault.value) == message
    with pytest.raises(MirageError, match=r"x must be above 0 and at most 1: 2\.0"):
        values.real("x", 2, most=1, above=0)
    with pytest.raises(MirageError, match="x must be at least 3: 2"):
        values.whole("x", 2, 3)


# -- keyword arguments -----------------------------------------------------------------------------------------------


def test_type_checkers_know_all_settings():
    hints = typing.get_type_hints(GenerationConfig)
    assert list(GenerationChanges.__annotations__) == [f.name for f in fields(GenerationConfig)]
    assert typing.get_type_hints(GenerationChanges) == hints and GenerationChanges.__total__ is False
    for call in (Engine.submit, type_of_model().generate, type_of_model().stream):
        assert "Unpack[GenerationChanges]" in str(call.__annotations__["changes"])


def type_of_model():
    from mirage_vlm import LatentVLM

    return LatentVLM


def test_a_setting_that_is_not_there_is_named(tiny):
    with pytest.raises(MirageError, match="'max_new_token'; did you mean 'max_new_tokens'"):
        tiny.generate("Go", max_new_token=8)
    for call in (
        lambda: tiny.generate("Go", 8),
        lambda: list(tiny.stream("Go", {"n": 1})),
        lambda: tiny.generate("Go", engine=4),
    ):
        with pytest.raises(MirageError, match=r"must be made by (Generation|Engine)Config\(…\), not"):
            call()


def test_one_conversation_gives_a_list_of_one(tiny):
    (row,) = tiny.generate("Which way?", max_new_tokens=4)
    (same,) = tiny.generate([{"role": "user", "content": "Which way?"}], max_new_tokens=4)
    assert row.decoding == same.decoding
    *_, end = tiny.stream({"role": "user", "content": "Which way?"}, max_new_tokens=4)
    assert end.trajectory.decoding == row.decoding
    assert len(tiny.generate("Which way?", n=3, max_new_tokens=2)) == 3
    with pytest.raises(MirageError, match="not a list of them"):
        Engine(tiny).submit([row, row])


# -- where else they come in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["temperature", "top_p", "latent_noise", "top_k", "max_new_tokens", "seed"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", math.nan, math.inf, "x"])
def test_requests_of_harnesses(name, value):
    with pytest.raises(MirageError, match=name):
        generation(ModelArgs("x", temperature=1.0), {name: value})


@pytest.mark.parametrize(
    "text", ["temperature=nan", "temperature=-1", "top_p=inf", "top_k=1.5", "max_rows=nan", "seed=nan", "latents=-1"]
)
def test_model_arguments_of_harnesses(text):
    name = text.partition("=")[0].replace("latents", "latent_size")
    with pytest.raises(MirageError, match=name):
        ModelArgs.parse(f"pretrained=x,{text}")


def test_spans_of_harnesses():
    args = ModelArgs.parse("pretrained=x,spans=forced,span_after=<think>")
    assert generation(args, {})[0].span_after == "<think>"
    assert generation(args, {"spans": "none"})[0].spans == "none"
    assert generation(args, {"spans": "forced", "span_after": "so"})[0].span_after == "so"
    assert generation(ModelArgs("x"), {"spans": "none"})[0].most_spans == 0
    with pytest.raises(MirageError, match="set spans to 'forced' as well"):
        ModelArgs.parse("pretrained=x,span_after=<think>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--task", "vsp-planning", "--temperature", "nan"], "temperature"),
        (["eval", "--task", "vsp-planning", "--top-p", "inf"], "top_p"),
        (["eval", "--task", "vsp-planning", "--batch-size", "0"], "max_rows"),
        (["eval", "--task", "vsp-planning", "--span-after", "x"], "set spans to 'forced' as well"),
        (["eval", "--task", "vsp-planning", "--spans", "often"], "spans must be one of free, forced, none"),
        (["eval", "--task", "vsp-planning", "--seed", str(2**64)], "seed"),
        (["solve", "x.png", "--question", "?", "--temperature", "inf"], "temperature"),
        (["solve", "x.png", "--question", "?", "--max-new-tokens", "0"], "max_new_tokens"),
        (["solve", "x.png", "--question", "?", "--spans", "all"], "spans must be one of"),
    ],
)
def test_options_of_the_command_line(arguments, message, tmp_path, monkeypatch):
    PIL.Image.new("RGB", (96, 96)).save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, arguments)
    assert isinstance(found.exception, MirageError) and message in str(found.exception)

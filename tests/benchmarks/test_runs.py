"""Each benchmark from end to end on tiny sizes: what it reports, and that it refuses to compare unlike things."""

from __future__ import annotations

import copy
import gzip
import json
from dataclasses import asdict, replace

import pytest
import torch

from mirage_vlm.benchmarks import decode, gpu, scaling, train
from mirage_vlm.benchmarks.decode import Case, DecodeSettings
from mirage_vlm.benchmarks.gpu import GpuSettings
from mirage_vlm.benchmarks.harness import Disagreement, Result, Runs
from mirage_vlm.benchmarks.memory import in_process
from mirage_vlm.benchmarks.scaling import Point, ScalingSettings
from mirage_vlm.benchmarks.suite import Options
from mirage_vlm.benchmarks.train import TrainSettings, Work
from mirage_vlm.benchmarks.workload import Endless, endless, planning
from mirage_vlm.errors import MirageError

DECODE = DecodeSettings(
    (Case("bundled", None, 10, 1, 0, 2, calls=1), Case("random", decode.SMALL, 10, 1, 0, 2, calls=1)), batches=(1, 3)
)
TRAIN = TrainSettings(batch=2, batches=1, pool=8, repetitions=1, warmups=0, epochs=1, memory=(), levels=(3,))
SCALING = ScalingSettings(
    base=Point(k=2, batch=2),
    k=(1, 3),
    spans=(0, 2),
    images=(1, 2),
    batch=(1, 3),
    new_tokens=12,
    train_k=(1, 3),
    train_batch=2,
    train_level=3,
    repetitions=1,
    warmups=0,
)
GPU = GpuSettings(
    shapes=("tiny",),
    batches=(1, 2),
    compiled=(False,),
    prompt=64,
    side=112,
    new_tokens=20,
    train_batch=2,
    repetitions=1,
    warmups=0,
    device="cpu",
    dtype="float32",
)


def silent(what: str) -> None:
    pass


@pytest.fixture
def model(tiny) -> Endless:
    return endless(copy.deepcopy(tiny))


@pytest.fixture
def small(model, monkeypatch) -> Endless:
    """The tiny model in place of the bundled one."""
    for module in (decode, train, scaling):
        monkeypatch.setattr(module, "bundled", lambda device, dtype: model)
    return model


def checked(result: Result) -> Result:
    """What holds of every result: it can be written down, ratios are numbers, times are there."""
    json.dumps([result.settings, result.measurements, result.ratios, result.checks], allow_nan=False)
    assert all(value is None or value > 0 for value in result.ratios.values())
    for sheet in result.sheets:
        assert sheet.rows and all(len(row) == len(sheet.headings) for row in sheet.rows)
    return result


# -- decode ----------------------------------------------------------------------------------------------------------


def test_decode(small):
    result = checked(decode.run(DECODE, silent))
    models, kinds = ("", "random_"), ("", "steps_")
    assert set(result.ratios) == {
        f"decode_{kind}{name}b{batch}_over_{other}{variant}"
        for kind in kinds
        for name in models
        for batch in (1, 3)
        for other in ("generate", "sequential")
        for variant in ("", "_half")
    }
    assert len(result.checks) == 32 and all(check["rows"] for check in result.checks)
    for found in result.measurements:
        assert len(found["seconds"]) == len(found["seconds_one_token"]) == 1
        assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["median"])
        assert found["tokens"] >= 9 * found["rows"], "no response ends by itself"
    latents = {f["way"]: f["latents"] for f in result.measurements if f["model"] == "random" and f["batch"] == 3}
    assert latents["engine"] > 0 and latents["engine_text"] == latents["generate_sdpa"] == 0


def test_the_ratios_of_the_full_form_are_named_as_promised():
    assert DecodeSettings().batches == DecodeSettings.quick().batches == (1, 8, 64)
    assert [case.name for case in DecodeSettings().cases] == ["bundled", "random"]
    assert TrainSettings().batch == TrainSettings.quick().batch == 16
    quick = Options(quick=True, dtype="float32")._gpu()
    assert quick == replace(GpuSettings.quick(), dtype="float32") != replace(GpuSettings(), dtype="float32")


def test_decode_throughput_is_that_of_the_median(small, monkeypatch):
    """With clocks of our own: the ratio is throughput over throughput, and steps alone leave out the first token."""
    speeds = {"memory": 1.0, "engine": 1.0, "engine_text": 1.75, "generate": 4.0, "sequential": 8.0}

    def fake(ways, repetitions, warmups, device, tell):
        found = {}
        for name, way in ways.items():
            kind = next(k for k in sorted(speeds, key=len, reverse=True) if k in name)
            slow = 1.5 if name.split(",")[1:2] and name.split(",")[1].endswith("_eager") else 1.0
            rows = way()
            n = 1 if name == "memory" else len(rows)
            alone = 0.25 * n if name.endswith("one token") else n  # a quarter of a row's time goes into its first
            found[name] = Runs((99.0, slow * speeds[kind] * alone, 0.0), rows)
        return found

    monkeypatch.setattr(decode, "interleave", fake)
    case = replace(DECODE.cases[0], sequential=3)
    result = decode.run(replace(DECODE, cases=(case,), batches=(3,)), silent)
    assert result.ratios["decode_b3_over_generate"] == pytest.approx(4 / 1.75, abs=1e-4), "the faster attention counts"
    assert result.ratios["decode_steps_b3_over_generate"] == pytest.approx((4 - 1) / (1.75 - 0.25), abs=1e-4)
    ours, theirs = (next(f for f in result.measurements if f["way"] == way) for way in ("engine", "sequential_sdpa"))
    expected = (ours["tokens"] / 3.0) / (theirs["tokens"] / 24.0)
    assert result.ratios["decode_b3_over_sequential"] == pytest.approx(expected, abs=1e-4)
    steps = (ours["tokens"] - 3) / (3.0 - 0.75)
    assert ours["steps_tokens_per_second"] == pytest.approx(steps)
    assert ours["seconds_per_step"] == pytest.approx(2.25 / 9)


@pytest.mark.parametrize("broken", ["generate", "decode_one"])
def test_decode_refuses_what_says_other_things(small, monkeypatch, broken):
    true = getattr(decode, broken)

    def false(vlm, prompts, new_tokens):
        found = true(vlm, prompts, new_tokens)
        row = found[0] if broken == "generate" else found
        row[-1] = 60 if row[-1] != 60 else 61
        return found

    monkeypatch.setattr(decode, broken, false)
    with pytest.raises(Disagreement):
        decode.run(replace(DECODE, cases=DECODE.cases[:1], batches=(3,)), silent)


# -- train -----------------------------------------------------------------------------------------------------------


def test_train(small):
    before = copy.deepcopy(small.state_dict())
    result = checked(train.run(TRAIN, silent, lambda device, dtype: small))
    assert set(result.ratios) == {
        "train_stage2_b2_over_sequential",
        "train_stage2_b2_over_b1",
        "train_stage1_b2_over_b1",
        "train_stage2_over_stage1",
        "train_stage2_over_one_pass",
        "train_stage1_over_sft",
        "train_stage2_over_sft",
    }
    assert result.checks[0]["relative_difference"] < 1e-3
    assert len(result.measurements) == 11
    after = small.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before), "every repetition trains the same weights"


def test_train_refuses_another_loss(small, monkeypatch):
    true = train.stage2_one
    monkeypatch.setattr(train, "stage2_one", lambda vlm, row: 1.01 * true(vlm, row))
    with pytest.raises(Disagreement, match="one example at a time"):
        train.run(TRAIN, silent, lambda device, dtype: small)


def test_both_trainers_see_every_batch_as_often(small, monkeypatch):
    work = Work(replace(TRAIN, batches=2, epochs=3), small)
    seen = []
    handle = small.language_model.register_forward_pre_hook(lambda *_: seen.append(small.training))
    counts = []
    for way in ("trainer_stage1", "trainer_sft"):
        work.ways()[way]()
        counts.append(len(seen))
        seen.clear()
    handle.remove()
    assert counts == [8, 8], "two batches, once uncounted and three times counted"


@pytest.mark.slow
def test_peak_memory_is_measured_in_a_process_of_its_own():
    peak = train.elsewhere({"settings": asdict(TRAIN), "way": "stage1_b2"})
    assert peak is None or 100e6 < peak["before"] < peak["peak"] < 4e9


def test_peak_memory_is_what_the_work_took():
    peak = in_process(lambda: torch.ones(50_000_000))
    assert peak is None or 190e6 <= peak["peak"] - peak["before"] < 400e6  # pages are counted roughly


# -- scaling ---------------------------------------------------------------------------------------------------------


def test_scaling(small):
    result = checked(scaling.run(SCALING, silent, lambda device, dtype: small))
    assert set(result.ratios) == {
        "decode_k3_over_k1",
        "decode_spans2_over_spans0",
        "decode_images2_over_images1",
        "decode_batch3_over_batch1",
        "train_stage2_over_stage1_k1",
        "train_stage2_over_stage1_k3",
        "train_stage2_k3_over_k1",
    }
    assert [sheet.headings[0] for sheet in result.sheets] == ["k", "spans", "images", "batch", "k"]
    found = {(m["axis"], m["value"]): m for m in result.measurements if m["of"] == "decoding"}
    assert found["spans", 2]["latents"] == 2 * 2 * 2 and found["spans", 0]["latents"] == 0
    assert found["batch", 3]["tokens"] == 3 * 12


def test_scaling_varies_what_it_says():
    prompts = scaling._prompts(Point(images=2, batch=3))
    pictures = [[picture.load().tobytes() for picture in prompt.images()] for prompt in prompts]
    assert [len(own) for own in pictures] == [2, 2, 2] and len({p for own in pictures for p in own}) == 6
    for k in (1, 5):
        example = scaling._with_k(planning(1, "train")[0], k)
        assert [span.k for span in example.spans] == [k]


def test_scaling_refuses_responses_without_their_spans(small, monkeypatch):
    monkeypatch.setattr(Endless, "logits", lambda self, hidden: super(Endless, self).logits(hidden))
    with pytest.raises(Disagreement, match="it was to have"):
        scaling.run(SCALING, silent, lambda device, dtype: small)


# -- gpu -------------------------------------------------------------------------------------------------------------


def test_gpu_on_a_tiny_shape(tmp_path):
    parts = []
    found = gpu.run(
        GPU, silent, tmp_path / "x.json", lambda result: parts.append([m["of"] for m in result.measurements])
    )
    result = checked(found)
    assert [set(part) for part in parts] == [
        {"decoding"},
        {"decoding", "training"},
        {"decoding", "training", "profile"},
    ]
    assert set(result.ratios) == {
        "gpu_tiny_b1_over_bound",
        "gpu_tiny_b2_over_bound",
        "gpu_tiny_b2_over_b1",
        "gpu_steps_tiny_b2_over_b1",
        "gpu_tiny_stage1_over_peak",
        "gpu_tiny_stage2_over_peak",
        "gpu_tiny_stage2_over_stage1",
    }
    profiles = [m for m in result.measurements if m["of"] == "profile"]
    assert {p["what"] for p in profiles} == {"tiny-decode", "tiny-stage1", "tiny-stage2"}
    for found in profiles:
        assert found["most_time"]
        with gzip.open(tmp_path / found["trace"]) as file:
            assert json.load(file)["traceEvents"]


def test_gpu_does_not_try_real_shapes_on_a_cpu():
    with pytest.raises(MirageError, match="--device cuda"):
        gpu.run(replace(GPU, shapes=("tiny", "3b")), silent)
    if not torch.cuda.is_available():
        with pytest.raises(MirageError, match="CUDA"):
            gpu.run(GpuSettings(), silent)

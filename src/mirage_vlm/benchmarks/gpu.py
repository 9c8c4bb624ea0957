"""`mirage bench gpu`: the shapes of Qwen2.5-VL-3B and 7B on a card, against what the card could do at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mirage_vlm.benchmarks.bounds import Memory, Reading, datasheet, matmul, training_flops
from mirage_vlm.benchmarks.harness import Disagreement, Result, Sheet, Tell, Way, interleave, over, synchronize
from mirage_vlm.benchmarks.memory import on_card
from mirage_vlm.benchmarks.shapes import example, prompt, shaped
from mirage_vlm.benchmarks.train import forward_backward, labelled
from mirage_vlm.benchmarks.workload import Endless, decode, engine_for
from mirage_vlm.decoding import GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.decoder import checkpoint_activations
from mirage_vlm.training.data import Collator
from mirage_vlm.training.trainer import StageModule

STAGES = ("stage1", "stage2")


@dataclass(frozen=True)
class GpuSettings:
    """Sizes of the benchmark.

    Attributes:
        prompt: tokens of a prompt, its picture of `side` pixels a side among them.
        spans, k: latent spans of a response, and latents of a span.
        train_batch: examples of a forward and backward pass; decoder layers are checkpointed.
        compiled: whether the decode step is compiled: both are measured.
    """

    shapes: tuple[str, ...] = ("3b", "7b")
    batches: tuple[int, ...] = (1, 16, 64)
    compiled: tuple[bool, ...] = (False, True)
    prompt: int = 512
    side: int = 448
    new_tokens: int = 128
    spans: int = 2
    k: int = 4
    train_batch: int = 16
    repetitions: int = 3
    warmups: int = 1
    device: str = "cuda"
    dtype: str = "bfloat16"

    @classmethod
    def quick(cls) -> GpuSettings:
        """Enough to see that it works."""
        return cls(("3b",), (1, 4), (False,), new_tokens=16, train_batch=2, repetitions=1, warmups=0)


def check_device(settings: GpuSettings) -> torch.device:
    """The device to run on.

    Raises:
        MirageError: it is none that real shapes should be tried on.
    """
    device = torch.device(settings.device)
    real = set(settings.shapes) != {"tiny"}
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MirageError("mirage bench gpu needs a CUDA device, and torch finds none here")
    if device.type == "cpu" and real:
        raise MirageError("mirage bench gpu runs models of 3 and 7 billion parameters; give it --device cuda")
    return device


def run(
    settings: GpuSettings, tell: Tell, trace: Path | None = None, save: Callable[[Result], None] | None = None
) -> Result:
    """Measure every shape.

    Args:
        trace: a path like `x.json`; profiles go beside it, as `x-7b-decode.trace.json.gz` and so on.
        save: is given what is there so far after each part, so that a run that is cut short leaves that.

    Raises:
        MirageError: there is no CUDA device.
    """
    device = check_device(settings)
    dtype = getattr(torch, settings.dtype)
    result = Result("gpu", asdict(settings))
    result.sheets += [
        Sheet(
            "gpu: decoding",
            ("shape", "batch", "way", "tokens/s", "steps alone", "ms/step", "% of bound", "peak GiB"),
        ),
        Sheet(
            f"gpu: forward and backward pass, batch {settings.train_batch}, decoder layers checkpointed",
            ("shape", "stage", "examples/s", "TFLOP/s", "% of data sheet", "% of matmul", "peak GiB"),
        ),
    ]
    fastest = {"datasheet": datasheet(device), "matmul": matmul(device, dtype)}
    for name in settings.shapes:
        tell(f"{name}: making the weights")
        vlm = shaped(name, device, dtype)
        parts: list[Callable[[], None]] = [
            partial(_decoding, vlm, name, settings, tell, result),
            partial(_training, vlm, name, settings, fastest, tell, result),
        ]
        if trace is not None:
            parts.append(partial(_profiles, vlm, name, settings, trace, tell, result))
        for part in parts:
            part()
            if save is not None:
                save(result)
        del part, parts
        del vlm
        torch._dynamo.reset()  # graphs hold on to the weights
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


# -- decoding --------------------------------------------------------------------------------------------------------


def _generation(settings: GpuSettings) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=settings.new_tokens, latent_size=settings.k, max_spans=settings.spans, return_latents=False
    )


def _decoding(vlm: Endless, name: str, settings: GpuSettings, tell: Tell, result: Result) -> None:
    """All batch sizes, compiled and not, side by side."""
    vlm.opens = True
    prompts = [prompt(vlm, settings.prompt, settings.side, seed) for seed in range(max(settings.batches))]
    config = _generation(settings)
    memory = Memory(vlm.device)
    ways: dict[str, Way] = {"memory": memory}
    wholes: dict[str, Way] = {}
    for batch in settings.batches:
        for compiled in settings.compiled:
            own = prompts[:batch]
            engine = engine_for(vlm, own, settings.new_tokens, compiled=compiled)
            way = _way(batch, compiled)
            wholes[way] = ways[way] = partial(decode, engine, own, config)
            ways[f"{way}, one token"] = partial(decode, engine, own, replace(config, max_new_tokens=1))
    runs = interleave(ways, settings.repetitions, settings.warmups, vlm.device, lambda what: tell(f"{name}: {what}"))
    bandwidth = memory.size / runs["memory"].median
    steps: dict[str, float | None] = {}
    rates: dict[str, float] = {}
    for batch in settings.batches:
        for compiled in settings.compiled:
            way = _way(batch, compiled)
            whole, first = runs[way], runs[f"{way}, one token"]
            _check(vlm, settings, whole.output)
            spent = whole.median - first.median
            step = spent / (settings.new_tokens - 1) if spent > 0 else None
            least = Reading.of(vlm).step(batch * (settings.prompt + settings.new_tokens / 2)) / bandwidth
            peak = on_card(wholes[way], vlm.device)["peak"] if vlm.device.type == "cuda" else None
            rates[way] = batch * settings.new_tokens / whole.median
            steps[way] = batch / step if step else None
            found = {
                "of": "decoding",
                "shape": name,
                "batch": batch,
                "compiled": compiled,
                "seconds": whole.seconds,
                "seconds_one_token": first.seconds,
                "median": whole.median,
                "median_one_token": first.median,
                "tokens_per_second": rates[way],
                "latents_per_second": batch * settings.spans * settings.k / whole.median,
                "steps_tokens_per_second": steps[way],
                "seconds_per_step": step,
                "bound_seconds_per_step": least,
                "fraction_of_bound": least / step if step else None,
                "bandwidth": bandwidth,
                "peak_memory": peak,
            }
            result.measurements.append(found)
            share = least / step if step else None
            told = "compiled" if compiled else "eager"
            gib = peak and peak / 2**30
            result.sheets[0].rows.append(
                (name, str(batch), told, rates[way], steps[way], step and 1e3 * step, share and 100 * share, gib)
            )
            suffix = "_compiled" if compiled else ""
            one = _way(settings.batches[0], compiled)
            result.ratios[f"gpu_{name}_b{batch}_over_bound{suffix}"] = over(least, step)
            if batch != settings.batches[0]:
                against = f"b{batch}_over_b{settings.batches[0]}{suffix}"
                result.ratios[f"gpu_{name}_{against}"] = over(rates[way], rates[one])
                result.ratios[f"gpu_steps_{name}_{against}"] = over(steps[way], steps[one])


def _way(batch: int, compiled: bool) -> str:
    return f"batch {batch}, {'compiled' if compiled else 'eager'}"


def _check(vlm: Endless, settings: GpuSettings, rows: list[list[int]]) -> None:
    """Each response has the spans that it was to have."""
    for row in rows:
        latents = row.count(vlm.config.pad_id)
        if (len(row), latents) != (settings.new_tokens, settings.spans * settings.k):
            raise Disagreement(f"a response has {len(row)} positions and {latents} latents")


# -- training --------------------------------------------------------------------------------------------------------


def _training(
    vlm: Endless,
    name: str,
    settings: GpuSettings,
    fastest: dict[str, float | None],
    tell: Tell,
    result: Result,
) -> None:
    """Both stages on the same examples; no optimiser, whose states would not fit beside 7 billion parameters."""
    batch, ways = _stages(vlm, settings)
    runs = interleave(ways, settings.repetitions, settings.warmups, vlm.device, lambda what: tell(f"{name}: {what}"))
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    for stage, run_ in runs.items():
        patches = len(batch["pixel_values"]) + (len(batch["helper_pixel_values"]) if stage == "stage1" else 0)
        speed = training_flops(vlm, lengths, labelled(batch), patches) / run_.median
        peak = on_card(ways[stage], vlm.device)["peak"] if vlm.device.type == "cuda" else None
        shares = {f"fraction_of_{what}": most and speed / most for what, most in fastest.items()}
        rate = settings.train_batch / run_.median
        result.measurements.append(
            {
                "of": "training",
                "shape": name,
                "stage": stage,
                "examples": settings.train_batch,
                "tokens": sum(lengths),
                "seconds": run_.seconds,
                "median": run_.median,
                "examples_per_second": rate,
                "model_flops_per_second": speed,
                **shares,
                "peak_memory": peak,
            }
        )
        percent = [share and 100 * share for share in shares.values()]
        result.sheets[1].rows.append((name, stage, rate, speed / 1e12, *percent, peak and peak / 2**30))
        result.ratios[f"gpu_{name}_{stage}_over_peak"] = over(speed, fastest["datasheet"])
    result.ratios[f"gpu_{name}_stage2_over_stage1"] = over(runs["stage1"].median, runs["stage2"].median)


def _stages(vlm: Endless, settings: GpuSettings) -> tuple[dict[str, torch.Tensor], dict[str, Way]]:
    """A batch, and a forward and backward pass of either stage over it."""
    vlm.opens = False
    vlm.train()
    vlm.vision_tower.requires_grad_(False)
    checkpoint_activations(vlm.model)
    sizes = (settings.prompt, settings.side)
    response = (settings.new_tokens, settings.spans, settings.k)
    examples = [example(vlm, *sizes, seed, *response) for seed in range(settings.train_batch)]
    collated = Collator(vlm.encoder, targets=True)(examples)
    batch = {key: value.to(vlm.device) for key, value in collated.items()}
    return batch, {stage: partial(forward_backward, StageModule(vlm, stage), batch) for stage in STAGES}


# -- profiles --------------------------------------------------------------------------------------------------------


def _profiles(vlm: Endless, name: str, settings: GpuSettings, trace: Path, tell: Tell, result: Result) -> None:
    """Decoding and both stages, once each."""
    tell(f"{name}: profiles")
    for stage, way in _stages(vlm, settings)[1].items():
        _profile(way, vlm.device, f"{name}-{stage}", trace, result)
    vlm.opens = True
    _profile_decoding(vlm, name, settings, trace, result)


def _profile_decoding(vlm: Endless, name: str, settings: GpuSettings, trace: Path, result: Result) -> None:
    """The largest batch, a few steps of it, as fast as they were measured."""
    prompts = [prompt(vlm, settings.prompt, settings.side, seed) for seed in range(max(settings.batches))]
    engine = engine_for(vlm, prompts, settings.new_tokens, compiled=any(settings.compiled))
    decode(engine, prompts, _generation(settings))
    config = replace(_generation(settings), max_new_tokens=min(settings.new_tokens, 20))
    _profile(partial(decode, engine, prompts, config), vlm.device, f"{name}-decode", trace, result)


def _profile(way: Way, device: torch.device, what: str, trace: Path, result: Result) -> None:
    """A trace for chrome://tracing beside the JSON, and in the JSON where most of the time went."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        way()
        synchronize(device)
    path = trace.with_name(f"{trace.stem}-{what}.trace.json.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))
    on_gpu = device.type == "cuda"

    def spent(entry: Any) -> float:
        return entry.self_device_time_total if on_gpu else entry.self_cpu_time_total

    most = sorted(found.key_averages(), key=spent, reverse=True)[:12]
    result.measurements.append(
        {
            "of": "profile",
            "what": what,
            "trace": path.name,
            "most_time": [{"name": e.key, "calls": e.count, "microseconds": round(spent(e))} for e in most],
        }
    )

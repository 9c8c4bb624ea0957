"""`mirage bench scaling`: what decoding costs as spans, pictures and batches grow, and stage 2 as spans grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from mirage_vlm.benchmarks.harness import Disagreement, Result, Runs, Sheet, Tell, Way, interleave, over
from mirage_vlm.benchmarks.train import forward_backward
from mirage_vlm.benchmarks.workload import Endless, bundled, decode, engine_for, planning
from mirage_vlm.decoding import GenerationConfig
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.training.data import Collator
from mirage_vlm.training.trainer import StageModule
from mirage_vlm.trajectory import LatentSpan, Message, Trajectory, user_turn


@dataclass(frozen=True)
class Point:
    """One amount of everything that decoding depends on; `k` latents in each of `spans` spans."""

    k: int = 4
    spans: int = 1
    images: int = 1
    batch: int = 8


@dataclass(frozen=True)
class ScalingSettings:
    """Which amounts are measured; all but one stay as in `base`.

    Attributes:
        new_tokens: positions of each response, latents included.
        train_k: latents of a span in stage 2; `train_batch` examples on maps of side `train_level`, whose helper
            images have enough patches.
    """

    base: Point = Point()
    k: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    spans: tuple[int, ...] = (0, 1, 2, 4, 8)
    images: tuple[int, ...] = (1, 2, 4, 8)
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    new_tokens: int = 64
    train_k: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    train_batch: int = 16
    train_level: int = 6
    repetitions: int = 5
    warmups: int = 1
    device: str = "cpu"
    dtype: str = "float32"

    @classmethod
    def quick(cls) -> ScalingSettings:
        """Enough to see that it works."""
        return cls(
            base=Point(batch=2),
            k=(1, 8),
            spans=(0, 2),
            images=(1, 2),
            batch=(1, 8),
            new_tokens=24,
            train_k=(1, 8),
            train_batch=4,
            repetitions=1,
            warmups=0,
        )

    @property
    def axes(self) -> dict[str, tuple[int, ...]]:
        """What is varied in decoding."""
        return {name: getattr(self, name) for name in ("k", "spans", "images", "batch")}


def run(settings: ScalingSettings, tell: Tell, model: Callable[..., Endless] = bundled) -> Result:
    """Measure along every axis.

    Args:
        model: called with device and dtype.

    Raises:
        Disagreement: a response has not the spans that it was to have.
    """
    result = Result("scaling", asdict(settings))
    tell("loading")
    vlm = model(torch.device(settings.device), getattr(torch, settings.dtype))
    vlm.opens = True
    for axis, values in settings.axes.items():
        _decoding(vlm, settings, axis, values, tell, result)
    vlm.opens = False
    _training(vlm, settings, tell, result)
    return result


def _decoding(
    vlm: Endless, settings: ScalingSettings, axis: str, values: Sequence[int], tell: Tell, result: Result
) -> None:
    """One axis: all its values side by side."""
    points = [replace(settings.base, **{axis: value}) for value in values]
    ways: dict[str, Way] = {}
    for value, point in zip(values, points, strict=True):
        prompts = _prompts(point)
        engine = engine_for(vlm, prompts, settings.new_tokens)
        config = GenerationConfig(
            max_new_tokens=settings.new_tokens, latent_size=point.k, max_spans=point.spans, return_latents=False
        )
        ways[f"{axis} {value}"] = partial(decode, engine, prompts, config)
        ways[f"{axis} {value}, one token"] = partial(decode, engine, prompts, replace(config, max_new_tokens=1))
    runs = interleave(
        ways, settings.repetitions, settings.warmups, vlm.device, lambda what: tell(f"decoding by {axis}: {what}")
    )
    heads = (axis, "tokens/s", "steps alone", "latents/s", "ms/step", "ms of the prompt")
    sheet = Sheet(f"scaling: decoding by {_called(axis)} ({_rest(settings.base, axis)})", heads)
    result.sheets.append(sheet)
    rates = []
    for value, point in zip(values, points, strict=True):
        whole, first = runs[f"{axis} {value}"], runs[f"{axis} {value}, one token"]
        found = _decoded(vlm, point, settings.new_tokens, whole, first)
        result.measurements.append({"of": "decoding", "axis": axis, "value": value, **asdict(point), **found})
        step = found["seconds_per_step"]
        rates.append(found["tokens_per_second"])
        sheet.rows.append(
            (
                str(value),
                found["tokens_per_second"],
                found["steps_tokens_per_second"],
                found["latents_per_second"],
                step and 1e3 * step,
                1e3 * first.median,
            )
        )
    for value, rate in list(zip(values, rates, strict=True))[1:]:
        result.ratios[f"decode_{axis}{value}_over_{axis}{values[0]}"] = over(rate, rates[0])


def _decoded(vlm: Endless, point: Point, new_tokens: int, whole: Runs, first: Runs) -> dict[str, Any]:
    """What one point came to; its responses have the spans they were to have."""
    rows: list[list[int]] = whole.output
    pad, start = vlm.config.pad_id, vlm.config.start_id
    wanted = (new_tokens, point.spans, point.spans * point.k)
    for row in rows:
        if (len(row), row.count(start), row.count(pad)) != wanted:
            raise Disagreement(
                f"a response has {len(row)} positions, {row.count(start)} spans and {row.count(pad)} latents; it was "
                f"to have {wanted[0]}, {wanted[1]} and {wanted[2]}"
            )
    tokens, latents = len(rows) * new_tokens, len(rows) * point.spans * point.k
    spent = whole.median - first.median
    return {
        "tokens": tokens,
        "latents": latents,
        "seconds": whole.seconds,
        "seconds_one_token": first.seconds,
        "median": whole.median,
        "median_one_token": first.median,
        "tokens_per_second": tokens / whole.median,
        "latents_per_second": latents / whole.median,
        "steps_tokens_per_second": (tokens - len(rows)) / spent if spent > 0 else None,
        "seconds_per_step": spent / (new_tokens - 1) if spent > 0 else None,
    }


def _prompts(point: Point) -> list[Trajectory]:
    """Questions with so many maps each, no map in two of them."""
    maps = [picture for example in planning(point.images * point.batch, "test") for picture in example.images()]
    asked = "Which of these maps has the shortest way to the gift?"
    starts = range(0, len(maps), point.images)
    return [Trajectory((user_turn(*maps[i : i + point.images], asked),)) for i in starts]


def _called(axis: str) -> str:
    return {"k": "latents of a span", "spans": "spans", "images": "pictures of the prompt", "batch": "batch"}[axis]


def _rest(base: Point, axis: str) -> str:
    """The amounts that stay, in words."""
    return ", ".join(f"{_called(name)}: {value}" for name, value in asdict(base).items() if name != axis)


def _training(vlm: LatentVLM, settings: ScalingSettings, tell: Tell, result: Result) -> None:
    """Forward and backward passes of both stages, k by k."""
    vlm.train()
    vlm.vision_tower.requires_grad_(False)
    examples = planning(settings.train_batch, "train", (settings.train_level,))
    collate = Collator(vlm.encoder, targets=True)
    ways: dict[str, Way] = {}
    for k in settings.train_k:
        batch = {name: value.to(vlm.device) for name, value in collate([_with_k(e, k) for e in examples]).items()}
        for stage in ("stage1", "stage2"):
            ways[f"{stage}, k {k}"] = partial(forward_backward, StageModule(vlm, stage), batch)
    runs = interleave(ways, settings.repetitions, settings.warmups, vlm.device, lambda what: tell(f"training: {what}"))
    heads = ("k", "stage 1, examples/s", "stage 2, examples/s", "stage 2 / stage 1", "stage 2, ms/example")
    sheet = Sheet(f"scaling: a forward and backward pass by latents of a span (batch {settings.train_batch})", heads)
    result.sheets.append(sheet)
    rates: dict[str, float] = {}
    for way, run_ in runs.items():
        stage, _, k_ = way.partition(", k ")
        rates[way] = settings.train_batch / run_.median
        result.measurements.append(
            {
                "of": "training",
                "stage": stage,
                "k": int(k_),
                "seconds": run_.seconds,
                "median": run_.median,
                "examples_per_second": rates[way],
            }
        )
    for k in settings.train_k:
        one, two = rates[f"stage1, k {k}"], rates[f"stage2, k {k}"]
        result.ratios[f"train_stage2_over_stage1_k{k}"] = over(two, one)
        if k != settings.train_k[0]:
            smallest = settings.train_k[0]
            result.ratios[f"train_stage2_k{k}_over_k{smallest}"] = over(two, rates[f"stage2, k {smallest}"])
        sheet.rows.append((str(k), one, two, two / one, 1e3 / two))


def _with_k(example: Trajectory, k: int) -> Trajectory:
    """The same example with k latents in each span."""

    def changed(message: Message) -> Message:
        segments = (replace(s, k=k) if isinstance(s, LatentSpan) else s for s in message.segments)
        return Message(message.role, tuple(segments))

    return replace(example, messages=tuple(map(changed, example.messages)))

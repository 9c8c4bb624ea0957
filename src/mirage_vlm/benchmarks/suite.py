"""All benchmarks by name, and what `mirage bench` may ask of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mirage_vlm.benchmarks import decode, gpu, scaling, train
from mirage_vlm.benchmarks.harness import Beginning, Result, Tell, as_json
from mirage_vlm.decoding.compiled import can_compile
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.devices import choose_device

NAMES = ("decode", "train", "scaling", "gpu")
MODELS = {"decode": ("bundled", "random"), "gpu": ("3b", "7b")}


@dataclass(frozen=True)
class Options:
    """What is asked for; None leaves it to the benchmark.

    Attributes:
        quick: a form that shows in a minute or two that everything works; its times mean nothing.
        new_tokens: positions of each response (`decode`).
        repetitions: rounds that are timed.
        compiled: `decode` measures a compiled decode step too, or not; `gpu` that alone, or the eager one alone.
        model: one of the models alone: `bundled` or `random` (`decode`), `3b` or `7b` (`gpu`).
        batches: numbers of prompts decoded together (`decode`, `gpu`).
    """

    quick: bool = False
    device: str | None = None
    dtype: str | None = None
    new_tokens: int | None = None
    repetitions: int | None = None
    compiled: bool | None = None
    model: str | None = None
    batches: tuple[int, ...] | None = None

    def check(self, names: tuple[str, ...]) -> None:
        """Refuse what cannot be measured.

        Raises:
            MirageError: an option is out of range, or none of the benchmarks knows it.
        """
        for option, least in (("new_tokens", 2), ("repetitions", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise MirageError(f"--{option.replace('_', '-')} must be at least {least}, not {value}")
        if self.new_tokens is not None and "decode" not in names:
            raise MirageError("--new-tokens is an option of the decode benchmark alone")
        known = [model for name in names for model in MODELS.get(name, ())]
        if self.model is not None and self.model not in known:
            raise MirageError(f"--model {self.model} is not a model of {', '.join(names)}")
        if self.batches is not None and not {"decode", "gpu"} & set(names):
            raise MirageError("--batches is an option of the decode and gpu benchmarks alone")
        if self.batches is not None and not all(batch > 0 for batch in self.batches):
            raise MirageError(f"--batches must be positive, not {', '.join(map(str, self.batches))}")
        if self.compiled is not None and not {"decode", "gpu"} & set(names):
            raise MirageError("--compile is an option of the decode and gpu benchmarks alone")
        for name in names:
            self.device_of(name)
            if name == "gpu":
                gpu.check_device(self._gpu())

    def device_of(self, name: str) -> torch.device:
        """The device that a benchmark runs on.

        Raises:
            MirageError: it is not here.
        """
        if self.device is None and name == "gpu" and not torch.cuda.is_available():
            raise MirageError(f"{name}: torch finds no CUDA device here")
        return choose_device(self.device or ("cuda" if name == "gpu" else "cpu"))

    def run(self, name: str, tell: Tell, trace: Path | None, save: Callable[[Result], None]) -> Result:
        """Run one benchmark.

        Args:
            trace: where its JSON will be; profiles go beside it.
            save: is given what there is so far, by a benchmark of several long parts.
        """
        run: Callable[..., Result]
        if name == "decode":
            return decode.run(self._decode(), tell)
        if name == "gpu":
            return gpu.run(self._gpu(), tell, trace, save)
        module: Any = {"train": train, "scaling": scaling}[name]
        made = module.TrainSettings if name == "train" else module.ScalingSettings
        settings, run = made.quick() if self.quick else made(), module.run
        return run(replace(settings, **self._given("device", "dtype", "repetitions")), tell)

    def _decode(self) -> decode.DecodeSettings:
        settings = decode.DecodeSettings.quick() if self.quick else decode.DecodeSettings()
        settings = replace(settings, **self._given("device", "dtype", "batches"))
        if self.model in MODELS["decode"]:
            settings = replace(settings, cases=tuple(c for c in settings.cases if self.model == c.name))
        compiled = self.compiled
        if compiled is None:
            compiled = not self.quick and can_compile(torch.device(settings.device).type)
        return replace(settings, compiled=compiled).changed(self.new_tokens, self.repetitions)

    def _gpu(self) -> gpu.GpuSettings:
        settings = gpu.GpuSettings.quick() if self.quick else gpu.GpuSettings()
        settings = replace(settings, **self._given("device", "dtype", "repetitions", "batches"))
        if self.model in MODELS["gpu"]:
            settings = replace(settings, shapes=(self.model,))
        return settings if self.compiled is None else replace(settings, compiled=(self.compiled,))

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def names_of(asked: str, options: Options) -> tuple[str, ...]:
    """The benchmarks that are meant by a name, `all` among them: `gpu` only where there is one, and never quick."""
    if asked != "all":
        return (asked,)
    on_gpu = torch.cuda.is_available() and not options.quick and options.device != "cpu"
    return NAMES if on_gpu else NAMES[:-1]


def measure(
    name: str, options: Options, command: str, tell: Tell, out: Path | None, keep: Callable[[dict[str, Any]], None]
) -> Result:
    """Run one benchmark: what it found.

    Args:
        keep: is given the benchmark's JSON at the end, and of a long one after each part, lest all be lost with it.
    """
    begun, device = Beginning.now(), options.device_of(name)

    def report(result: Result) -> dict[str, Any]:
        return as_json(result, quick=options.quick, command=command, device=device, begun=begun)

    result = options.run(name, tell, out, lambda found: keep(report(found)))
    keep(report(result))
    return result


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One JSON of several: their ratios in one flat object, and each whole by its name; the machine with its card."""
    first = parts[0]
    last = parts[-1]  # `gpu`, where there is a card
    return {
        "benchmark": "all",
        **{key: first[key] for key in ("quick", "command", "date")},
        "seconds": round(sum(part["seconds"] for part in parts), 1),
        **{key: last[key] for key in ("machine", "versions")},
        "ratios": {name: value for part in parts for name, value in part["ratios"].items()},
        "benchmarks": {part["benchmark"]: part for part in parts},
    }

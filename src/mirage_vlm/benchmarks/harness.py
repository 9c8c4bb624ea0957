"""Timing things side by side, and what has to be known to read the times."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from mirage_vlm import __version__

Tell = Callable[[str], None]  # is told what is being done
Way = Callable[[], Any]  # does a piece of work once and returns what came out


class Disagreement(RuntimeError):
    """Two ways of doing the same thing came to different results, so their times must not be compared."""


@dataclass(frozen=True)
class Timed:
    """What a way returns that took its own time, to leave its preparations out."""

    seconds: float
    output: Any


@dataclass(frozen=True)
class Runs:
    """The repetitions of one way: seconds of each, and what the last one returned."""

    seconds: tuple[float, ...]
    output: Any

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    ways: Mapping[str, Way],
    repetitions: int,
    warmups: int,
    device: torch.device,
    tell: Tell,
) -> dict[str, Runs]:
    """Time several ways in turn, round after round, so that whatever else the machine does befalls all of them.

    Each round begins with another way, so that none always follows the same one.

    Args:
        warmups: rounds before those that are timed.
        device: waited for before and after each way.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, Any] = {}
    names = list(ways)
    gc.collect()
    gc.freeze()  # what is there already need not be looked through before each way
    try:
        for round_ in range(-warmups, repetitions):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                tell(f"{'warm-up' if round_ < 0 else f'round {round_ + 1} of {repetitions}'}: {name}")
                took, outputs[name] = _timed(ways[name], device)
                if round_ >= 0:
                    seconds[name].append(took)
    finally:
        gc.unfreeze()
    return {name: Runs(tuple(seconds[name]), outputs[name]) for name in names}


def _timed(way: Way, device: torch.device) -> tuple[float, Any]:
    """Seconds that a way takes, and what it returns."""
    gc.collect()
    synchronize(device)
    begun = time.perf_counter()
    output = way()
    synchronize(device)
    took = time.perf_counter() - begun
    return (output.seconds, output.output) if isinstance(output, Timed) else (took, output)


def over(ours: float | None, theirs: float | None) -> float | None:
    """Throughput over throughput; None where one of them was lost in the noise."""
    return None if ours is None or theirs is None else round(ours / theirs, 4)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Sheet:
    """A table for people: headings, and a row of values for each line; None where there is nothing to say."""

    title: str
    headings: Sequence[str]
    rows: list[Sequence[str | float | None]] = field(default_factory=list)


@dataclass
class Result:
    """What a benchmark found.

    Attributes:
        settings: sizes and options.
        measurements: one entry for each thing that was timed, with all repetitions (`seconds`) and their median.
        ratios: throughput over throughput, more is better; None where noise hid one of the two.
        sheets: the same for people.
        checks: what was compared for equality, and how that came out.
    """

    name: str
    settings: dict[str, Any]
    measurements: list[dict[str, Any]] = field(default_factory=list)
    ratios: dict[str, float | None] = field(default_factory=dict)
    sheets: list[Sheet] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)


def as_json(result: Result, *, quick: bool, command: str, device: torch.device, begun: Beginning) -> dict[str, Any]:
    """The JSON of one benchmark."""
    return {
        "benchmark": result.name,
        "quick": quick,
        **begun.circumstances(command, device),
        "settings": result.settings,
        "ratios": result.ratios,
        "checks": result.checks,
        "measurements": result.measurements,
    }


@dataclass(frozen=True)
class Beginning:
    """The moment when a benchmark began."""

    date: str
    clock: float
    load: float

    @classmethod
    def now(cls) -> Beginning:
        return cls(datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter(), os.getloadavg()[0])

    def circumstances(self, command: str, device: torch.device) -> dict[str, Any]:
        """When, where and with what it ran; `load` is the number of busy processes before and after."""
        return {
            "command": command,
            "date": self.date,
            "seconds": round(time.perf_counter() - self.clock, 1),
            "machine": {**machine(device), "load": [round(load, 2) for load in (self.load, os.getloadavg()[0])]},
            "versions": {
                "mirage_vlm": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def machine(device: torch.device) -> dict[str, Any]:
    """What the benchmark runs on."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": device.type,
        "gpu": None,
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"gpu": card.name, "gpu_memory_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    """The processor's name, with family and model where the name alone says little."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in first.splitlines())
    entries = {key.strip(): value.strip() for key, _, value in pairs}
    name = entries.get("model name") or platform.processor() or platform.machine()
    family = [f"{key} {entries[key]}" for key in ("cpu family", "model") if key in entries]
    return f"{name} ({', '.join(family)})" if family else name

"""Accuracy of a checkpoint on a set of examples, with what its latent spans did."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from mirage_vlm import __version__
from mirage_vlm.decoding import EngineConfig, GenerationConfig, generate
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.compare import items
from mirage_vlm.evaluation.intervals import wilson
from mirage_vlm.formats import atomic_writer
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.base import Score, boxed
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling import LatentVLM


@dataclass(frozen=True)
class Scored:
    """One decoded example and what the checker says of it."""

    trajectory: Trajectory
    score: Score

    @property
    def latents(self) -> int:
        """Latent tokens that were consumed."""
        return sum(span.k or 0 for span in self.trajectory.spans)

    @property
    def tokens(self) -> int:
        """Text tokens of the response, the marks of spans included."""
        assert self.trajectory.decoding is not None
        return len(self.trajectory.decoding.token_ids) - self.latents


def evaluate(
    vlm: LatentVLM,
    examples: Sequence[Trajectory],
    generation: GenerationConfig,
    engine: EngineConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Decode every example and score it.

    Args:
        progress: called with the number of examples that were just finished.

    Raises:
        MirageError: there are no examples, or one cannot be decoded or scored.
    """
    if not examples:
        raise MirageError("there is nothing to evaluate")
    decoded = generate(vlm, examples, generation, engine, progress)
    return [Scored(trajectory, score(trajectory)) for trajectory in decoded]


def score(trajectory: Trajectory) -> Score:
    r"""The task's checker, or without a task the answer compared with `\boxed{}` (else the whole text).

    Raises:
        MirageError: the task is unknown, or there is neither task nor answer.
    """
    if trajectory.task is not None:
        return get_task(trajectory.task).score(trajectory)
    if trajectory.answer is None:
        raise MirageError("an example has neither a task nor an answer, so it cannot be scored")
    found = boxed(trajectory.text)
    given = trajectory.text.strip() if found is None else found.strip()
    correct = given == trajectory.answer.strip()
    return Score(correct, bool(given), None, f"{given!r} {'is' if correct else 'is not'} {trajectory.answer!r}")


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """The measures of a set of scored examples, and the same for each level (`meta["level"]`)."""
    levels = sorted({s.trajectory.meta["level"] for s in scored if "level" in s.trajectory.meta})
    by_level = {
        str(level): _measures([s for s in scored if s.trajectory.meta.get("level") == level]) for level in levels
    }
    return {**_measures(scored), "by_level": by_level}


def _measures(scored: Sequence[Scored]) -> dict[str, Any]:
    n = len(scored)

    def share(hits: Sequence[bool]) -> float:
        return sum(hits) / n

    accuracy = share([s.score.correct for s in scored])
    judged = [s.score.optimal for s in scored if s.score.optimal is not None]
    return {
        "n": n,
        "accuracy": accuracy,
        "ci95": list(wilson(sum(s.score.correct for s in scored), n)),
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
        "optimal_rate": sum(judged) / len(judged) if judged else None,
        "latent_rate": share([s.latents > 0 for s in scored]),
        "invalid_rate": share([not s.score.valid for s in scored]),
        "cut_rate": share(
            [s.trajectory.decoding is not None and s.trajectory.decoding.finish_reason == "length" for s in scored]
        ),
        "latents_per_response": sum(s.latents for s in scored) / n,
        "tokens_per_response": sum(s.tokens for s in scored) / n,
    }


def report(
    scored: Sequence[Scored], *, model: str, data: dict[str, Any], generation: GenerationConfig, started: float
) -> dict[str, Any]:
    """`results.json`: the measures, and everything needed to get them again.

    Args:
        started: `time.perf_counter()` when the evaluation began.
    """
    settings = asdict(generation)
    settings.pop("latent_hook")
    return {
        "model": model,
        "data": data,
        **summarise(scored),
        "seconds": round(time.perf_counter() - started, 2),
        "generation": settings,
        "versions": {
            "mirage_vlm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": _device_name()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "items": items(scored),
    }


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        MirageError: the folder cannot be written to.
    """
    with atomic_writer(Path(path)) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

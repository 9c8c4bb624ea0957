"""Accuracy of a checkpoint on a set of examples, with what its latent spans did."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mirage_vlm.decoding import EngineConfig, GenerationConfig, generate
from mirage_vlm.decoding.generate import responses
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.compare import level_order
from mirage_vlm.evaluation.intervals import wilson
from mirage_vlm.evaluation.kept import Kept
from mirage_vlm.formats import atomic_writer
from mirage_vlm.tasks import Score, score
from mirage_vlm.trajectory import Decoding, Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling import LatentVLM


@dataclass(frozen=True)
class Scored:
    """One decoded example and what the checker says of it.

    Attributes:
        error: why it could not be decoded or scored; it then counts as wrong and invalid.
    """

    trajectory: Trajectory
    score: Score
    error: str | None = None

    def failed(self, reason: str) -> Scored:
        """The same as an error."""
        return Scored(self.trajectory, Score(False, False, None, reason), reason)

    @property
    def latents(self) -> int:
        """Latent tokens that were consumed."""
        return sum(span.k or 0 for span in self.trajectory.spans)

    @property
    def tokens(self) -> int:
        """Text tokens of the response, the marks of spans included."""
        return len(self.decoding.token_ids) - self.latents

    @property
    def decoding(self) -> Decoding:
        """What the decoder says of the response."""
        assert self.trajectory.decoding is not None
        return self.trajectory.decoding


def evaluate(
    vlm: LatentVLM,
    examples: Sequence[Trajectory],
    generation: GenerationConfig,
    engine: EngineConfig | None = None,
    progress: Callable[[int], None] | None = None,
    kept: Kept | None = None,
    name: str = "self",
    strict: bool = True,
) -> list[Scored]:
    """Decode every example and score it.

    Args:
        progress: called with the number of examples that were just finished, or found finished in `kept`.
        kept: responses that are there already, which are not decoded again; new ones are put there as they finish.
        name: of these responses among those of `kept`.
        strict: the first example that cannot be decoded or scored ends it. Otherwise that one is an error, with its
            reason, and the others go on and come out as they do without it.

    Raises:
        MirageError: there are no examples, one of them (not strict: every one) cannot be decoded or scored, or several
            responses to each are wanted with `kept` or without `strict`.
    """
    if not examples:
        raise MirageError("there is nothing to evaluate")
    if kept is None and strict:
        return [
            _scored(one, row_of(one, i), True)
            for i, one in enumerate(generate(vlm, examples, generation, engine, progress))
        ]
    kept = kept or Kept()
    _decode_missing(vlm, examples, generation, engine, progress, kept, name, strict)
    found = []
    for i, example in enumerate(examples):
        response, reason = kept.response(name, i, example), kept.error(name, i)
        if reason is None:
            found.append(_scored(response, row_of(example, i), strict))
        elif strict:
            raise MirageError(f"{row_of(example, i)}: {reason}")
        else:
            found.append(_unanswered(response).failed(reason))
    if all(each.error is not None for each in found):
        kept.discard()
        raise MirageError(f"none of {len(found)} could be evaluated; {row_of(examples[0], 0)}: {found[0].error}")
    return found


def row_of(example: Trajectory, i: int) -> str:
    """What people call an example of an evaluation: its place in its file, else its number from 1."""
    return example.where or f"example {i + 1}"


def _scored(trajectory: Trajectory, row: str, strict: bool) -> Scored:
    try:
        return Scored(trajectory, score(trajectory))
    except MirageError as fault:
        if strict:
            raise MirageError(f"{row}: {fault}") from fault
        return _unanswered(trajectory).failed(str(fault))


def _unanswered(trajectory: Trajectory) -> Scored:
    return Scored(trajectory, Score(False, False, None, "no answer"))


def _decode_missing(
    vlm: LatentVLM,
    examples: Sequence[Trajectory],
    generation: GenerationConfig,
    engine: EngineConfig | None,
    progress: Callable[[int], None] | None,
    kept: Kept,
    name: str,
    strict: bool,
) -> None:
    """Decode what `kept` lacks, as `generate` would decode it in a call with all examples."""
    if generation.n != 1:
        raise MirageError(f"only one response to each example can be kept, not n = {generation.n}")
    seeds = (
        generation.seeds if generation.seeds is not None else range(generation.seed, generation.seed + len(examples))
    )
    if len(seeds) != len(examples):
        raise MirageError(f"got {len(seeds)} seeds for {len(examples)} responses")
    missing = [i for i in range(len(examples)) if (name, i) not in kept]
    if progress is not None and len(missing) < len(examples):
        progress(len(examples) - len(missing))
    if not missing:
        return
    hook = generation.latent_hook

    def numbered(latents: torch.Tensor, places: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        """The caller's hook, with the examples' numbers for those of the engine's responses."""
        assert hook is not None
        return hook(latents, [missing[place] for place in places], steps)

    def refused(place: int, fault: MirageError) -> None:
        i = missing[place]
        if strict:
            raise MirageError(f"{row_of(examples[i], i)}: {fault}") from fault
        kept.fail(name, i, str(fault))
        if progress is not None:
            progress(1)

    own = replace(generation, seeds=[seeds[i] for i in missing], latent_hook=None if hook is None else numbered)
    before = time.perf_counter()
    for finished in responses(vlm, [examples[i] for i in missing], own, engine, refused):
        now = time.perf_counter()
        for place, trajectory in finished.items():
            kept.add(name, missing[place], trajectory, (now - before) / len(finished))
        before = now
        if progress is not None:
            progress(len(finished))


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """The measures of a set of scored examples, and the same for each level (`meta["level"]`) and each task.

    Returns:
        What `measures` gives, `by_level` and, where there is more than one task, `by_task`.
    """
    found = {**measures(scored), "by_level": _by_level(scored)}
    tasks = sorted({s.trajectory.task or "none" for s in scored})
    if len(tasks) > 1:
        parts = {task: [s for s in scored if (s.trajectory.task or "none") == task] for task in tasks}
        found["by_task"] = {task: {**measures(part), "by_level": _by_level(part)} for task, part in parts.items()}
    return found


def _by_level(scored: Sequence[Scored]) -> dict[str, Any]:
    levels = {s.trajectory.meta["level"] for s in scored if "level" in s.trajectory.meta}
    return {
        str(level): measures([s for s in scored if s.trajectory.meta.get("level") == level])
        for level in sorted(levels, key=level_order)
    }


def measures(scored: Sequence[Scored]) -> dict[str, Any]:
    """What is measured of a set of scored examples that is not empty.

    Returns:
        `n`; `accuracy` with its Wilson interval `ci95` and `standard_error`; the shares `optimal_rate` (of the plans
        whose length is judged; None where none is), `latent_rate` (consumed a latent), `invalid_rate` (no answer could
        be read) and `cut_rate` (a limit was reached), each with its Wilson interval as `optimal_ci95` and so on;
        `latents_per_response` and `tokens_per_response`, the text tokens; and `errors`, how many could not be decoded
        or scored, which are wrong and invalid.
    """
    n = len(scored)
    right = [s.score.correct for s in scored]
    accuracy = sum(right) / n
    shares = {
        "optimal": [s.score.optimal for s in scored if s.score.optimal is not None],
        "latent": [s.latents > 0 for s in scored],
        "invalid": [not s.score.valid for s in scored],
        "cut": [s.decoding.finish_reason == "length" for s in scored],
    }
    found: dict[str, Any] = {
        "n": n,
        "accuracy": accuracy,
        "ci95": list(wilson(sum(right), n)),
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
    }
    for name, hits in shares.items():
        found[f"{name}_rate"] = sum(hits) / len(hits) if hits else None
        found[f"{name}_ci95"] = list(wilson(sum(hits), len(hits))) if hits else None
    found["latents_per_response"] = sum(s.latents for s in scored) / n
    found["tokens_per_response"] = sum(s.tokens for s in scored) / n
    found["errors"] = sum(s.error is not None for s in scored)
    return found


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        MirageError: the folder cannot be written to.
    """
    with atomic_writer(Path(path)) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")

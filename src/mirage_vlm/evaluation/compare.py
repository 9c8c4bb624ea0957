"""Two evaluations on the same examples: which checkpoint is better, and by how much for certain."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.intervals import paired_bootstrap, sign_test
from mirage_vlm.trajectory import Text, Trajectory

if TYPE_CHECKING:
    from mirage_vlm.evaluation.evaluate import Scored


def items(scored: Iterable[Scored]) -> list[dict[str, Any]]:
    """What `results.json` keeps of each example: its name, its level where it has one, and how it came out (`error`
    says why it could not be decoded or scored).

    Repeated examples are numbered.
    """
    seen: Counter[str] = Counter()
    found = []
    for each in scored:
        name = name_of(each.trajectory)
        seen[name] += 1
        item = {"name": f"{name}-{seen[name]}", "correct": each.score.correct, "valid": each.score.valid}
        if "level" in each.trajectory.meta:
            item["level"] = each.trajectory.meta["level"]
        if each.error is not None:
            item["error"] = each.error
        found.append(item)
    return found


def name_of(trajectory: Trajectory) -> str:
    """A name made of the question and what is known of it, not of the style of its prompt.

    So the same map has the same name in evaluations of a direct and of a step-by-step model. The words of the question
    count only where nothing else is known that tells it from others: no map, no id, and not made by a task of ours.
    """
    meta = {key: value for key, value in trajectory.meta.items() if key != "style"}
    known: dict[str, Any] = {"task": trajectory.task, "answer": trajectory.answer, "meta": meta}
    if not {"map", "id", "style"} & trajectory.meta.keys():
        known["prompt"] = prompt_texts(trajectory)
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def level_order(level: Any) -> tuple[bool, Any]:
    """A key to sort levels by: numbers first, then names."""
    return isinstance(level, str), level


def prompt_texts(trajectory: Trajectory) -> list[str]:
    """The pieces of text of a prompt."""
    return [s.text for message in trajectory.prompt for s in message.segments if isinstance(s, Text)]


def load_results(path: str | Path, replacement: str | None = None) -> dict[str, Any]:
    """A `results.json` of `mirage eval`.

    Args:
        replacement: take the outcomes with this replacement instead of the model's own latents.

    Raises:
        MirageError: it cannot be read, or holds no items, or not that replacement; the message names the file and the
            field.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as fault:
        raise MirageError(f"{path}: cannot be read: {fault.strerror or fault}") from fault
    except ValueError as fault:
        raise MirageError(f"{path}: not valid JSON: {fault}") from fault
    if not isinstance(found, dict) or not isinstance(found.get("items"), list) or not found["items"]:
        raise MirageError(f"{path}: items: missing; only results of `mirage eval --out` can be compared")
    for i, item in enumerate(found["items"]):
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise MirageError(f"{path}: items[{i}].name: must be a string")
        if not isinstance(item.get("correct"), bool):
            raise MirageError(f"{path}: items[{i}].correct: must be true or false")
    if replacement not in (None, "self"):
        right = _outcomes(found, str(replacement), str(path))
        found["items"] = [{**item, "correct": digit == "1"} for item, digit in zip(found["items"], right, strict=True)]
    return found


def _outcomes(results: Mapping[str, Any], replacement: str, path: str) -> str:
    """A 1 or 0 for each item."""
    there = results.get("replacements")
    if not isinstance(there, dict) or replacement not in there:
        names = ", ".join(there) if isinstance(there, dict) else "none"
        raise MirageError(f"{path}: replacements.{replacement}: missing; it has {names} (see `mirage eval --replace`)")
    right = there[replacement].get("correct") if isinstance(there[replacement], dict) else None
    n = len(results["items"])
    if not isinstance(right, str) or len(right) != n or set(right) - set("01"):
        raise MirageError(f"{path}: replacements.{replacement}.correct: must be a string of {n} digits 0 or 1")
    return right


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], *, rounds: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """The difference in accuracy, second − first, on the examples that both evaluations hold.

    Args:
        first, second: as `load_results` gives them.
        rounds, seed: of the paired bootstrap.

    Returns:
        `all` and one entry for each level: `n`, the two accuracies, `difference` and `ci95` of it, and `p` that they
        are equally good (two-sided, of `sign_test`); under `apart` the examples that only one of the two holds, and
        under `errors` how many of the common ones count as wrong since they could not be decoded or scored.

    Raises:
        MirageError: they have no example in common.
    """
    ours, theirs = ({item["name"]: item for item in results["items"]} for results in (first, second))
    common = [name for name in ours if name in theirs]
    if not common:
        raise MirageError(
            "the two evaluations have no example in common; run both on the same data, levels and seed, and "
            "examples made with --task in the same --style: each style draws its own"
        )

    def measured(names: Sequence[str]) -> dict[str, Any]:
        a, b = ([side[name]["correct"] for name in names] for side in (ours, theirs))
        difference, low, high = paired_bootstrap(b, a, seed=seed, rounds=rounds)
        n = len(names)
        return {
            "n": n,
            "accuracy": [sum(a) / n, sum(b) / n],
            "difference": difference,
            "ci95": [low, high],
            "p": min(1.0, 2 * min(sign_test(a, b), sign_test(b, a))),
        }

    levels = sorted({ours[name]["level"] for name in common if "level" in ours[name]}, key=level_order)
    return {
        "models": [first.get("model"), second.get("model")],
        "all": measured(common),
        "by_level": {str(level): measured([n for n in common if ours[n].get("level") == level]) for level in levels},
        "errors": [sum("error" in side[name] for name in common) for side in (ours, theirs)],
        "apart": [len(ours) - len(common), len(theirs) - len(common)],
    }

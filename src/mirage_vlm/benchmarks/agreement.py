"""Whether two ways of decoding say the same: times of different work must not be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mirage_vlm.benchmarks.harness import Disagreement
from mirage_vlm.decoding import Engine, Finished
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.trajectory import Decoding, Trajectory

# log-probabilities so near to one another may swap places where sums are taken in another order
TIES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def agree(
    vlm: LatentVLM,
    what: str,
    prompts: Sequence[Trajectory],
    found: Sequence[list[int]],
    expected: Sequence[list[int]],
    tie: float | None = None,
) -> dict[str, Any]:
    """Compare greedy responses token for token.

    Two ways that sum in another order may part where two tokens are equally likely but for rounding. Whether that is
    so at the first difference of a row is found by replaying both prefixes.

    Args:
        what: names the two ways.
        tie: how near two log-probabilities must be to be equally likely; None takes that of the model's dtype.

    Returns:
        How many rows were compared, and how many of them parted at a tie.

    Raises:
        Disagreement: a row differs otherwise.
    """
    tie = TIES[vlm.model.dtype] if tie is None else tie
    ties = 0
    for i, (prompt, one, other) in enumerate(zip(prompts, found, expected, strict=True)):
        if one == other:
            continue
        at = next((t for t, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            raise Disagreement(f"{what}: row {i} has {len(one)} tokens one way and {len(other)} the other")
        chances = [_chance(vlm, prompt, tokens[: at + 1]) for tokens in (one, other)]
        if None in chances or abs(chances[0] - chances[1]) > tie:  # type: ignore[operator]
            raise Disagreement(
                f"{what}: row {i} differs at token {at}: {one[at]} or {other[at]}, of log-probability "
                f"{chances[0]} and {chances[1]}"
            )
        ties += 1
    return {"what": what, "rows": len(prompts), "parted_at_ties": ties}


def _chance(vlm: LatentVLM, prompt: Trajectory, tokens: list[int]) -> float | None:
    """Log-probability of the last of these tokens; None where it was no choice."""
    engine = Engine(vlm)
    engine.submit(prompt, logprobs=True, replay=prompt.with_response((), Decoding(tuple(tokens), "length")))
    (end,) = [event for event in engine.run() if isinstance(event, Finished)]
    assert end.trajectory.decoding is not None and end.trajectory.decoding.logprobs is not None
    return end.trajectory.decoding.logprobs[-1]

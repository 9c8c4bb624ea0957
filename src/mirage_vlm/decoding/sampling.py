"""Choosing a token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """Temperature (0 is greedy), nucleus mass and number of candidates (0 = all)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def choose(logits: torch.Tensor, banned: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    """One token.

    Args:
        logits: [V], float32, on the CPU.
        banned: tokens that cannot be chosen.
        generator: of this row; untouched when greedy.
    """
    logits = logits.clone()
    logits[list(banned)] = -torch.inf
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = allowed(logits / sampling.temperature, sampling).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def allowed(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[V] logits with everything outside of top-k and then top-p at −∞.

    The nucleus is the smallest set of most likely tokens whose mass reaches `top_p`.
    """
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(dim=-1).cumsum(dim=-1)
        outside = (mass - ordered.softmax(dim=-1)) >= sampling.top_p
        logits = logits.scatter(0, order[outside], -torch.inf)
    return logits

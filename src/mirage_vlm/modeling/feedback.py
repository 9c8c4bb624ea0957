"""Feedback: from the last hidden state to the next input embedding, inside a latent span.

A feedback is a module of its own, named in the checkpoint and saved with it. To add one, write the class and
name it in `FEEDBACKS`; stage 2, decoding and everything built on them call it through `LatentVLM.recast`.
"""

from __future__ import annotations

import torch
from torch import nn

from mirage_vlm.errors import MirageError


class Identity(nn.Module):
    """The hidden state itself, as in Mirage (arXiv 2506.17218) and Coconut (arXiv 2412.06769)."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Linear(nn.Module):
    """A learnt linear map that starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, width)
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.proj(hidden)


FEEDBACKS: dict[str, type[nn.Module]] = {"identity": Identity, "linear": Linear}


def build_feedback(name: str, width: int) -> nn.Module:
    """The feedback module of that name for hidden states of that width.

    Raises:
        MirageError: there is none of that name.
    """
    if name not in FEEDBACKS:
        raise MirageError(f"unknown feedback {name!r}; choose one of {', '.join(FEEDBACKS)}")
    return FEEDBACKS[name](width)

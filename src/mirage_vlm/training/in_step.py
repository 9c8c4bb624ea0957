"""Processes that hold shares of the weights (FSDP) have to stay in step.

There a pass through a decoder layer is an exchange between all processes: its weights are gathered before it, its
gradients are sent round after it. All processes must run the same number of passes and give gradients to the same
parameters, or they wait for one another for ever. But rows differ: in stage 2 a batch takes as many passes as its
spans have latents, and a batch may have no picture, or no span, at all. So the processes tell each other what their
batches need, and each makes up for what its own lacks by work that adds nothing to the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mirage_vlm.modeling.decoder import run_decoder
from mirage_vlm.modeling.segment_cache import checkpoint_with_cache
from mirage_vlm.training.own import passes

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM
    from mirage_vlm.training.recipe import Recipe


@dataclass(frozen=True)
class Needs:
    """What a batch takes: passes through the decoder (at most); whether the vision tower and the feedback are used."""

    passes: int
    vision: int
    feedback: int


def needs_of(batch: Mapping[str, torch.Tensor], recipe: Recipe, pad_id: int) -> Needs:
    """What a collated batch takes in a recipe's stage."""
    ids = batch["input_ids"]
    rolled = recipe.stage == "stage2"
    count = passes(ids, pad_id, recipe.train.latent_iterations) if rolled else 1
    seen = "pixel_values" in batch or (recipe.loss.through_targets and "helper_pixel_values" in batch)
    return Needs(count, int(seen), int(recipe.stage != "sft" and bool((ids == pad_id).any())))


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Within, the first item of the list is the number of calls of the module so far."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    handle = module.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def make_up(vlm: LatentVLM, taken: int, own: Needs, all_need: Needs) -> torch.Tensor:
    """Zero, with a graph that runs what other processes run and this one has not.

    Args:
        taken: passes through the decoder that were run.
        own, all_need: what this process's batch takes, and the largest of all processes.
    """
    if taken > all_need.passes:  # the others can't know of it; better an error than a deadlock
        raise RuntimeError(f"a batch took {taken} passes through the decoder, {all_need.passes} were agreed on")
    zero = torch.zeros((), device=vlm.device)
    if all_need.vision > own.vision:
        zero = zero + _touch(vlm.vision_tower)
    if all_need.feedback > own.feedback:
        zero = zero + _touch(vlm.feedback) + _touch(vlm.pooling)
    token = torch.full((1, 1), vlm.tokenizer.eos_token_id, device=vlm.device)
    with checkpoint_with_cache(vlm.language_model):
        for _ in range(all_need.passes - taken):
            positions, seen = torch.zeros_like(token).expand(3, -1, -1), torch.ones_like(token)
            hidden = run_decoder(vlm.language_model, vlm.embed(token), positions, seen).last_hidden_state
            zero = zero + 0.0 * hidden.float().sum()
    return zero


def _touch(module: nn.Module) -> torch.Tensor:
    """Zero, with a gradient of zeros for every trained parameter of a module."""
    return torch.stack(
        [0.0 * p.float().sum() for p in module.parameters() if p.requires_grad] or [torch.zeros(())]
    ).sum()

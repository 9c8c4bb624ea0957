"""The call of the language model, and of its checkpointing, in the words of the transformers that is installed.

transformers 5.24 renamed `past_key_values` to `cache` and gradient checkpointing to activation checkpointing. This is
the one place that knows.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import Cache

KINDS = {"use_reentrant": False}  # of checkpointing: keys and values leave a layer beside its output


def run_decoder(
    language_model: Any,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: Any = None,
    past: Cache | None = None,
    **more: Any,
) -> Any:
    """One pass of the decoder; the model makes no cache of its own.

    Args:
        language_model: the decoder of a VLM of transformers.
        inputs_embeds: [B, L, D].
        position_ids: [A, B, L], with as many axes as the family has.
        attention_mask: what the language model takes: [B, T], [B, 1, L, T], or one for each kind of layer.
        past: keys and values of the positions before these, to which this pass adds its own.
        more: what else the language model is told.

    Returns:
        Its output; `last_hidden_state` is [B, L, D].
    """
    if past is not None:
        more[cache_keyword(type(language_model))] = past  # type: ignore[arg-type]
    return language_model(
        inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **more
    )


@cache
def cache_keyword(kind: type) -> str:
    """What a class of language models calls its cache: `cache` from transformers 5.24 on, before `past_key_values`."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"  # type: ignore[attr-defined]


def checkpoint_activations(model: Any, on: bool = True) -> None:
    """Let the layers of a transformers model keep nothing for the backward pass but their inputs, or everything again.

    Args:
        model: a `PreTrainedModel`.
    """
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if on:
        getattr(model, f"{name}_enable")(KINDS)
    else:
        getattr(model, f"{name}_disable")()

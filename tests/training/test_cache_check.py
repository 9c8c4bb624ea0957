"""A cached pass that forgets its prefix is found out before anything is trained."""

from __future__ import annotations

import pytest
import torch

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.decoder import cache_keyword, checkpoint_activations
from mirage_vlm.training import cache_check
from mirage_vlm.training.cache_check import check_cache


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sound_model_passes_and_is_left_as_it_was(fresh, checkpointed, dtype):
    fresh.to(dtype).eval()
    if checkpointed:
        checkpoint_activations(fresh.model)
    state = torch.random.get_rng_state()
    check_cache(fresh)
    assert not fresh.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in fresh.parameters())
    flags = {getattr(layer, "gradient_checkpointing", False) for layer in fresh.language_model.layers}
    assert flags == {checkpointed}


def without_cache(layer):
    """A layer's forward that takes no notice of its cache, as a checkpointed one of some releases."""
    forward = layer.forward

    def deaf(*args, **told):
        return forward(*args, **{name: None if name in ("cache", "past_key_values") else v for name, v in told.items()})

    return deaf


@pytest.mark.parametrize("which", [[0, 1], [0], [1]], ids=["all", "first", "last"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_that_forget_are_found_out(fresh, which, checkpointed):
    if checkpointed:
        checkpoint_activations(fresh.model)
    for i in which:
        layer = fresh.language_model.layers[i]
        layer.forward = without_cache(layer)
    with pytest.raises(MirageError, match="does not see what was read before it") as told:
        check_cache(fresh)
    assert ("gradient checkpointing (" in str(told.value)) == checkpointed


def test_a_cache_that_is_forgotten_in_the_backward_pass_alone_is_found_out(fresh, monkeypatch):
    """transformers 5.24 checkpoints `forward` itself, and takes the cache away when it is run again."""
    checkpoint_activations(fresh.model)
    plainly = cache_check.checkpoint_with_cache.__wrapped__.__globals__["_plainly"]
    runs = []

    def forgetful(layer, forward, *args, **told):
        runs.append(layer)
        if len(runs) > len(fresh.language_model.layers) * 2:
            told = {name: None if name in ("cache", "past_key_values") else v for name, v in told.items()}
        return plainly(layer, forward, *args, **told)

    monkeypatch.setitem(cache_check.checkpoint_with_cache.__wrapped__.__globals__, "_plainly", forgetful)
    with pytest.raises(MirageError, match="does not see what was read before it"):
        check_cache(fresh)


def test_the_cache_is_called_as_the_model_calls_it(tiny):
    assert cache_keyword(type(tiny.language_model)) in ("cache", "past_key_values")

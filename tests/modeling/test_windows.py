"""Windows side by side against transformers' own way from window to window."""

from contextlib import nullcontext

import pytest
import torch
from support import distance, picture

from mirage_vlm.modeling import family
from mirage_vlm.modeling.decoder import checkpoint_activations
from mirage_vlm.modeling.encoding import Pictures
from mirage_vlm.modeling.windows import PLAIN, WINDOWS, side_by_side
from mirage_vlm.trajectory import Trajectory, user_turn


def features(vlm, pictures):
    joined = Pictures.join([vlm.encoder.prompt(Trajectory((user_turn(one, "Go"),)).prompt)[1] for one in pictures])
    return torch.cat(vlm.image_features(joined.pixel_values, joined.grid_thw))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", [[(2, 2), (2, 2)], [(5, 3), (1, 1), (4, 6), (2, 2)]])
def test_features_and_gradients_are_those_of_transformers(fresh, monkeypatch, attention, sizes):
    fresh.vision_tower.config.window_size = 56  # 2 x 2 merged patches, so that there are whole and cut windows
    fresh.vision_tower.config.fullatt_block_indexes = []
    fresh.vision_tower.window_size, fresh.vision_tower.fullatt_block_indexes = 56, []
    fresh.model.set_attn_implementation(attention)
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    found = []
    for way in (side_by_side, lambda config: nullcontext()):
        monkeypatch.setattr(family, "side_by_side", way)
        fresh.zero_grad()
        made = features(fresh, pictures)
        made.square().sum().backward()
        found.append((made.detach(), [p.grad.clone() for p in fresh.vision_tower.parameters() if p.grad is not None]))
    (ours, grads), (theirs, expected) = found
    assert distance(ours, theirs) < 1e-5
    assert len(grads) == len(expected) > 0
    assert all(distance(a, b) < 1e-4 for a, b in zip(grads, expected, strict=True))


def test_the_choice_of_the_user_stays(fresh):
    config = fresh.vision_tower.config
    for usual, within in (("eager", PLAIN), ("sdpa", WINDOWS), ("flash_attention_2", "flash_attention_2")):
        config._attn_implementation = usual
        with pytest.raises(RuntimeError), side_by_side(config):
            assert config._attn_implementation == within
            raise RuntimeError
        assert config._attn_implementation == usual


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_checkpointed_tower_finds_again_what_it_found(fresh, attention):
    """Its layers are run anew in backward, when nobody says any more how to attend."""
    fresh.model.set_attn_implementation(attention)
    pictures = [picture(4, 3, 1), picture(2, 2, 2)]
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(fresh.model)
        fresh.train()
        fresh.zero_grad()
        features(fresh, pictures).square().sum().backward()
        found.append([p.grad.clone() for p in fresh.vision_tower.parameters() if p.grad is not None])
    assert found[0] and all(distance(a, b) < 1e-5 for a, b in zip(*found, strict=True))


def test_threads_may_leave_in_any_order(fresh):
    config = fresh.vision_tower.config
    config._attn_implementation = "sdpa"
    first, second = side_by_side(config), side_by_side(config)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert config._attn_implementation == "sdpa"

"""A tiny Qwen2.5-VL that tests share. It is never changed: a test that trains or bends a model takes `fresh`."""

import copy
from collections.abc import Iterator

import pytest
import torch
from support import CORPUS

from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.scratch import SPECIAL_TOKENS, ScratchConfig, build

TINY = ScratchConfig(
    width=32,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp=64,
    vision_width=32,
    vision_layers=1,
    vision_heads=2,
    vision_mlp=32,
    context=512,
)


@pytest.fixture(scope="session")
def tiny() -> Iterator[LatentVLM]:
    """Random weights, large enough for rows to differ: in what they say, when they open a span, when they stop."""
    vlm = build(TINY, CORPUS, 0, "eager", latent_size=3, image_scale=0.4375)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(2.0)
        head = vlm.model.lm_head.weight
        unused = [vlm.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS if token != "<|im_end|>"]
        head[unused] = 0.0  # a trained model writes none of them
        head[[vlm.config.start_id, vlm.tokenizer.eos_token_id]] *= 1.8  # so that rows do open spans, and do stop
    before = copy.deepcopy(vlm.state_dict())
    yield vlm.eval()
    after = vlm.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before), "a test has changed the shared model"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in vlm.parameters())


@pytest.fixture
def fresh(tiny: LatentVLM) -> LatentVLM:
    """A copy of `tiny` to do anything with."""
    return copy.deepcopy(tiny)

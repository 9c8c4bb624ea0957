"""Real sizes, random weights: models of the published shapes, made on the device without any download."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLImageProcessorPil

from mirage_vlm.benchmarks.workload import Endless, endless
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.modeling.scratch import SPECIAL_TOKENS, train_tokenizer
from mirage_vlm.trajectory import Image, LatentSpan, Trajectory, assistant_turn, user_turn

WORDS = "The elf walks over the ice to the gift ."
WORD = " ice"  # one token

_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_ROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}

# as the config.json of Qwen2.5-VL-3B-Instruct and Qwen2.5-VL-7B-Instruct say; `tiny` tries the code
SHAPES: dict[str, dict[str, Any]] = {
    "3b": {
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _ROPE,
            "tie_word_embeddings": True,
        },
        "vision_config": {**_VISION, "out_hidden_size": 2048},
        "tie_word_embeddings": True,
    },
    "7b": {
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _ROPE,
            "tie_word_embeddings": False,
        },
        "vision_config": {**_VISION, "out_hidden_size": 3584},
        "tie_word_embeddings": False,
    },
    "tiny": {
        "text_config": {
            "vocab_size": 1000,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
            "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": True,
        },
        "vision_config": {
            **_VISION,
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        "tie_word_embeddings": True,
    },
}


def shaped(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Endless:
    """A model of one of the shapes, with a small tokenizer whose vocabulary is padded to the real size."""
    tokenizer = train_tokenizer([f"{WORDS} {WORD * 8}"] * 8, 512)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    shape = SHAPES[name]
    ends = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    config = Qwen2_5_VLConfig(
        **{**shape, "text_config": {**shape["text_config"], **ends}},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=14, size={"shortest_edge": 28 * 28, "longest_edge": 16384 * 28 * 28}
    )
    return endless(LatentVLM.with_latents(model, tokenizer, image_processor))


def noise(side: int, seed: int) -> Image:
    """A square picture that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image(PIL.Image.fromarray(pixels))


def prompt(vlm: LatentVLM, tokens: int, side: int, seed: int) -> Trajectory:
    """A prompt of exactly so many tokens, one picture among them."""

    def of(words: int) -> Trajectory:
        return Trajectory((user_turn(noise(side, seed), WORD * words),))

    least = len(vlm.encoder.prompt(of(1).prompt)[0])
    made = of(1 + tokens - least)
    assert len(vlm.encoder.prompt(made.prompt)[0]) == tokens, "a word is not one token, or the picture takes too many"
    return made


def example(vlm: LatentVLM, tokens: int, side: int, seed: int, new_tokens: int, spans: int, k: int) -> Trajectory:
    """A training example: such a prompt, and a response of so many tokens with spans in it."""
    words = new_tokens - 1 - spans * (k + 2)  # the end of turn, and start and end of each span
    before = words // (spans + 1)
    answer: list[str | LatentSpan] = []
    for s in range(spans):
        answer += [WORD * before, LatentSpan(helper=noise(side, 1000 * (s + 1) + seed), k=k)]
    answer.append(WORD * (words - spans * before))
    return Trajectory((*prompt(vlm, tokens, side, seed).messages, assistant_turn(*answer)))

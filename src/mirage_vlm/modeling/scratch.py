"""A small Qwen2.5-VL from nothing: its own tokenizer, the real architecture, random weights.

Used for the bundled model and for tests. Real checkpoints are loaded with `LatentVLM.from_base`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.modeling.shape import ScratchConfig

__all__ = ["SPECIAL_TOKENS", "ScratchConfig", "build", "train_tokenizer"]

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# words with their leading space (numbered cells such as r3c2 stay whole), single signs, white space
WORDS = Regex(r" ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]|\s+")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens and chat form, trained on the given texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(
    shape: ScratchConfig, texts: Iterable[str], seed: int, attn: str | None = None, **latent: object
) -> LatentVLM:
    """A LatentVLM with random weights.

    Args:
        shape: sizes.
        texts: what the tokenizer is trained on.
        seed: of the weights.
        attn: attention implementation of transformers.
        latent: fields of `LatentConfig`, as for `LatentVLM.from_base`.
    """
    tokenizer = train_tokenizer(texts, shape.vocab_size)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    half = shape.width // shape.heads // 2
    time, down = max(1, half // 16), max(1, half // 8)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 3,
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.mlp,
            "max_position_embeddings": shape.context,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "mrope_section": [time, down, half - time - down],
            },
            "initializer_range": shape.width**-0.5,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_width,
            "num_heads": shape.vision_heads,
            "intermediate_size": shape.vision_mlp,
            "out_hidden_size": shape.width,
            "patch_size": shape.patch,
            "initializer_range": shape.vision_width**-0.5,
            "window_size": 8 * shape.patch,
            "fullatt_block_indexes": list(range(shape.vision_layers)),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config._attn_implementation = attn
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    side = 2 * shape.patch
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=shape.patch, size={"shortest_edge": side * side, "longest_edge": 256 * side * side}
    )
    return LatentVLM.with_latents(model, tokenizer, image_processor, **latent)

"""The shape of a small model that starts from nothing; what is built of it is in `mirage_vlm.modeling.scratch`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScratchConfig:
    """Shape of a small Qwen2.5-VL.

    Attributes:
        vocab_size: largest size of the tokenizer.
        width, layers, heads, kv_heads, mlp: the decoder.
        vision_width, vision_layers, vision_heads, vision_mlp: the vision tower, all layers with full attention.
        patch: pixels of a patch side; a merged patch has twice that.
        context: most tokens of an example.
        rope_theta: base of the rotary frequencies. Time gets the highest sixteenth of them, rows the next eighth and
            columns the rest: with Qwen's own shares, heads this narrow could not tell neighbouring columns apart.
    """

    vocab_size: int = 1024
    width: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    mlp: int = 512
    vision_width: int = 128
    vision_layers: int = 3
    vision_heads: int = 4
    vision_mlp: int = 256
    patch: int = 14
    context: int = 2048
    rope_theta: float = 10000.0

"""What the machine could do at most: how fast memory is read, how fast matrices are multiplied."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mirage_vlm.benchmarks.harness import synchronize
from mirage_vlm.modeling.latent_vlm import LatentVLM

# dense bf16 FLOP/s by the makers' data sheets, the longest name that a card's own begins with
DATASHEET = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


class Memory:
    """Reads memory as fast as it can be read, by summing a tensor that no cache holds.

    Args:
        size: of the tensor in bytes; by default 256 MiB on a CPU and 4 GiB elsewhere.
    """

    def __init__(self, device: torch.device, size: int | None = None):
        self.size = size or (2**28 if device.type == "cpu" else 2**32)
        self.values = torch.ones(self.size // 4, dtype=torch.float32, device=device)

    def __call__(self) -> torch.Tensor:
        return self.values.sum()


def matmul(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOP/s of a large product of square matrices."""
    side = side or (1024 if device.type == "cpu" else 8192)
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: left @ right, device)


def _fastest(work: Callable[[], object], device: torch.device, repetitions: int = 9) -> float:
    """Seconds that a piece of work takes, the median of several."""
    seconds = []
    work()
    for _ in range(repetitions):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def datasheet(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the card's maker states, where it is a card that we know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [begin for begin in DATASHEET if name.startswith(begin)]
    return DATASHEET[max(known, key=len)] if known else None


@dataclass(frozen=True)
class Reading:
    """What a decode step has to read at least.

    Attributes:
        weights: bytes of the decoder's weights and the LM head; of the embedding table a step reads a few rows only.
        position: bytes of the keys and values of one position.
    """

    weights: int
    position: int

    @classmethod
    def of(cls, vlm: LatentVLM) -> Reading:
        text = vlm.language_model.config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        held = 2 * text.num_hidden_layers * text.num_key_value_heads * width
        table = {id(parameter) for parameter in vlm.model.get_input_embeddings().parameters()}
        layers = [p for p in vlm.language_model.parameters() if id(p) not in table]
        weights = [*layers, *vlm.model.lm_head.parameters()]
        return cls(sum(p.numel() * p.element_size() for p in weights), held * vlm.model.dtype.itemsize)

    def step(self, positions: float) -> float:
        """Bytes of one step of rows that have so many positions in the cache, all together."""
        return self.weights + self.position * positions


def training_flops(vlm: LatentVLM, lengths: list[int], labelled: int, patches: int) -> float:
    """Floating-point operations that one forward and backward pass needs, nothing computed twice.

    Two for each weight and token in the forward pass, four in the backward pass; attention over what is before a
    token likewise. The vision tower is frozen, so it has a forward pass only; its own attention is left out.

    Args:
        lengths: tokens of each row.
        labelled: tokens for which the LM head runs.
        patches: patches that go through the vision tower.
    """
    text = vlm.language_model.config
    table = vlm.model.get_input_embeddings().weight
    decoder = sum(p.numel() for p in vlm.language_model.parameters()) - table.numel()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    attention = sum(12 * text.num_hidden_layers * width * n * n / 2 for n in lengths)
    head = 6 * vlm.model.lm_head.weight.numel() * labelled
    tower: Any = vlm.vision_tower
    merger = sum(p.numel() for p in tower.merger.parameters())  # runs once for each merged patch
    blocks = sum(p.numel() for p in tower.parameters()) - merger
    vision = 2 * patches * (blocks + merger / vlm.family.merge**2)
    return 6 * decoder * sum(lengths) + attention + head + vision

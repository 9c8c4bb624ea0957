"""How to decode: what is asked of one response, and what the engine may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.config import STOP_RULES

CACHE_DTYPES = ("float32", "float16", "bfloat16")
LatentHook = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode a response.

    Attributes:
        max_new_tokens: most positions of a response, latents included.
        latent_size: k of a span; None takes the checkpoint's. Under the stop rule `learned` it is the most. With 0 a
            span is its start and its end, and nothing is thought between them.
        stop_rule: `fixed` (k latents, then `latent_end`) or `learned` (the model chooses between one more latent
            and `latent_end`); None takes the checkpoint's.
        max_spans: most spans of a response; the model cannot open more.
        max_latents: most latents of a response; a span that could go over it is not opened (`fixed`) or is
            closed there (`learned`).
        temperature: 0 is greedy.
        top_p, top_k: restrict sampling; 1 and 0 switch them off.
        n: responses to each prompt. Its keys and values are computed once and read by all of them.
        seed: of sampling. Response j to prompt i of a call is drawn with seed + i · n + j, whatever rows are
            decoded beside it.
        seeds: a seed for each response of the call, instead of `seed`.
        evict_images: when a span closes, the prompt's pictures leave the cache: `latent_end` and everything after it
            attend to text and latents only. Positions of what stays do not change. None: as the checkpoint was trained.
        logprobs: keep the log-probability of every token that was chosen.
        return_latents: keep the latent vectors on the returned spans, in float32 unless `latent_dtype` says otherwise.
        latent_dtype: `float32`, or `model` for the model's own.
        latent_noise: the model's own latents are drawn from a Gaussian around what it would feed back, with so much
            standard deviation in each component; 0 feeds that itself back. Drawn by the response's seed too.
        latent_hook: called at each latent step as hook(latents [m, D], responses [m], steps [m]) with the inputs
            about to be consumed, the index of their responses in the call and their place in the span; returns what
            to consume. The host waits for it at each step.
    """

    max_new_tokens: int = 256
    latent_size: int | None = None
    stop_rule: str | None = None
    max_spans: int | None = None
    max_latents: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int = 0
    seeds: Sequence[int] | None = None
    evict_images: bool | None = None
    logprobs: bool = False
    return_latents: bool = True
    latent_dtype: str = "float32"
    latent_noise: float = 0.0
    latent_hook: LatentHook | None = None

    def __post_init__(self) -> None:
        if self.stop_rule is not None and self.stop_rule not in STOP_RULES:
            raise MirageError(f"unknown stop rule {self.stop_rule!r}; choose one of {', '.join(STOP_RULES)}")
        if self.latent_dtype not in ("float32", "model"):
            raise MirageError(f"latent_dtype must be float32 or model, not {self.latent_dtype!r}")
        for name, least in (("max_new_tokens", 1), ("n", 1), ("latent_size", 0), ("max_spans", 0), ("max_latents", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                wanted = "be positive" if least else "not be negative"
                raise MirageError(f"{name} must {wanted}: {value}")
        if not 0 <= self.latent_noise < float("inf"):
            raise MirageError(f"latent_noise must be a standard deviation, 0 or more: {self.latent_noise}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise MirageError("temperature must be at least 0, top_p in (0, 1], top_k at least 0")


@dataclass(frozen=True)
class EngineConfig:
    """What the engine may use.

    Attributes:
        max_rows: most responses decoded together.
        max_batch_tokens: most positions whose keys and values are held at once, all rows together; None takes
            `memory_fraction` of what is free on the device.
        memory_fraction: share of the device's free memory for keys and values, without `max_batch_tokens`.
        block_size: positions of a cache block, the grain of `max_batch_tokens`.
        cache_dtype: of keys and values in the cache: `float32`, `float16` or `bfloat16`; None takes the model's. Half
            precision under a float32 model halves what a step reads and what a position takes; results are then
            close to those of float32, not equal.
        prefill_tokens: most positions, padding included, of one pass over prompts, and most picture tokens of one pass
            of the vision tower, but for a single picture that is larger.
        image_cache: picture features that are kept for prompts to come, one for each picture token.
        look_every: decode steps between two looks of the host. A row that is done leaves, and a waiting one joins, at
            a look. None: each step on a CPU, every 8 elsewhere.
        native: attend by a kernel of our own. On a CPU, where a C compiler is found, by a small one in C, compiled on
            first use (a second) and kept in `~/.cache/mirage-vlm`; on CUDA by one in Triton, where heads are as wide as
            a power of two from 16 to 128. Otherwise by torch's operations.
        compile: compile the decode step with `torch.compile`, which on a CPU takes half a minute or so for each of a
            few kinds of step, and pays in long runs. On CUDA one layer is compiled for all, and the step is replayed
            as a CUDA graph: rows, blocks and tables are padded to powers of two, so that there are few shapes, and
            all the memory of the cache is taken at once. It needs `native` there.
    """

    max_rows: int = 64
    max_batch_tokens: int | None = None
    memory_fraction: float = 0.5
    block_size: int = 32
    cache_dtype: str | None = None
    prefill_tokens: int = 16384
    image_cache: int = 16384
    look_every: int | None = None
    native: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("max_rows", "block_size", "prefill_tokens", "max_batch_tokens", "look_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MirageError(f"{name} must be positive: {value}")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise MirageError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {self.cache_dtype!r}")
        if not 0 < self.memory_fraction <= 1:
            raise MirageError(f"memory_fraction must be in (0, 1]: {self.memory_fraction}")
        if self.image_cache < 0:
            raise MirageError(f"image_cache must not be negative: {self.image_cache}")

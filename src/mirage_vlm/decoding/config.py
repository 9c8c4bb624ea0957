"""How to decode: what is asked of one response, and what the engine may use."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

import torch

from mirage_vlm import values
from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import text_fault
from mirage_vlm.modeling.config import LONGEST_MARK, STOP_RULES, LatentConfig
from mirage_vlm.values import INT64

CACHE_DTYPES = ("float32", "float16", "bfloat16")
SPANS = ("free", "forced", "none")
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
        spans: `free` (the model opens a span when it wants to), `forced` (one is opened for it, at the response's
            start or after `span_after`; more are its own choice) or `none` (it cannot open any).
        span_after: with `forced`, the text after which the span is opened: behind the token with which the response's
            text, spans left out, holds it for the first time. A response that never says it gets no forced span.
        max_spans: most spans of a response; the model cannot open more. One that is still to be forced counts already.
        max_latents: most latents of a response; a span that could go over it is not opened (`fixed`) or is
            closed there (`learned`). Latents that a span to be forced needs are kept for it.
        temperature: 0 is greedy.
        top_p, top_k: restrict sampling; 1 and 0 switch them off.
        n: responses to each prompt. Its keys and values are computed once and read by all of them.
        seed: of sampling. Response j to prompt i of a call is drawn with seed + i · n + j, whatever rows are
            decoded beside it.
        seeds: a seed for each response of the call, instead of `seed`.
        evict_images: when a span closes, the prompt's pictures leave the cache: `latent_end` and everything after it
            attend to text and latents only. Positions of what stays do not change. None: as the checkpoint was trained.
        logprobs: keep the log-probability of every token that was chosen; None for those that were forced.
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
    spans: str = "free"
    span_after: str | None = None
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
        for name, least in (("max_new_tokens", 1), ("n", 1), ("latent_size", 0), ("max_spans", 0), ("max_latents", 0)):
            self._keep(name, values.whole, least)
        self._check_sampling()
        for name, check in (("seed", values.whole), ("seeds", values.wholes)):
            try:
                self._keep(name, check, -INT64 - 1)
            except MirageError as fault:
                raise MirageError(f"{fault}; seeds must fit into 64 bits") from fault
        for name in ("evict_images", "logprobs", "return_latents"):
            self._keep(name, values.truth)
        if self.stop_rule is not None and self.stop_rule not in STOP_RULES:
            raise MirageError(f"unknown stop rule {self.stop_rule!r}; choose one of {', '.join(STOP_RULES)}")
        if self.latent_dtype not in ("float32", "model"):
            raise MirageError(f"latent_dtype must be float32 or model, not {self.latent_dtype!r}")
        if self.latent_hook is not None and not callable(self.latent_hook):
            raise MirageError(f"latent_hook must be a function, not {self.latent_hook!r}")
        self._check_spans()

    def _keep(self, name: str, checked: Callable[..., Any], *bounds: Any) -> None:
        """Put what a check makes of a field, a number of Python's own, in its place; None stays where it may be."""
        value = getattr(self, name)
        if value is not None or name not in OPTIONAL:
            object.__setattr__(self, name, checked(name, value, *bounds))

    def _check_sampling(self) -> None:
        try:
            self._keep("latent_noise", values.real, 0)
        except MirageError as fault:
            told = f"latent_noise must be a standard deviation, 0 or more: {self.latent_noise!r}"
            raise MirageError(told) from fault
        for name, check in (
            ("temperature", lambda name, value: values.real(name, value, 0)),
            ("top_p", lambda name, value: values.real(name, value, above=0, most=1)),
            ("top_k", lambda name, value: values.whole(name, value, 0)),
        ):
            try:
                self._keep(name, check)
            except MirageError as fault:
                rules = "temperature must be at least 0, top_p in (0, 1], top_k at least 0"
                raise MirageError(f"{rules}, and all of them finite: {name} is {getattr(self, name)!r}") from fault

    def _check_spans(self) -> None:
        if self.spans not in SPANS:
            raise MirageError(f"spans must be one of {', '.join(SPANS)}, not {self.spans!r}")
        if self.span_after is not None:
            if not isinstance(self.span_after, str):
                raise MirageError(f"span_after must be a text, not {self.span_after!r}")
            if message := text_fault(self.span_after):
                raise MirageError(f"span_after {message}")
            if not 0 < len(self.span_after.encode()) <= LONGEST_MARK:
                raise MirageError(f"span_after must be a text of 1 to {LONGEST_MARK} bytes: {self.span_after!r}")
            if self.spans != "forced":
                raise MirageError(
                    f"span_after={self.span_after!r} says where a forced span opens, but spans is {self.spans!r}: "
                    "set spans to 'forced' as well"
                )
        if self.spans == "forced" and self.max_spans == 0:
            raise MirageError("max_spans is 0, but spans is 'forced': allow at least one span, or set spans to 'none'")

    @property
    def most_spans(self) -> int | None:
        """Most spans of a response; None = no limit."""
        return 0 if self.spans == "none" else self.max_spans

    def check_room(self, latent: LatentConfig) -> None:
        """A span that is to be forced must have room for the latents that a model's spans have.

        Raises:
            MirageError: it has not.
        """
        size = latent.latent_size if self.latent_size is None else self.latent_size
        needed = min(size, 1) if (self.stop_rule or latent.stop_rule) == "learned" else size
        if self.spans == "forced" and self.max_latents is not None and self.max_latents < needed:
            raise MirageError(
                f"max_latents is {self.max_latents}, but spans is 'forced' and a span takes {needed}: raise it to "
                f"{needed} or more, or lower latent_size"
            )

    def response_seeds(self) -> list[int]:
        """A seed for each of the n responses to one prompt.

        Raises:
            MirageError: `seeds` are not so many, or one does not fit into 64 bits.
        """
        seeds = [self.seed + i for i in range(self.n)] if self.seeds is None else list(self.seeds)
        if len(seeds) != self.n:
            raise MirageError(f"got {len(seeds)} seeds for {self.n} responses")
        if not all(-(2**63) <= seed < 2**63 for seed in seeds):
            raise MirageError(f"seeds must fit into 64 bits: {', '.join(map(str, seeds))}")
        return seeds

    def changed(self, changes: Mapping[str, Any]) -> GenerationConfig:
        """This with other values of some fields.

        Raises:
            MirageError: there is no such field, or a value is impossible.
        """
        for name in changes:
            if name not in (known := [f.name for f in fields(self)]):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise MirageError(f"unknown setting of decoding {name!r}; {hint}")
        return replace(self, **changes)


OPTIONAL = {f.name for f in fields(GenerationConfig) if f.default is None}


class GenerationChanges(TypedDict, total=False):
    """Fields of `GenerationConfig` by name, for type checkers to know them where they are keyword arguments."""

    max_new_tokens: int
    latent_size: int | None
    stop_rule: str | None
    spans: str
    span_after: str | None
    max_spans: int | None
    max_latents: int | None
    temperature: float
    top_p: float
    top_k: int
    n: int
    seed: int
    seeds: Sequence[int] | None
    evict_images: bool | None
    logprobs: bool
    return_latents: bool
    latent_dtype: str
    latent_noise: float
    latent_hook: LatentHook | None


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
            if (value := getattr(self, name)) is not None or name in ("max_rows", "block_size", "prefill_tokens"):
                object.__setattr__(self, name, values.whole(name, value, 1))
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise MirageError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {self.cache_dtype!r}")
        try:
            values.real("memory_fraction", self.memory_fraction, above=0, most=1)
        except MirageError as fault:
            raise MirageError(f"memory_fraction must be in (0, 1]: {self.memory_fraction!r}") from fault
        object.__setattr__(self, "image_cache", values.whole("image_cache", self.image_cache, 0))
        for name in ("native", "compile"):
            object.__setattr__(self, name, values.truth(name, getattr(self, name)))


C = TypeVar("C", GenerationConfig, EngineConfig)


def checked(config: C | None, kind: type[C], name: str) -> C:
    """A configuration that was given, or that of the defaults.

    Raises:
        MirageError: it is something else.
    """
    if config is None:
        return kind()
    if not isinstance(config, kind):
        raise MirageError(f"{name} must be made by {kind.__name__}(…), not {type(config).__name__}")
    return config

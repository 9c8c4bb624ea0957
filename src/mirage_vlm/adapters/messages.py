"""What the adapters read: model arguments, chat messages of harnesses, and their generation settings."""

from __future__ import annotations

import difflib
import os
import types
import typing
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch

from mirage_vlm.decoding import EngineConfig, GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.formats.asked import messages_of
from mirage_vlm.formats.asked import picture as picture
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.bundled import resolve
from mirage_vlm.modeling.config import LIMITS, check_limits
from mirage_vlm.trajectory import LatentSpan, Message, Text, Trajectory

DECODING = {"spans", "span_after", "max_spans", "max_latents", "stop_rule", "evict_images", "latent_size"}
DECODING |= {"latent_noise", "top_k", "top_p"}
LENGTHS = ("max_new_tokens", "max_gen_toks", "max_tokens")  # names that tasks use for one thing
ONE = ("num_beams", "num_return_sequences", "n")
HARNESS_STOP = "\n\n"  # what lmms-eval puts in where a task names no stop string


@dataclass(frozen=True)
class ModelArgs:
    """What a user says of the model on a harness's command line.

    Settings of decoding are defaults: what a task or `--gen_kwargs` says of a request goes before them.

    Attributes:
        pretrained: a folder, a name on the Hugging Face hub, or `bundled`.
        device: `cuda` takes the process's own card where there are several; None takes a card if there is one.
        dtype: of the weights; `auto` keeps the checkpoint's.
        attn: attention implementation of transformers.
        min_pixels, max_pixels: limits of the image processor; None takes the checkpoint's.
        max_rows, max_batch_tokens, cache_dtype, native, compile: as in `EngineConfig`.
        latents: k of a span; None takes the checkpoint's.
        spans, span_after, stop_rule, max_spans, max_latents, evict_images: as in `GenerationConfig`.
        max_new_tokens: most positions of a response, latents included.
        temperature, top_p, top_k: of sampling; 0 is greedy.
        seed: of sampling. What is drawn for a request depends on it and on the request's name alone.
        system: a system prompt, put before every conversation that has none.
        mark: text that stands for each latent span in an answer; by default a span leaves no trace.
        blank_line_stops: take an empty line for the end of an answer where `until` says so. lmms-eval says so for
            every task that names no stop string, which would end a written reasoning after its first paragraph; its
            own Qwen models pass over it too.
        statistics: a JSON file to write what the spans did to.
    """

    pretrained: str
    device: str | None = None
    dtype: str = "auto"
    attn: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_rows: int = 64
    max_batch_tokens: int | None = None
    cache_dtype: str | None = None
    native: bool = True
    compile: bool = False
    latents: int | None = None
    spans: str = "free"
    span_after: str | None = None
    stop_rule: str | None = None
    max_spans: int | None = None
    max_latents: int | None = None
    evict_images: bool | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    system: str | None = None
    mark: str = ""
    blank_line_stops: bool = False
    statistics: str | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ModelArgs:
        """Arguments by name, as text or as values.

        Raises:
            MirageError: one is unknown, missing or of the wrong kind.
        """
        hints = typing.get_type_hints(cls)
        for name in given:
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(hints)}"
                raise MirageError(f"unknown model argument {name!r}; {hint}")
        for item in fields(cls):
            if item.default is MISSING and item.name not in given:
                raise MirageError(f"the model argument {item.name!r} is missing: give {item.name}=PATH")
        args = cls(**{name: _value(f"model argument {name!r}", hints[name], value) for name, value in given.items()})
        check_limits(args.min_pixels, args.max_pixels)
        args.engine(), generation(args, {})  # whose own checks are to come before a model is loaded
        return args

    @classmethod
    def parse(cls, text: str) -> ModelArgs:
        """`pretrained=PATH,device=cpu,max_rows=32`.

        Raises:
            MirageError: it is not of that form, or as `read`.
        """
        given = {}
        for part in filter(None, text.split(",")):
            name, equals, value = part.partition("=")
            if not equals:
                raise MirageError(f"model arguments must be name=value with commas between them; got {part!r}")
            given[name.strip()] = value.strip()
        return cls.read(given)

    def engine(self) -> EngineConfig:
        """What the engine may use."""
        names = ("max_rows", "max_batch_tokens", "cache_dtype", "native", "compile")
        return EngineConfig(**{name: getattr(self, name) for name in names})

    def load(self) -> LatentVLM:
        """The checkpoint, on its device.

        Raises:
            MirageError: it cannot be loaded, or there is no such device.
        """
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError as fault:
            raise MirageError(f"model argument 'device': torch knows no device {name!r}; use cpu or cuda") from fault
        if device.type == "cuda":
            cards = torch.cuda.device_count()
            if (device.index or 0) >= cards:
                raise MirageError(f"model argument 'device': {name!r} is not there; CUDA devices found: {cards}")
            if name == "cuda":  # one card a process
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % cards)
        limits = {name: value for name in LIMITS if (value := getattr(self, name)) is not None}
        return LatentVLM.from_pretrained(
            resolve(self.pretrained), device=device, dtype=self.dtype, attn=self.attn, **limits
        )


def generation(args: ModelArgs, wanted: Mapping[str, Any], *names: object) -> tuple[GenerationConfig, tuple[str, ...]]:
    """How to decode a request, and its stop strings.

    Args:
        wanted: generation settings as harnesses write them: `max_new_tokens`, `do_sample`, `temperature`, `top_p`,
            `top_k`, `seed`, `until`, `num_beams`, and the fields of `GenerationConfig` that latents have; None is not
            set.
        names: of the request, for its own seed.

    Raises:
        MirageError: a value is of the wrong kind, or it asks for beams or for several answers.
    """
    said = {name: value for name, value in wanted.items() if value is not None}
    hints = typing.get_type_hints(GenerationConfig)
    for name in ONE:
        if _value(name, int, said.get(name, 1)) != 1:
            raise MirageError(f"{name} must be 1, not {said[name]}: there is no beam search, and one answer a request")
    chosen: dict[str, Any] = {name: getattr(args, name) for name in DECODING & {item.name for item in fields(args)}}
    chosen |= {"latent_size": args.latents, "temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    for name in LENGTHS:
        if name in said:
            chosen["max_new_tokens"] = _value(name, int, said[name])
            break
    chosen |= {name: _value(name, hints[name], said[name]) for name in DECODING if name in said}
    if "spans" in said and "span_after" not in said and chosen["spans"] != "forced":
        chosen["span_after"] = None  # of a default that the request overrules
    sampled = _value("do_sample", bool, said["do_sample"]) if "do_sample" in said else None
    if sampled is False:
        chosen["temperature"] = 0.0
    elif "temperature" in said:
        chosen["temperature"] = _value("temperature", float, said["temperature"])
    elif sampled and chosen["temperature"] == 0:
        chosen["temperature"] = 1.0
    if chosen["temperature"] == 0:  # greedy, whatever a task writes beside it, top_p=0 for one
        chosen |= {"top_p": args.top_p, "top_k": args.top_k}
    if chosen["top_k"] == -1:  # as vLLM and others write it
        chosen["top_k"] = 0
    seed = sampling_seed(_value("seed", int, said.get("seed", args.seed)), *names)
    until = said.get("until", ())
    stops = (until,) if isinstance(until, str) else tuple(map(str, until))
    kept = tuple(stop for stop in stops if stop and (args.blank_line_stops or stop != HARNESS_STOP))
    return GenerationConfig(**chosen, seed=seed, return_latents=False), kept


def ignored(wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings of a request that `generation` takes no notice of."""
    known = {*DECODING, *LENGTHS, *ONE, "temperature", "do_sample", "until", "seed"}
    return tuple(sorted(name for name, value in wanted.items() if name not in known and value is not None))


def sampling_seed(base: int, *names: object) -> int:
    """A seed for a request, by its name: whatever comes before or beside it, and after a restart, it is the same."""
    return (base + zlib.crc32(repr(names).encode())) % 2**31


def conversation(turns: Sequence[Mapping[str, Any]], system: str | None = None) -> tuple[Message, ...]:
    """Chat messages of a harness as ours.

    Args:
        turns: as for `messages_of`.
        system: a system prompt for a conversation that has none.

    Raises:
        MirageError: a part is neither text nor a picture, or the last turn is not the user's.
    """
    messages = list(messages_of(turns))
    if not messages or messages[-1].role != "user":
        raise MirageError("a conversation must end with the user's turn: an answer cannot be begun for the model")
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", (Text(system),)))
    return tuple(messages)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins; None where there is none."""
    return min((place for place in map(text.find, stops) if place >= 0), default=None)


def shown(trajectory: Trajectory, stops: Sequence[str] = (), mark: str = "") -> tuple[str, bool]:
    """The response's text up to the first stop string, with `mark` for each span before it; and whether it was cut."""
    end = first_stop(trajectory.text, stops)
    parts, place = [], 0
    for segment in trajectory.response:
        if isinstance(segment, LatentSpan):
            parts.append(mark if end is None or place <= end else "")
        elif isinstance(segment, Text):
            parts.append(segment.text if end is None else segment.text[: max(0, end - place)])
            place += len(segment.text)
    return "".join(parts), end is not None


def _value(name: str, kind: Any, value: Any) -> Any:
    """A value of the annotated kind, from one or from text."""
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("", "none", "null")):
            return None
        kind = next(arm for arm in kind.__args__ if arm is not types.NoneType)
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    if kind is bool:
        found = {"true": True, "false": False, "1": True, "0": False}.get(str(value).lower())
        if found is not None:
            return found
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number == number and (kind is float or number.is_integer()):
            return kind(number)
    raise MirageError(f"{name} must be {'true or false' if kind is bool else kind.__name__}, not {value!r}")

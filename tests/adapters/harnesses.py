"""Stand-ins for lmms-eval 0.7 and VLMEvalKit: as much of their interfaces as the adapters meet, and no more.

`make test-harness` holds the first to the real one.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

# -- lmms-eval -------------------------------------------------------------------------------------------------------


class lmms(ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)

    @abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> lmms:
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**parsed(arg_string), **more)


def parsed(text: str) -> dict[str, Any]:
    """Numbers and truth values come as such, all else as text, quotes with it; those and brackets keep a comma."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "{[") - (char in "}]")
        if char == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    pairs = (part.strip().split("=", 1) for part in parts if part.strip())
    return {name: _plain(value) for name, value in pairs}


def _plain(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text) if text.isnumeric() else float(text)
    except ValueError:
        return text


class CacheHook:
    """Lmms-eval's does nothing; this one remembers."""

    def __init__(self, cachinglm: Any = None):
        self.told: list[tuple[str, Any, str]] = []

    def add_partial(self, attr: str, req: Any, res: str) -> None:
        self.told.append((attr, req, res))


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)
    resps: list = field(default_factory=list)
    filtered_resps: dict = field(default_factory=dict)
    raw_filtered_resps: dict = field(default_factory=dict)
    token_counts: list = field(default_factory=list)
    task_name: str | None = None
    doc_id: int | None = None
    repeats: int | None = None
    doc: dict | None = None

    def __post_init__(self) -> None:
        self.task_name, self.doc_id = self.metadata["task"], self.metadata["doc_id"]
        self.repeats = self.metadata["repeats"]

    @property
    def args(self) -> tuple:
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.simple_class_path or self.chat_class_path


def log_metrics(
    total_elapsed_time: float,
    total_gen_tokens: int,
    avg_speed: float,
    additional_metrics: dict[str, Any] | None = None,
) -> tuple:
    """What it was called with; lmms-eval's logs it."""
    return total_elapsed_time, total_gen_tokens, avg_speed, additional_metrics


class Logger:
    def __init__(self):
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Bar:
    """Of tqdm."""

    def __init__(self, total: int, disable: bool, desc: str):
        self.total, self.n = total, 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *fault: object) -> None:
        assert fault != (None, None, None) or self.n == self.total

    def update(self, n: int) -> None:
        self.n += n


# -- VLMEvalKit ------------------------------------------------------------------------------------------------------


class BaseModel:
    INTERLEAVE = False
    allowed_types = ("text", "image", "video")

    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset: str) -> bool:
        return False

    def set_dump_image(self, dump_image_func: Any) -> None:
        self.dump_image_func = dump_image_func

    def generate(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        for part in message:
            assert part["type"] in self.allowed_types
        return self.generate_inner(message, dataset)

    def chat(self, messages: list[dict[str, Any]], dataset: str | None = None) -> str:
        return self.chat_inner(messages, dataset=dataset)


def infer(model: BaseModel, structs: list[Any], dataset: str, nproc: int) -> list[str]:
    """As VLMEvalKit infers: from threads where the model is one behind an API, else one after the other."""
    model.set_dump_image(lambda line: None)
    assert not model.use_custom_prompt(dataset)
    if not getattr(model, "is_api", False):
        return [model.generate(message=struct, dataset=dataset) for struct in structs]
    with ThreadPoolExecutor(max_workers=nproc) as executor:
        futures = [executor.submit(model.generate, message=struct, dataset=dataset) for struct in structs]
        return [future.result() for future in futures]


# -- put in place ----------------------------------------------------------------------------------------------------


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(values)
    monkeypatch.setitem(sys.modules, name, made)
    parent, _, child = name.rpartition(".")
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, made, raising=False)
    return made


def lmms_eval_adapter(monkeypatch: pytest.MonkeyPatch, metrics: list[tuple]) -> ModuleType:
    """`mirage_vlm.adapters.lmms_eval`, imported on top of the stand-in."""
    _module(monkeypatch, "lmms_eval")
    _module(monkeypatch, "lmms_eval.api")
    _module(
        monkeypatch,
        "lmms_eval.api.instance",
        GenerationResult=GenerationResult,
        Instance=Instance,
        TokenCounts=TokenCounts,
    )
    _module(monkeypatch, "lmms_eval.api.model", lmms=lmms)
    _module(monkeypatch, "lmms_eval.models")
    _module(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=ModelManifest)
    _module(monkeypatch, "lmms_eval.models.model_utils")
    _module(
        monkeypatch,
        "lmms_eval.models.model_utils.gen_metrics",
        log_metrics=lambda *given, **named: metrics.append(log_metrics(*given, **named)),
    )
    _module(monkeypatch, "loguru", logger=Logger())
    _module(monkeypatch, "tqdm", tqdm=Bar)
    return _fresh(monkeypatch, "mirage_vlm.adapters.lmms_eval")


def vlmevalkit_adapter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`mirage_vlm.adapters.vlmevalkit`, imported on top of the stand-in."""
    _module(monkeypatch, "vlmeval")
    _module(monkeypatch, "vlmeval.vlm", BaseModel=BaseModel)
    _module(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseModel)
    _module(monkeypatch, "vlmeval.config", supported_VLM={})
    return _fresh(monkeypatch, "mirage_vlm.adapters.vlmevalkit")


def without(monkeypatch: pytest.MonkeyPatch, package: str, adapter: str) -> None:
    """Import an adapter where its harness is not installed."""
    monkeypatch.setitem(sys.modules, package, None)
    _fresh(monkeypatch, adapter)


def _fresh(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        return importlib.import_module(name)
    finally:
        sys.modules.pop(name, None)  # the next test has a harness of its own

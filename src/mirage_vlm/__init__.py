"""Mirage: vision-language models that think in latent visual tokens.

The names below are imported on first use, so that `import mirage_vlm` and the command line start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirage_vlm import formats as formats
    from mirage_vlm.decoding import Engine, EngineConfig, GenerationConfig
    from mirage_vlm.errors import MirageError
    from mirage_vlm.modeling import LatentVLM
    from mirage_vlm.trajectory import (
        Decoding,
        Image,
        LatentSpan,
        Message,
        Text,
        Trajectory,
        assistant_turn,
        user_turn,
    )

__version__ = "0.1.0"

__all__ = [
    "Decoding",
    "Engine",
    "EngineConfig",
    "GenerationConfig",
    "Image",
    "LatentSpan",
    "LatentVLM",
    "Message",
    "MirageError",
    "Text",
    "Trajectory",
    "assistant_turn",
    "user_turn",
]

_HOME = {
    "Decoding": "mirage_vlm.trajectory",
    "Engine": "mirage_vlm.decoding",
    "EngineConfig": "mirage_vlm.decoding",
    "GenerationConfig": "mirage_vlm.decoding",
    "Image": "mirage_vlm.trajectory",
    "LatentSpan": "mirage_vlm.trajectory",
    "LatentVLM": "mirage_vlm.modeling",
    "Message": "mirage_vlm.trajectory",
    "MirageError": "mirage_vlm.errors",
    "Text": "mirage_vlm.trajectory",
    "Trajectory": "mirage_vlm.trajectory",
    "assistant_turn": "mirage_vlm.trajectory",
    "user_turn": "mirage_vlm.trajectory",
}


def __getattr__(name: str) -> Any:
    if name == "formats":  # a part of the package, which Python puts here itself once it is imported
        return importlib.import_module("mirage_vlm.formats")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "formats"})

"""Mirage: vision-language models that think in latent visual tokens.

The names below are imported on first use, so that `import mirage_vlm` and the command line start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirage_vlm.errors import MirageError
    from mirage_vlm.modeling import LatentVLM
    from mirage_vlm.trajectory import Image, LatentSpan, Message, Text, Trajectory

__version__ = "0.1.0"

__all__ = ["Image", "LatentSpan", "LatentVLM", "Message", "MirageError", "Text", "Trajectory"]

_HOME = {
    "Image": "mirage_vlm.trajectory",
    "LatentSpan": "mirage_vlm.trajectory",
    "LatentVLM": "mirage_vlm.modeling",
    "Message": "mirage_vlm.trajectory",
    "MirageError": "mirage_vlm.errors",
    "Text": "mirage_vlm.trajectory",
    "Trajectory": "mirage_vlm.trajectory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

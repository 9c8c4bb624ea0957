"""Floor 2: the model, the compression, the feedback, checkpoints.

The names below are imported on first use: recipes take the names of poolings and the like from this floor, and must be
refused, where they are wrong, before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirage_vlm.modeling.config import LatentConfig
    from mirage_vlm.modeling.latent_vlm import LatentVLM

__all__ = ["LatentConfig", "LatentVLM"]

_HOME = {"LatentConfig": "mirage_vlm.modeling.config", "LatentVLM": "mirage_vlm.modeling.latent_vlm"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value

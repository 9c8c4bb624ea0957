"""The small model that comes with the package."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "bundled"
BUNDLED_BASE = "bundled-base"

_FOLDERS = {BUNDLED: "vsp-small", BUNDLED_BASE: "vsp-small-base"}


def resolve(model: str) -> str:
    """A model name as a path: `bundled` and `bundled-base` are the package's own, anything else is left alone."""
    if model in _FOLDERS:
        return str(Path(__file__).parent.parent / "assets" / _FOLDERS[model])
    return model

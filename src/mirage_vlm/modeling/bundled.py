"""The small models that come with the package."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "bundled"
BUNDLED_BASE = "bundled-base"
BUNDLED_TASKS = "bundled-tasks"

_FOLDERS = {BUNDLED: "vsp-small", BUNDLED_BASE: "vsp-small-base", BUNDLED_TASKS: "tasks-small"}


def resolve(model: str) -> str:
    """A model name as a path: names that begin with `bundled` are the package's own, anything else is left alone."""
    if model in _FOLDERS:
        return str(Path(__file__).parent.parent / "assets" / _FOLDERS[model])
    return model

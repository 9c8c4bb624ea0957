"""What differs between two sets of settings, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any


def differing(there: Any, now: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two values of JSON differ, such as `data[0].n`, with what was there and what is now."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in {**there, **now}:
            yield from differing(there.get(key), now.get(key), f"{field}.{key}" if field else key)
    elif _groups(there) and _groups(now) and len(there) == len(now):
        for i, (one, other) in enumerate(zip(there, now, strict=True)):
            yield from differing(one, other, f"{field}[{i}]")
    elif there != now:
        yield field, there, now


def differences(there: Any, now: Any, field: str = "") -> Iterator[str]:
    """What differs between two values of JSON, a line each: `generation.temperature is 0.7, was 0.0`."""
    return (told(*found) for found in differing(there, now, field))


def told(field: str, there: Any, now: Any) -> str:
    """One difference in words."""
    return f"{field} is {_shown(now)}, was {_shown(there)}"


def in_short(lines: Sequence[str]) -> str:
    """The first few of many, and how many more there are."""
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


def _groups(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."

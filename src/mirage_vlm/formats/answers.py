"""The reference answer of a record: a text, a number, true or false, or a list of accepted answers."""

from __future__ import annotations

import json
import math
from typing import Any

from mirage_vlm.formats.faults import shown, text_fault


def answer_fault(value: Any) -> str | None:
    """What is wrong with a record's `answer`; None where nothing is."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, float) and not math.isfinite(each):
            return f"must be a finite number, not {shown(each)}"
        if isinstance(each, int | float):  # true and false among them
            continue
        if not isinstance(each, str):
            kind = "must be a text, a number, true or false, or a list of accepted answers"
            return f"{kind}, not {shown(value)}"
        if message := text_fault(each):
            return message
    return "is an empty list; give at least one accepted answer" if value == [] else None


def read_answer(value: Any) -> str | tuple[str, ...] | None:
    """The answer of a record in which `answer_fault` finds no fault; numbers, true and false as JSON writes them."""
    if isinstance(value, list):
        several = tuple(_text(each) for each in value)
        return several if len(several) > 1 else several[0]
    return None if value is None else _text(value)


def write_answer(answer: str | tuple[str, ...] | None) -> str | list[str] | None:
    """The answer as JSON holds it."""
    return answer if answer is None or isinstance(answer, str) else list(answer)


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else json.dumps(value)

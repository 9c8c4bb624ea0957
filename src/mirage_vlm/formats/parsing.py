"""JSON as a data file may have it: stricter than Python's own reader, and each fault told in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from mirage_vlm.formats.faults import Fault, shown

MOST_DIGITS, DEEPEST = 300, 100  # of a whole number; of lists and objects one in the other

# what a file begins with that is no text, and what to do about it
_OTHER_FILES = (
    (b"\xff\xfe", "is UTF-16, not UTF-8; save the file as UTF-8"),
    (b"\xfe\xff", "is UTF-16, not UTF-8; save the file as UTF-8"),
    (b"\x1f\x8b", "is gzip within gzip; unpack it once"),
    (b"PK\x03\x04", "is a zip file; unpack it"),
    (b"BZh", "is a bzip2 file; unpack it, or pack it with gzip"),
    (b"\xfd7zXZ\0", "is an xz file; unpack it, or pack it with gzip"),
    (b"\x28\xb5\x2f\xfd", "is a zstd file; unpack it, or pack it with gzip"),
    (b"PAR1", "is a Parquet file; `mirage data import` reads those"),
    (b"ARROW1", "is an Arrow file; name the folder that `save_to_disk` wrote"),
)


class NotJson(Exception):
    """A line that holds no JSON value that a record may be."""

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.fault = Fault(field, message)


def other_file(head: bytes) -> str | None:
    """What a file is that is no JSONL, by its first bytes; None where nothing speaks against it."""
    if head.lstrip().startswith(b"["):
        return "the file is a JSON array; write one object a line (`jq -c '.[]'` does it)"
    return next((message for magic, message in _OTHER_FILES if head.startswith(magic)), None)


def parse(line: bytes, last: bool = False) -> Any:
    """The value on a line.

    Args:
        line: its bytes, with or without the line's end.
        last: nothing follows, not even the line's end, so that the line may have been cut.

    Raises:
        NotJson: it is no JSON, names a key twice, or holds a number that no record can mean.
    """
    if b"\0" in line:
        raise NotJson("holds a NUL byte, which no text has; save the file as UTF-8")
    try:
        value = json.loads(
            line.rstrip().decode(),
            parse_constant=_refuse_constant,
            parse_float=_number,
            parse_int=_whole,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as fault:
        raise NotJson(f"is not UTF-8 at byte {fault.start + 1}; save the file as UTF-8") from fault
    except json.JSONDecodeError as fault:
        cut = "; the file ends within this line, so it may be incomplete" if last else ""
        raise NotJson(f"is not valid JSON: {fault.msg} at column {fault.colno}{cut}") from fault
    except RecursionError as fault:
        raise NotJson("is not valid JSON: nested too deeply") from fault
    if line.count(b"[") + line.count(b"{") > DEEPEST and _deep(value):
        raise NotJson(f"is nested too deeply: more than {DEEPEST} lists and objects one in the other")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise NotJson("is there twice in one object; keep one", twice)
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotJson(f"the number {shown(text)[1:-1]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise NotJson(f"a number has {len(text):,} digits; at most {MOST_DIGITS} are read")
    return int(text)


def _refuse_constant(constant: str) -> NoReturn:
    raise NotJson(f"is not valid JSON: {constant} is not a JSON number")


def _deep(value: Any) -> bool:
    """Whether lists and objects lie deeper than they may."""
    level: list[Any] = [value]
    for _ in range(DEEPEST + 1):
        if not level:
            return False
        level = [entry for each in level for entry in _inside(each) if isinstance(entry, dict | list)]
    return bool(level)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()

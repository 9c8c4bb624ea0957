"""Numbers that come in from outside: of the right kind, finite, within bounds, or refused by name."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

from mirage_vlm.errors import MirageError

INT64 = 2**63 - 1


def whole(name: str, value: Any, least: int | None = None, most: int = INT64) -> int:
    """A whole number as Python's own: an `int`, or what numpy and torch have for one, but no truth value.

    Args:
        name: of the setting, for the message.
        least, most: bounds, themselves allowed.

    Raises:
        MirageError: it is none, or out of bounds.
    """
    if _is_truth(value):
        raise MirageError(f"{name} must be a whole number, not {_shown(value)}")
    try:
        number = operator.index(value)
    except TypeError as fault:
        raise MirageError(f"{name} must be a whole number, not {_shown(value)}") from fault
    if least is not None and number < least:
        bounds = {0: "not be negative", 1: "be positive"}.get(least, f"be at least {least}")
        raise MirageError(f"{name} must {bounds}: {number}")
    if number > most:
        raise MirageError(f"{name} must be at most {most}: {_shown(number)}")
    return number


def real(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """A finite number as Python's `float`: an `int`, a `float`, or numpy's own, but no truth value.

    Args:
        name: of the setting, for the message.
        least, most: bounds, themselves allowed.
        above, below: bounds that are not.

    Raises:
        MirageError: it is none, not finite, or out of bounds.
    """
    if not isinstance(value, Real) or _is_truth(value):
        raise MirageError(f"{name} must be a number, not {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise MirageError(f"{name} must be a finite number, not {number}")
    bounds = (
        (least, "at least", least is not None and number < least),
        (above, "above", above is not None and number <= above),
        (most, "at most", most is not None and number > most),
        (below, "below", below is not None and number >= below),
    )
    if any(broken for *_, broken in bounds):
        said = " and ".join(f"{word} {bound:g}" for bound, word, _ in bounds if bound is not None)
        raise MirageError(f"{name} must be {said}: {number}")
    return number


def truth(name: str, value: Any) -> bool:
    """True or false as Python's own; a word or a number is none.

    Raises:
        MirageError: it is neither.
    """
    if not _is_truth(value):
        raise MirageError(f"{name} must be True or False, not {_shown(value)}")
    return bool(value)


def wholes(name: str, values: Any, least: int | None = None, most: int = INT64) -> tuple[int, ...]:
    """Several whole numbers; see `whole`.

    Raises:
        MirageError: they are no list, or one of them is none.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise MirageError(f"{name} must be a list of whole numbers, not {_shown(values)}")
    return tuple(whole(f"{name}[{i}]", value, least, most) for i, value in enumerate(values))


def _is_truth(value: Any) -> bool:
    """Whether it is a truth value of Python's, numpy's or torch's."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."

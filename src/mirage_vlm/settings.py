"""Typed settings from YAML: a tree of frozen dataclasses, with every fault named by file, line and key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mirage_vlm.errors import MirageError
from mirage_vlm.strict_yaml import read_mapping, read_text, read_value

T = TypeVar("T")
Where = Callable[[str], str]  # a key → the place of it, or of the nearest enclosing key that is known
PATH = {"path": True}  # metadata of fields that hold paths: in these ~ is the home folder


def read_settings(
    kind: type[T], path: str | Path, overrides: Sequence[str] = (), what: str = "the file"
) -> tuple[T, Where]:
    """Read a file and apply `key=value` overrides, with dots for groups: `train.max_steps=50`.

    Args:
        kind: a dataclass whose fields are plain values, tuples, `X | None` or dataclasses again.
        what: how messages name the whole, for example `the recipe`.

    Returns:
        The settings, and where each key stands.

    Raises:
        MirageError: the file cannot be read, or a key or value is wrong; the message names file, line and key.
    """
    values, lines = read_mapping(read_text(Path(os.path.expanduser(path)), what), str(path), what)
    origin = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        key, sep, raw = override.partition("=")
        if not sep or not key:
            raise MirageError(f"override {override!r} must be key=value")
        value = read_value(raw, f"override {override!r}")
        _override(values, key, value)
        inside = (f"{key}.", f"{key}[")  # what the file said there is gone
        origin = {name: place for name, place in origin.items() if not name.startswith(inside)}
        origin[key] = f"override {override!r}"
        for i in range(1, key.count(".") + 1):  # groups that the file does not have
            origin.setdefault(key.rsplit(".", i)[0], origin[key])
    found = _build(kind, values, "", origin, str(path), what)
    return found, lambda key: _where(origin, key, str(path))


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    place: Any = values
    for name in path:
        if isinstance(place, dict):
            place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise MirageError(f"override {key!r}: {name!r} is not a group of keys (lists are set whole)")
    place[last] = value


def _build(kind: Any, value: Any, key: str, origin: dict[str, str], path: str, what: str) -> Any:
    """A value of the annotated type, or a MirageError that says where it went wrong."""

    def fail(message: str) -> typing.NoReturn:
        raise MirageError(f"{_where(origin, key, path)}: {key or what}: {message}")

    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        return _build(next(arm for arm in kind.__args__ if arm is not types.NoneType), value, key, origin, path, what)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            fail(f"expected a list, got {_shown(value)}")
        item = typing.get_args(kind)[0]
        return tuple(_build(item, v, f"{key}[{i}]", origin, path, what) for i, v in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            fail(f"expected keys and values, got {_shown(value)}")
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                near = difflib.get_close_matches(str(name), hints, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(hints)}"
                child = f"{key}.{name}" if key else str(name)
                raise MirageError(f"{_where(origin, child, path)}: unknown key {child!r}{hint}")
        required = [
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in value
        ]
        if required:
            fail(f"missing {', '.join(required)}")
        inner = {n: _build(hints[n], v, f"{key}.{n}" if key else n, origin, path, what) for n, v in value.items()}
        for found in dataclasses.fields(kind):
            if found.metadata.get("path") and found.name in inner:
                name = f"{key}.{found.name}" if key else found.name
                inner[found.name] = _paths(inner[found.name], f"{_where(origin, name, path)}: {name}")
        return typing.cast(Any, kind)(**inner)
    if kind is float and isinstance(value, str):  # YAML reads 1e-5 as a string
        try:
            number = float(value)
        except ValueError:
            fail(f"expected a number, got {_shown(value)}")
        if math.isinf(number) and "inf" not in value.lower():
            fail(f"{_shown(value)} is too large for a number")
        return number
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        fail(f"expected {kind.__name__}, got {_shown(value)}{_surprise(kind, value)}")
    return value


def _surprise(kind: type, value: Any) -> str:
    """What to do about words that YAML takes for something else."""
    if kind is str and isinstance(value, bool):
        return "; yes, no, on, off, true and false are no words in YAML unless they stand in quotes"
    if kind is str and value is None:
        return "; null, ~ and an empty value are nothing in YAML; put quotes around a word"
    return ""


def expand(path: str) -> str:
    """A path with the home folder in the place of ~.

    Raises:
        MirageError: it is of a user that there is not, is empty, or cannot be a path.
    """
    found = os.path.expanduser(path)
    if not path:
        raise MirageError("is empty; give a path")
    if "\0" in path:
        raise MirageError("holds a zero byte, which no path has")
    if found.startswith("~"):
        raise MirageError(f"there is no home folder of {path.split('/')[0]!r}; write ./~… for a name that begins so")
    return found


def _paths(value: Any, where: str) -> Any:
    """A path, several, or None, with ~ expanded."""
    try:
        if isinstance(value, tuple):
            return tuple(map(expand, value))
        return None if value is None else expand(value)
    except MirageError as fault:
        raise MirageError(f"{where}: {fault}") from fault


def not_finite(settings: Any, key: str = "") -> str | None:
    """The key of the first number among settings that is infinite or none."""
    if dataclasses.is_dataclass(settings):
        inside = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
        parts = [(f"{key}.{name}" if key else name, value) for name, value in inside.items()]
    elif isinstance(settings, tuple):
        parts = [(f"{key}[{i}]", value) for i, value in enumerate(settings)]
    else:
        return key if isinstance(settings, float) and not math.isfinite(settings) else None
    return next((found for name, value in parts if (found := not_finite(value, name)) is not None), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _where(origin: dict[str, str], key: str, path: str) -> str:
    """Place of the nearest enclosing key that is known."""
    while key and key not in origin:
        key = key.rpartition(".")[0] if "." in key else key.rpartition("[")[0]
    return origin.get(key, path)

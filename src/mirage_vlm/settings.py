"""Typed settings from YAML: a tree of frozen dataclasses, with every fault named by file, line and key."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mirage_vlm.errors import MirageError

T = TypeVar("T")
Where = Callable[[str], str]  # a key → the place of it, or of the nearest enclosing key that is known


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
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.compose(text)
    except (OSError, UnicodeDecodeError) as fault:
        raise MirageError(f"{path}: cannot read {what}: {fault}") from fault
    except yaml.YAMLError as fault:
        raise MirageError(f"{path}: not valid YAML: {' '.join(str(fault).split())}") from fault
    if not isinstance(tree, yaml.MappingNode):
        raise MirageError(f"{path}: {what} is not a mapping of keys to values")
    lines: dict[str, int] = {}
    values = _plain(tree, "", lines)
    origin = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        key, sep, raw = override.partition("=")
        if not sep:
            raise MirageError(f"override {override!r} must be key=value")
        try:
            value = yaml.safe_load(raw) if raw else None
        except yaml.YAMLError as fault:
            raise MirageError(f"override {override!r}: not valid YAML: {' '.join(str(fault).split())}") from fault
        _override(values, key, value)
        inside = (f"{key}.", f"{key}[")  # what the file said there is gone
        origin = {name: place for name, place in origin.items() if not name.startswith(inside)}
        origin[key] = f"override {override!r}"
        for i in range(1, key.count(".") + 1):  # groups that the file does not have
            origin.setdefault(key.rsplit(".", i)[0], origin[key])
    found = _build(kind, values, "", origin, str(path), what)
    return found, lambda key: _where(origin, key, str(path))


def _plain(node: yaml.Node, key: str, lines: dict[str, int]) -> Any:
    """YAML nodes as plain values, recording the line of every key."""
    lines[key] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for name, value in node.value:
            child = f"{key}.{name.value}" if key else str(name.value)
            found[name.value] = _plain(value, child, lines)
            lines[child] = name.start_mark.line + 1
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{key}[{i}]", lines) for i, item in enumerate(node.value)]
    return yaml.safe_load(yaml.serialize(node))


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
            fail(f"expected a list, got {value!r}")
        item = typing.get_args(kind)[0]
        return tuple(_build(item, v, f"{key}[{i}]", origin, path, what) for i, v in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            fail(f"expected keys and values, got {value!r}")
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
        return typing.cast(Any, kind)(**inner)
    if kind is float and isinstance(value, str):  # YAML reads 1e-5 as a string
        try:
            return float(value)
        except ValueError:
            fail(f"expected a number, got {value!r}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        fail(f"expected {kind.__name__}, got {value!r}")
    return value


def _where(origin: dict[str, str], key: str, path: str) -> str:
    """Place of the nearest enclosing key that is known."""
    while key and key not in origin:
        key = key.rpartition(".")[0] if "." in key else key.rpartition("[")[0]
    return origin.get(key, path)

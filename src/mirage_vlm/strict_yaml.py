"""YAML as plain values and the line of each, without what surprises: keys that are there twice, values that are not
what they look like, aliases that grow without end."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.constructor import SafeConstructor

from mirage_vlm.errors import MirageError

MOST_BYTES = 1 << 20
MOST_VALUES = 20_000  # with aliases written out
DEEPEST = 32
WHOLE = 2**63  # whole numbers are below it
_TAGS = "tag:yaml.org,2002:"
_AS_TEXT = ("str", "timestamp", "merge", "value")  # of plain scalars; a date is the text that it is written as
_PIPES = ("/dev/stdin", "/dev/fd/")


def read_text(path: Path, what: str) -> str:
    """The text of a file that is to be read whole.

    Raises:
        MirageError: it is no file, is too large or not UTF-8, or cannot be read.
    """
    try:
        with path.open("rb") if _is_file(path) else _no_file(path, what) as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as fault:  # a name with a zero byte is a ValueError
        reason = getattr(fault, "strerror", None) or fault
        raise MirageError(f"{path}: cannot read {what}: {reason}") from fault
    if len(content) > MOST_BYTES:
        raise MirageError(f"{path}: cannot read {what}: it has more than {MOST_BYTES >> 20} MiB; is it another file?")
    try:
        return content.decode()
    except UnicodeDecodeError as fault:
        line = content[: fault.start].count(b"\n") + 1
        raise MirageError(f"{path}:{line}: cannot read {what}: it is not UTF-8; save it as UTF-8") from fault


def _is_file(path: Path) -> bool:
    """Whether to read it at all: a named pipe would wait, and a device might never end."""
    return stat.S_ISREG(path.stat().st_mode) or str(path).startswith(_PIPES)


def _no_file(path: Path, what: str) -> NoReturn:
    raise MirageError(f"{path}: cannot read {what}: it is {'a folder' if path.is_dir() else 'not a regular file'}")


def read_mapping(text: str, where: str, what: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A document that maps keys to values, and the line of each key and item, such as `data[0].n`.

    Args:
        where: the file, for messages.
        what: how messages name the whole.

    Raises:
        MirageError: it is not YAML, not a mapping, or has what is not read here; the message names file and line.
    """
    node = _compose(text, where)
    if not isinstance(node, yaml.MappingNode):
        raise MirageError(f"{where}: {what} is not a mapping of keys to values")
    reader = _Reader(where)
    return reader.value(node, ""), reader.lines


def read_value(text: str, where: str) -> Any:
    """A single value, such as that of an override; None for an empty text.

    Raises:
        MirageError: as for `read_mapping`.
    """
    node = _compose(text, where)
    return None if node is None else _Reader(where, numbered=False).value(node, "")


class _Loader(yaml.SafeLoader):
    """Composes nodes to a depth that Python's stack can bear."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {DEEPEST} deep", problem_mark=self.peek_event().start_mark
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _compose(text: str, where: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.YAMLError as fault:
        mark, problem = getattr(fault, "problem_mark", None), getattr(fault, "problem", None)
        place = where if mark is None or where.startswith("override") else f"{where}:{mark.line + 1}"
        said = " ".join(str(problem or fault).split())
        raise MirageError(f"{place}: not valid YAML: {said}") from fault


class _Reader:
    """Nodes to plain values.

    Args:
        where: the file.
        numbered: messages name the line.
    """

    def __init__(self, where: str, numbered: bool = True):
        self.where, self.numbered = where, numbered
        self.lines: dict[str, int] = {}
        self.count = 0
        self.open: list[int] = []  # the nodes that the current one is in

    def value(self, node: yaml.Node, key: str) -> Any:
        self.lines.setdefault(key, node.start_mark.line + 1)
        self.count += 1
        if self.count > MOST_VALUES:
            self.fail(node, f"holds more than {MOST_VALUES:,} values once its aliases are written out")
        if id(node) in self.open:
            self.fail(node, "is an alias of what it is in itself")
        tag = node.tag.removeprefix(_TAGS)
        self.open.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and tag == "map":
                return self.mapping(node, key)
            if isinstance(node, yaml.SequenceNode) and tag == "seq":
                return [self.value(item, f"{key}[{i}]") for i, item in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode):
                return self.scalar(node, tag)
        finally:
            self.open.pop()
        self.fail(node, f"the tag {_shown_tag(node.tag)} is not read; write plain values, lists and keys")

    def mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first: dict[str, int] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                self.fail(name, "a key must be a word, not a list or a mapping")
            if name.tag == f"{_TAGS}merge":
                self.fail(name, "merge keys (<<) are not read; write the keys out")
            if name.tag.removeprefix(_TAGS) not in ("str", "bool", "int", "float", "null", "timestamp", "value"):
                self.fail(name, f"the tag {_shown_tag(name.tag)} is not read; a key is a word")
            word, line = name.value, name.start_mark.line + 1
            child = f"{key}.{word}" if key else word
            if word in first:
                self.fail(name, f"{child!r} is there twice, first in line {first[word]}; remove one of them")
            first[word] = line
            self.lines[child] = line
            found[word] = self.value(value, child)
        return found

    def scalar(self, node: yaml.ScalarNode, tag: str) -> Any:
        text = node.value
        try:
            if tag in _AS_TEXT:
                return text
            if tag == "null":
                return None
            if tag == "bool":
                return SafeConstructor.bool_values[text.lower()]
            if tag in ("int", "float") and ":" in text:
                self.fail(node, f"{text} would be read as a number to base 60; put quotes around it")
            if tag == "int":
                if re.fullmatch(r"[-+]?0[0-7_]+", text):
                    self.fail(node, f"{text} would be read as octal; leave out the leading 0, or write 0x… for hex")
                whole = int(SafeConstructor().construct_yaml_int(node))
                if abs(whole) < WHOLE:
                    return whole
                self.fail(node, f"{_short(text)} is too large for a whole number")
            if tag == "float":
                number = float(SafeConstructor().construct_yaml_float(node))
                return self.finite(node, number, text)
        except (ValueError, KeyError, OverflowError):
            self.fail(node, f"{_short(text)} cannot be read as {tag}")
        self.fail(node, f"the tag {_shown_tag(node.tag)} is not read; write plain values, lists and keys")

    def finite(self, node: yaml.Node, number: float, text: str) -> float:
        """A number, unless it became infinite in the reading."""
        if number in (float("inf"), float("-inf")) and "inf" not in text.lower():
            self.fail(node, f"{_short(text)} is too large for a number")
        return number

    def fail(self, node: yaml.Node, message: str) -> NoReturn:
        place = f"{self.where}:{node.start_mark.line + 1}" if self.numbered else self.where
        raise MirageError(f"{place}: {message}")


def _shown_tag(tag: str) -> str:
    return _short(f"!!{tag.removeprefix(_TAGS)}" if tag.startswith(_TAGS) else tag)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."

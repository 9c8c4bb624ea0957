"""Cells of a row: nested values, texts, and pictures in any of the ways in which data sets keep them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.pictures import from_bytes
from mirage_vlm.pictures import path_of, scheme_of
from mirage_vlm.sources.mapping import ROW, fill, is_template, names_in
from mirage_vlm.sources.tables import Row
from mirage_vlm.trajectory import Image

# base64 of a PNG, JPEG, GIF, WebP or BMP file; no path begins like this and is as long
_BASE64 = re.compile(r"\s*(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk)[A-Za-z0-9+/\s]{48,}={0,2}\s*")


def cell(row: Row, name: str) -> Any:
    """The value of a column, or of a path into nested data; through lists, the list of what is there.

    Raises:
        MirageError: the row has no such column.
    """
    if name in row.cells:
        return row.cells[name]
    first, _, rest = name.partition(".")
    if not rest or first not in row.cells:
        raise MirageError(f"{row.where}: has no {name!r}; it has: {', '.join(row.cells)}")
    return _inside(row.cells[first], rest.split("."))


def _inside(value: Any, path: list[str]) -> Any:
    if not path or value is None:
        return value
    if isinstance(value, list):
        found = [_inside(entry, path) for entry in value]
        return [entry for entry in found if entry is not None]
    return _inside(value.get(path[0]) if isinstance(value, Mapping) else None, path[1:])


def text(row: Row, column: str) -> str:
    """A column's text, or a template's.

    Raises:
        MirageError: there is none.
    """
    if is_template(column):
        values = {name: text(row, name) for name in names_in(column)}
        return fill(column, values | {ROW: str(row.number)})
    value = cell(row, column)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        problem = "is empty" if value is None else f"must be a text, not {str(value)[:40]!r}"
        raise MirageError(f"{row.where}: {column}: {problem}")
    return str(value)


def pictures(row: Row, column: str) -> list[Image]:
    """The pictures of a column: as many as there are.

    A cell may be what `datasets` stores, bytes, base64, a path from the data's folder, or a list of such.

    Raises:
        MirageError: a cell is none of these, a URL, or a file that is not there.
    """
    value = text(row, column) if is_template(column) else cell(row, column)
    return [_picture(entry, row, column) for entry in _flat(value)]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for entry in value:
            yield from _flat(entry)
    elif value is not None and value != "":
        yield value


def _picture(value: Any, row: Row, column: str) -> Image:
    where = f"{row.where}: {column}"
    if isinstance(value, Mapping) and value.get("bytes"):
        value = value["bytes"]
    elif isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, bytes):
        return from_bytes(value, where)
    if not isinstance(value, str) or not value:
        raise MirageError(f"{where}: must be a picture, not {str(value)[:40]!r}")
    scheme = scheme_of(value)
    if scheme == "http":
        raise MirageError(f"{where}: is a URL ({value[:60]}); download the pictures, and let the column name the files")
    if scheme == "data":
        return from_bytes(_decoded(value.partition(",")[2], where), where)
    if _BASE64.fullmatch(value):
        return from_bytes(_decoded(value, where), where)
    try:
        path = path_of(value) if row.base is None else row.base / path_of(value)
    except MirageError as fault:
        raise MirageError(f"{where}: {fault}") from fault
    if not path.is_file():
        raise MirageError(f"{where}: no such file: {str(path)[:200]}")
    return Image(path)


def _decoded(value: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except binascii.Error as fault:
        raise MirageError(f"{where}: is not base64: {fault}") from fault

"""Rows of somebody's data: a Hugging Face dataset, or local parquet, JSONL, JSON, CSV, TSV or arrow files."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_vlm.errors import MirageError
from mirage_vlm.sources.mapping import Mapping

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow")
_BATCH = 16  # rows with pictures can be large
_MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")  # of a folder by save_to_disk


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        where: its place, such as `test.parquet[3]`, counted from 0, or `test.csv:4`, a line.
        number: counted from 1 through all files of the data.
        cells: as stored: pictures as bytes, not decoded.
        base: the folder at which relative picture paths start; None where there is none.
    """

    where: str
    number: int
    cells: dict[str, Any]
    base: Path | None


@dataclass(frozen=True)
class Table:
    """Rows that can be read again and again, and the columns that all of them have.

    Attributes:
        name: of the file or dataset, for messages.
        columns: their names; of JSON the keys of all rows, of which a row may lack some.
        read: yields (place, cells) of each row.
        base: the folder at which relative picture paths start.
    """

    name: str
    columns: Sequence[str]
    read: Callable[[], Iterator[tuple[str, dict[str, Any]]]]
    base: Path | None


def open_tables(mapping: Mapping, source: str | Path | None) -> list[Table]:
    """The tables of a mapping's data.

    Args:
        source: a file or folder, or the name of a dataset of the Hugging Face hub; None for the mapping's own.

    Raises:
        MirageError: there is no such data, or it cannot be read.
    """
    if source is not None and Path(source).exists():
        return _local(mapping, Path(source))
    if source is not None and (Path(source).suffix in SUFFIXES or str(source).count("/") != 1):
        raise MirageError(f"{source}: no such file or folder, and no name of a dataset (owner/name)")
    name = str(source) if source is not None else mapping.dataset
    if mapping.download is not None:
        folder = mapping.download.rpartition("/")[2]
        raise MirageError(
            f"{name or mapping.download} is made of files beside each other: download them "
            f"(`hf download {mapping.download} --repo-type dataset --local-dir {folder}`) and name the folder"
        )
    if name is None:
        raise MirageError("name a file, a folder or a dataset of the Hugging Face hub")
    return [_hub(mapping, name)]


def rows(tables: Iterable[Table]) -> Iterator[Row]:
    """All rows of all tables, in order."""
    number = 0
    for table in tables:
        for where, cells in table.read():
            number += 1
            yield Row(where, number, cells, table.base)


def _hub(mapping: Mapping, name: str) -> Table:
    import datasets

    config = _config(mapping, name)
    if mapping.split is None:
        raise MirageError(f"{name}: name a split, with `split` in the mapping or --split")
    try:
        found = datasets.load_dataset(name, config, split=mapping.split)
    except Exception as fault:  # the hub, the network and pyarrow raise all kinds
        reason = " ".join(str(fault).split()) or type(fault).__name__
        raise MirageError(f"{name}: cannot be loaded: {reason}") from fault
    return _of_dataset(found, name, None)


def _config(mapping: Mapping, name: str) -> str | None:
    if mapping.config is None and mapping.configs:
        raise MirageError(f"{name}: name one of its subsets with --config: {', '.join(mapping.configs)}")
    return mapping.config


def _local(mapping: Mapping, path: Path) -> list[Table]:
    if path.is_file():
        return [_of_file(path, path.parent)]
    if any((path / mark).exists() for mark in _MARKS):
        return [_saved(mapping, path)]
    return [_of_file(file, path) for file in _files(mapping, path)]


def _files(mapping: Mapping, folder: Path) -> list[Path]:
    """The data files of a folder that the mapping asks for, by name."""
    there = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    names = [path.relative_to(folder).as_posix() for path in there]
    if mapping.file is not None:
        wanted = mapping.file
        if "{config}" in wanted:
            wanted = wanted.replace("{config}", str(_config(mapping, str(folder))))
        wanted = wanted.replace("{split}", mapping.split or "*")
        found = [path for path, name in zip(there, names, strict=True) if fnmatchcase(name, wanted)]
    elif mapping.split is not None:
        # the split as a whole word: not testmini for test, nor eval for val
        word = re.compile(rf"(^|[/._-]){re.escape(mapping.split)}([-_.]\d|[./]|$)")
        wanted = f"of the split {mapping.split!r}"
        found = [path for path, name in zip(there, names, strict=True) if word.search(name)]
    else:
        wanted, found = f"({', '.join(SUFFIXES)})", there
    if not found:
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise MirageError(f"{folder}: has no data file {wanted}; there are: {listed or 'none'}")
    return found


def _saved(mapping: Mapping, path: Path) -> Table:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as fault:  # pyarrow and datasets raise all kinds at damaged files
        reason = " ".join(str(fault).split()) or type(fault).__name__
        raise MirageError(f"{path}: cannot be read as a dataset: {reason}") from fault
    if isinstance(found, datasets.DatasetDict):
        if mapping.split not in found:
            raise MirageError(f"{path}: has no split {mapping.split!r}; there are: {', '.join(found)}")
        found = found[mapping.split]
    return _of_dataset(found, str(path), path)


def _of_dataset(dataset: datasets.Dataset, name: str, base: Path | None) -> Table:
    table = dataset.with_format("arrow")  # as stored: pictures as bytes, not decoded

    def read() -> Iterator[tuple[str, dict[str, Any]]]:
        for first in range(0, len(dataset), _BATCH):
            for i, cells in enumerate(table[first : first + _BATCH].to_pylist(), first):
                yield f"{name}[{i}]", cells

    return Table(name, dataset.column_names, read, base)


def _of_file(path: Path, base: Path) -> Table:
    try:
        if path.suffix == ".parquet":
            return _of_parquet(path, base)
        if path.suffix == ".arrow":
            import datasets

            return _of_dataset(datasets.Dataset.from_file(str(path)), str(path), base)
        if path.suffix in (".csv", ".tsv"):
            return _of_csv(path, base)
        if path.suffix in (".jsonl", ".json"):
            return _of_json(path, base)
    except (OSError, ValueError) as fault:  # pyarrow's errors are among these
        raise MirageError(f"{path}: cannot be read: {' '.join(str(fault).split())}") from fault
    raise MirageError(f"{path}: is none of {', '.join(SUFFIXES)}")


def _of_parquet(path: Path, base: Path) -> Table:
    import pyarrow.parquet

    columns = pyarrow.parquet.read_schema(path).names

    def read() -> Iterator[tuple[str, dict[str, Any]]]:
        i = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for cells in batch.to_pylist():
                    yield f"{path}[{i}]", cells
                    i += 1

    return Table(str(path), columns, read, base)


def _of_csv(path: Path, base: Path) -> Table:
    csv.field_size_limit(sys.maxsize)  # pictures may be in it, as base64
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        columns = next(csv.reader(file, delimiter=delimiter), [])

    def read() -> Iterator[tuple[str, dict[str, Any]]]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, delimiter=delimiter)
            for cells in lines:
                where = f"{path}:{lines.line_num}"
                if None in cells or None in cells.values():
                    raise MirageError(f"{where}: has another number of cells than the {len(columns)} columns")
                yield where, {name: value if value != "" else None for name, value in cells.items()}

    return Table(str(path), columns, read, base)


def _of_json(path: Path, base: Path) -> Table:
    def objects() -> Iterator[tuple[str, dict[str, Any]]]:
        for where, cells in _json_lines(path) if path.suffix == ".jsonl" else _json_array(path):
            if not isinstance(cells, dict):
                raise MirageError(f"{where}: must be an object, not {str(cells)[:40]!r}")
            yield where, cells

    columns = list(dict.fromkeys(name for _, cells in objects() for name in cells))

    def read() -> Iterator[tuple[str, dict[str, Any]]]:
        for where, cells in objects():
            yield where, dict.fromkeys(columns) | cells  # a key that this row lacks is an empty cell

    return Table(str(path), columns, read, base)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    found = _parse(path.read_bytes(), str(path))
    if not isinstance(found, list):
        raise MirageError(f"{path}: must be a list of objects")
    for i, cells in enumerate(found):
        yield f"{path}[{i}]", cells


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as fault:
        raise MirageError(f"{where}: is not valid JSON: {fault}") from fault

"""JSONL data files, plain or gzip: one record a line, in any form that `records` knows."""

from __future__ import annotations

import gzip
import json
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import chat, reference
from mirage_vlm.formats.faults import Fault
from mirage_vlm.formats.parsing import NotJson, other_file, parse
from mirage_vlm.formats.pictures import ImageFolder, ImageSource, seen_from
from mirage_vlm.formats.records import PlainReader, Scanned, collect, examine
from mirage_vlm.formats.writing import atomic_writer
from mirage_vlm.trajectory import Trajectory

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"


def read_jsonl(path: str | Path, *, check_files: bool = True, plain: PlainReader | None = None) -> list[Trajectory]:
    """The examples of a JSONL file, plain or gzip; each line may be in any of the forms that are read.

    Relative image paths start at the file's folder. Pictures are checked, but loaded only when they are used.

    Args:
        path: the file.
        check_files: also open and decode every picture that is not an http(s) URL.
        plain: reads plain VSP maps; None counts them as faults.

    Raises:
        MirageError: the file cannot be read, has no examples, or has a fault; the message names the line and
            the field of the first, and how many more there are.
    """
    return collect(scan_jsonl(Path(path), check_files=check_files, plain=plain), Path(path))


def scan_jsonl(path: Path, *, check_files: bool, plain: PlainReader | None) -> Iterator[Scanned]:
    """Every record of a JSONL file with its faults, line by line; arguments as for `read_jsonl`.

    Raises:
        MirageError: the file cannot be opened or read, or is damaged.
    """
    try:
        with _opened(path) as file:
            first = True
            for number, line in enumerate(file, 1):
                content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if not content.strip():
                    continue
                where = f"{path}:{number}"
                if first and (other := other_file(content)) is not None:
                    yield Scanned(where, None, (Fault("", other),))
                    return
                first = False
                try:
                    record = parse(content, last=not line.endswith(b"\n"))
                except NotJson as fault:
                    yield Scanned(where, None, (fault.fault,))
                    continue
                yield examine(record, where, base=path.parent, check_files=check_files, plain=plain)
    except FileNotFoundError:
        raise MirageError(f"{path}: no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
        raise MirageError(f"{path}: the gzip file is damaged or incomplete: {fault}") from fault
    except OSError as fault:
        raise MirageError(f"{path}: cannot be read: {fault.strerror or fault}") from fault


@contextmanager
def _opened(path: Path) -> Iterator[Iterable[bytes]]:
    """The lines of a file, unpacked where it is gzip, whatever its name."""
    try:
        mode = path.stat().st_mode
    except ValueError as fault:  # a NUL, or half of a surrogate pair
        raise MirageError(f"{str(path)!r}: is no path: {fault}") from fault
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISDIR(mode)):
        raise MirageError(f"{path}: is a device, not a data file")
    with path.open("rb") as file:
        if file.peek(len(_GZIP)).startswith(_GZIP):
            with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
                yield unpacked
        else:
            yield file


def write_jsonl(
    path: str | Path, trajectories: Iterable[Trajectory], *, image_source: ImageSource | None = None
) -> int:
    """Write trajectories as JSONL in the chat form, whole or not at all.

    Args:
        path: the file; an older one stays as it is until the new one is complete.
        trajectories: what to write, in order.
        image_source: says what to write for a picture. None refers to picture files, relative to the file's
            folder where they are below it, and embeds pictures in memory; `ImageFolder` saves those as files.

    Returns:
        How many were written.

    Raises:
        MirageError: the file cannot be written, a picture cannot be drawn, or `meta` is not JSON.
    """
    path = Path(path)
    source = image_source or seen_from(path.parent)
    return _write(path, (chat.to_record(trajectory, image_source=source) for trajectory in trajectories))


def write_reference(
    path: str | Path, trajectories: Iterable[Trajectory], *, image_source: ImageSource | None = None
) -> int:
    """Write trajectories as JSONL in the reference implementation's format, whole or not at all.

    Args:
        path: the file; an older one stays as it is until the new one is complete.
        trajectories: what to write, in order; each has one user turn (pictures, then text) and one assistant
            turn.
        image_source: says what to write for a picture. None refers to picture files and saves pictures in
            memory to the folder `<stem>-images` beside the file, since the reference implementation opens
            paths only.

    Returns:
        How many were written.

    Raises:
        MirageError: the file cannot be written, a picture cannot be drawn, or the format has no place for
            something in a trajectory.
    """
    path = Path(path)
    source = image_source or ImageFolder(path.with_name(f"{path.stem}-images"), path.parent)
    records = (
        reference.to_record(trajectory, image_source=source, where=f"example {number}")
        for number, trajectory in enumerate(trajectories, 1)
    )
    return _write(path, records)


def _write(path: Path, records: Iterable[dict[str, Any]]) -> int:
    count = 0
    with atomic_writer(path) as file:
        for record in records:
            try:
                line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError) as fault:
                raise MirageError(f"cannot write {path}: example {count + 1} is not JSON: {fault}") from fault
            file.write(line + b"\n")
            count += 1
    return count

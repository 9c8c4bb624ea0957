"""JSONL data files: one record a line, in the chat form or the reference implementation's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import chat, reference
from mirage_vlm.formats.faults import Fault
from mirage_vlm.formats.pictures import ImageFolder, ImageSource, seen_from
from mirage_vlm.formats.records import PlainReader, Scanned, collect, examine
from mirage_vlm.formats.writing import atomic_writer
from mirage_vlm.trajectory import Trajectory

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_jsonl(path: str | Path, *, check_files: bool = True, plain: PlainReader | None = None) -> list[Trajectory]:
    """The examples of a JSONL file; each line may be in the chat form or in the reference implementation's.

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
        MirageError: the file cannot be opened or read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if not content.strip():
                    continue
                where = f"{path}:{number}"
                if number == 1 and content.lstrip().startswith(b"["):
                    hint = "the file is a JSON array; write one object a line (`jq -c '.[]'` does it)"
                    yield Scanned(where, None, (Fault("", hint),))
                    return
                try:
                    record = _parse(content)
                except ValueError as fault:
                    yield Scanned(where, None, (Fault("", str(fault)),))
                    continue
                yield examine(record, where, base=path.parent, check_files=check_files, plain=plain)
    except FileNotFoundError:
        raise MirageError(f"{path}: no such file") from None
    except OSError as fault:
        raise MirageError(f"{path}: cannot be read: {fault.strerror or fault}") from fault


def _parse(line: bytes) -> Any:
    """The value on a line.

    Raises:
        ValueError: it is not JSON; the message says why.
    """
    try:
        return json.loads(line.rstrip().decode(), parse_constant=_refuse)
    except UnicodeDecodeError as fault:
        raise ValueError(f"is not UTF-8 at byte {fault.start + 1}; save the file as UTF-8") from fault
    except json.JSONDecodeError as fault:
        raise ValueError(f"is not valid JSON: {fault.msg} at column {fault.colno}") from fault
    except RecursionError as fault:
        raise ValueError("is not valid JSON: nested too deeply") from fault


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"is not valid JSON: {constant} is not a JSON number")


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

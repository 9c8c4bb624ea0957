"""Whatever lies at a path: a JSONL file or a dataset folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mirage_vlm.formats.hf import open_dataset_dir, scan_dataset
from mirage_vlm.formats.jsonl import scan_jsonl
from mirage_vlm.formats.records import PlainReader, Scanned, collect
from mirage_vlm.trajectory import Trajectory


def scan(path: str | Path, *, check_files: bool = True, plain: PlainReader | None = None) -> Iterator[Scanned]:
    """Every record of a JSONL file or dataset folder, with its faults.

    Args:
        path: the file or folder.
        check_files: also open and decode every picture that is not an http(s) URL.
        plain: reads plain VSP maps; None counts them as faults.

    Raises:
        MirageError: the file or folder as a whole cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return scan_dataset(open_dataset_dir(path), str(path), check_files=check_files, plain=plain)
    return scan_jsonl(path, check_files=check_files, plain=plain)


def read_data(path: str | Path, *, check_files: bool = True, plain: PlainReader | None = None) -> list[Trajectory]:
    """The examples of a JSONL file or dataset folder.

    Args:
        path: the file or folder.
        check_files: also open and decode every picture that is not an http(s) URL.
        plain: reads plain VSP maps; None counts them as faults.

    Raises:
        MirageError: it cannot be read, has no examples, or has a fault; the message names the place and the
            field of the first, and how many more there are.
    """
    return collect(scan(path, check_files=check_files, plain=plain), Path(path))

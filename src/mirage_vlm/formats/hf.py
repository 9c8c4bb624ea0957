"""Hugging Face datasets: the layout that TRL reads, with two columns more.

A row holds `messages` (parts without pictures), `images` (the pictures of the image parts, in order),
`helpers` (the helper images of the latent parts, in order, null where a span has none), `task`, `answer` (or, where
several are accepted, `answers`), `meta` (as a JSON string, since rows differ in what they keep there) and `decoding`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import chat
from mirage_vlm.formats.pictures import file_of, is_file, png
from mirage_vlm.formats.records import PlainReader, Scanned, collect, examine
from mirage_vlm.pictures import Encoded, scheme_of
from mirage_vlm.trajectory import Image, LatentSpan, Trajectory

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class StoredPicture:
    """A drawing function for a picture of a dataset: read from the dataset each time it is asked for."""

    dataset: datasets.Dataset
    row: int
    column: str
    index: int

    def __call__(self) -> PIL.Image.Image:
        """The picture."""
        (cell,) = self.dataset.with_format("arrow")[self.row : self.row + 1][self.column].to_pylist()
        return Encoded(cell[self.index]["bytes"])()


def to_dataset(trajectories: Iterable[Trajectory]) -> datasets.Dataset:
    """The trajectories as a dataset.

    Picture files and URLs are kept as paths and read in when the dataset is saved; others are kept as PNG.

    Raises:
        MirageError: a picture is no file, one in memory cannot be drawn, or `meta` is not JSON.
    """
    import datasets

    text, number = datasets.Value("string"), datasets.Value("int64")
    part = {
        "type": text,
        "text": text,
        "k": number,
        "regions": [[datasets.Value("float64")]],
        "latents": {"shape": [number], "dtype": text, "data": text},
    }
    features = datasets.Features(
        {
            "messages": [{"role": text, "content": [part]}],
            "images": [datasets.Image()],
            "helpers": [datasets.Image()],
            "task": text,
            "answer": text,
            "answers": [text],
            "meta": text,
            "decoding": {
                "token_ids": [number],
                "finish_reason": text,
                "logprobs": [datasets.Value("float64")],
                "stop_id": number,
            },
        }
    )
    rows = [_to_row(trajectory) for trajectory in trajectories]
    if not any(row["answers"] for row in rows):  # the column is there only where it is needed
        features.pop("answers")
        rows = [{key: value for key, value in row.items() if key != "answers"} for row in rows]
    return datasets.Dataset.from_list(rows, features=features)


def _to_row(trajectory: Trajectory) -> dict[str, Any]:
    record = chat.to_record(trajectory, image_source=lambda image: "")
    segments = [segment for message in trajectory.messages for segment in message.segments]
    try:
        meta = json.dumps(trajectory.meta, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as fault:
        raise MirageError(f"meta cannot be written as JSON: {fault}") from fault
    keys = ("type", "text", "k", "regions", "latents")  # pictures go to their columns
    messages = [
        {**message, "content": [{key: part.get(key) for key in keys} for part in message["content"]]}
        for message in record["messages"]
    ]
    return {
        "messages": messages,
        "images": [_to_cell(segment) for segment in segments if isinstance(segment, Image)],
        "helpers": [_to_cell(segment.helper) for segment in segments if isinstance(segment, LatentSpan)],
        "task": trajectory.task,
        "answer": trajectory.answer if isinstance(trajectory.answer, str) else None,
        "answers": list(trajectory.answer) if isinstance(trajectory.answer, tuple) else None,
        "meta": meta,
        "decoding": _decoding_cell(record.get("decoding")),
    }


def _decoding_cell(decoding: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a record has under `decoding`, with log-probabilities that are numbers: a column has one type."""
    if decoding is None or decoding.get("logprobs") is None:
        return decoding
    chances = [None if chance is None else float(chance) for chance in decoding["logprobs"]]
    return {**decoding, "logprobs": chances}


def _to_cell(image: Image | None) -> dict[str, Any] | None:
    """A picture as the Image feature stores it."""
    if image is None:
        return None
    source = image.source
    if is_file(image):
        return {"path": str(file_of(image).absolute()), "bytes": None}
    if scheme_of(source) == "http":
        return {"path": str(source), "bytes": None}
    if isinstance(source, str) and source.partition(",")[0].endswith(";base64"):
        return {"path": None, "bytes": base64.b64decode(source.partition(",")[2])}
    return {"path": None, "bytes": png(image)}


def from_dataset(dataset: datasets.Dataset, *, check_files: bool = False) -> list[Trajectory]:
    """The trajectories of a dataset made by `to_dataset`, or of another in the chat or the reference form.

    Pictures stay in the dataset until they are used.

    Args:
        dataset: the dataset (one split).
        check_files: also decode every picture now.

    Raises:
        MirageError: a row has a fault, or there are no rows.
    """
    return collect(scan_dataset(dataset, "the dataset", check_files=check_files, plain=None), None)


def scan_dataset(
    dataset: datasets.Dataset, name: str, *, check_files: bool, plain: PlainReader | None
) -> Iterator[Scanned]:
    """Every row of a dataset with its faults.

    Args:
        dataset: the dataset (one split).
        name: what places are named after: `name[row]`, counted from 0 as datasets does.
        check_files: also decode every picture.
        plain: reads plain VSP maps; None counts them as faults.
    """
    table = dataset.with_format("arrow")  # as stored: pictures as bytes, not decoded
    for row in range(len(dataset)):
        (cells,) = table[row : row + 1].to_pylist()
        record = _from_row(cells, dataset, row)
        yield examine(record, f"{name}[{row}]", base=None, check_files=check_files, plain=plain)


def _from_row(cells: dict[str, Any], dataset: datasets.Dataset, row: int) -> dict[str, Any]:
    """The row as a record of the chat or the reference form."""
    record = {key: _without_nulls(value) for key, value in cells.items() if value is not None}
    for column in ("images", "helpers"):
        pictures: Any = record.get(column)
        for index, cell in enumerate(pictures if isinstance(pictures, list) else []):
            if isinstance(cell, Mapping) and cell.get("bytes"):
                pictures[index] = StoredPicture(dataset, row, column, index)
    if "answer" not in record and isinstance(record.get("answers"), list) and record["answers"]:
        record["answer"] = record.pop("answers")
    if isinstance(record.get("meta"), str):
        with suppress(ValueError):  # stays a string, which is reported as a fault
            record["meta"] = json.loads(record["meta"])
    return record


def _without_nulls(value: Any) -> Any:
    """Without the keys that Arrow adds to make all rows alike."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def load_dataset_dir(path: str | Path, *, check_files: bool = False) -> list[Trajectory]:
    """The trajectories of a dataset folder written by `save_dataset_dir` or `Dataset.save_to_disk`.

    Args:
        path: the folder of one split.
        check_files: also decode every picture now.

    Raises:
        MirageError: it is no such folder, a row has a fault, or there are no rows.
    """
    dataset = open_dataset_dir(Path(path))
    return collect(scan_dataset(dataset, str(path), check_files=check_files, plain=None), Path(path))


def open_dataset_dir(path: Path) -> datasets.Dataset:
    """The dataset in a folder.

    Raises:
        MirageError: it is none, is damaged, or has several splits.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as fault:
        hint = "holds no dataset; expected a JSONL file or a folder written by `save_to_disk`"
        raise MirageError(f"{path}: {hint}") from fault
    except Exception as fault:  # pyarrow and datasets raise all kinds at damaged files
        reason = " ".join(str(fault).split()) or type(fault).__name__
        raise MirageError(f"{path}: cannot be read as a dataset: {reason}") from fault
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(f"{path}/{name}" for name in dataset)
        raise MirageError(f"{path}: has several splits; give the folder of one ({splits})")
    return dataset


def save_dataset_dir(path: str | Path, trajectories: Iterable[Trajectory]) -> int:
    """Write trajectories as a dataset folder with all their pictures inside, whole or not at all.

    Args:
        path: the folder; it must not exist yet.
        trajectories: what to write, in order.

    Returns:
        How many were written.

    Raises:
        MirageError: the folder exists or cannot be written, or a picture cannot be read.
    """
    import datasets

    path = Path(path)
    if path.exists():
        raise MirageError(f"{path}: exists already; remove it or choose another folder")
    dataset = to_dataset(trajectories)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_to_disk(str(temporary))
        os.replace(temporary, path)
    except OSError as fault:
        raise MirageError(f"cannot write {path}: {fault}") from fault
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not bars:
            datasets.enable_progress_bars()
    return len(dataset)

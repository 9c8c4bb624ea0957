"""Records of any form: which one it is, its faults, its trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import chat, chat_faults, others, reference
from mirage_vlm.formats.faults import Fault, Faults, summary
from mirage_vlm.trajectory import Trajectory

Format = Literal["chat", "reference", "vsp", "conversations", "prompt"]

_KEYS: tuple[tuple[tuple[str, ...], Format], ...] = (
    (("messages",), "chat"),
    (("text_input", "text_output", "sequence_plan"), "reference"),
    (("conversations",), "conversations"),
    (("prompt", "completion"), "prompt"),
)
_OTHERS: dict[Format | None, Callable[[dict[str, Any]], others.InChatForm]] = {
    "conversations": others.from_conversations,
    "prompt": others.from_prompt,
}

PlainReader = Callable[[dict[str, Any]], Trajectory]
"""Reads a plain VSP map. Tasks are a floor above the formats, so whoever has one hands its reader in."""


@dataclass(frozen=True)
class Scanned:
    """One record of a data file, checked.

    Attributes:
        where: its place, such as `train.jsonl:3`.
        trajectory: what it describes; None where it has a fault.
        faults: all its faults.
    """

    where: str
    trajectory: Trajectory | None
    faults: tuple[Fault, ...] = ()


def detect_format(record: Any) -> Format | None:
    """The form of a record, or None if unknown.

    `chat`, the reference implementation's (and ILVR's), a plain VSP map, ShareGPT's `conversations`, or TRL's `prompt`.
    """
    if not isinstance(record, dict):
        return None
    for keys, form in _KEYS:
        if any(record.get(key) is not None for key in keys):  # null counts as absent
            return form
    if "map" in record and ("level" in record or "steps" in record or "plan" in record):
        return "vsp"
    return None


def faults(record: Any, *, base: Path | None = None, check_files: bool = True) -> Iterator[Fault]:
    """Every fault of a record in any form but plain VSP maps. Whether its task exists is not looked at.

    Args:
        record: the object, as parsed from JSON.
        base: the folder at which relative image paths start; None is the working directory.
        check_files: also open and decode every picture that is not an http(s) URL.
    """
    form = detect_format(record)
    if form == "reference":
        yield from reference.faults(record, base=base, check_files=check_files)
    elif form == "vsp":
        yield Fault("messages", "is missing; this is a plain VSP map, which is read only for evaluation")
    elif form is None and isinstance(record, dict):
        forms = "`messages`, `conversations`, `prompt` or, as the reference does, `text_input`"
        yield Fault("messages", f"is missing; an example has {forms}")
    elif form in _OTHERS:
        made = _OTHERS[form](record)
        yield from made.faults or map(made.renamed, chat_faults.faults(made.record, base=base, check_files=check_files))
    else:
        yield from chat_faults.faults(record, base=base, check_files=check_files)


def from_record(record: Any, *, base: Path | None = None, where: str = "") -> Trajectory:
    """The trajectory that a record in any form but plain VSP maps describes. Pictures are not opened.

    Args:
        record: the object, as parsed from JSON.
        base: the folder at which relative image paths start; None is the working directory.
        where: what the error message names as the place of the record, such as `train.jsonl:3`.

    Raises:
        MirageError: the record has a fault.
    """
    found = list(faults(record, base=base, check_files=False))
    if found:
        raise MirageError(summary([(where, fault) for fault in found]))
    return replace(_build(record, base), where=where or None)


def examine(
    record: Any, where: str, *, base: Path | None, check_files: bool, plain: PlainReader | None = None
) -> Scanned:
    """A record's trajectory or, without raising, its faults; arguments as for `faults` and `scan`."""
    if plain is not None and detect_format(record) == "vsp":
        try:
            return Scanned(where, replace(plain(record), where=where))
        except MirageError as fault:
            return Scanned(where, None, (Fault("", str(fault)),))
    found = tuple(faults(record, base=base, check_files=check_files))
    return Scanned(where, None, found) if found else Scanned(where, replace(_build(record, base), where=where))


def _build(record: Any, base: Path | None) -> Trajectory:
    """The trajectory of a record without faults."""
    form = detect_format(record)
    if form == "reference":
        record = reference.to_chat(record, base)
    elif form in _OTHERS:
        record = _OTHERS[form](record).record
    return chat.from_record(record, base)


def collect(examples: Iterable[Scanned], path: Path | None) -> list[Trajectory]:
    """The trajectories of a data file.

    Args:
        examples: its records.
        path: the file or folder; None for data that is in no file.

    Raises:
        MirageError: a record has a fault, or there are no records.
    """
    trajectories: list[Trajectory] = []
    found = Faults()
    for example in examples:
        for fault in example.faults:
            found.add(example.where, fault)
        if example.trajectory is not None:
            trajectories.append(example.trajectory)
    if found:
        hint = f"; run `mirage data check {path}`" if path is not None else ""
        raise MirageError(found.summary() + hint)
    if not trajectories:
        raise MirageError(f"{path or 'the data'}: holds no examples")
    return trajectories

"""Examples out of rows, as a mapping says."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.sources.cells import cell, pictures, text
from mirage_vlm.sources.mapping import Choices, Mapping
from mirage_vlm.sources.tables import Row, Table, open_tables, rows
from mirage_vlm.tasks.choices import CHOICE
from mirage_vlm.trajectory import Image, LatentSpan, Segment, Text, Trajectory, assistant_turn, user_turn

IN_PICTURE = "The choices {letters} are in the picture."


def load(mapping: Mapping, source: str | Path | None = None) -> Iterator[Trajectory]:
    """The examples of a data set, one after the other; pictures are decoded when they are drawn.

    Each example holds the encoded content of its own pictures, so a list of all of them needs the memory for that.

    Args:
        mapping: which column is what.
        source: a file, a folder, or the name of a dataset of the Hugging Face hub; None for the mapping's own.

    Raises:
        MirageError: the data cannot be opened, lacks a column (the message names it and those that there are), or no
            row is taken; and while it is read, a row has a fault, named with its file and row.
    """
    tables = open_tables(mapping, source)
    for table in tables:
        check_columns(mapping, table)
    return _examples(mapping, tables, str(source or mapping.dataset))


def check_columns(mapping: Mapping, table: Table) -> None:
    """Whether a table has all the columns.

    Raises:
        MirageError: it lacks one.
    """
    for name, key in mapping.columns().items():
        if name not in table.columns and ("." not in name or name.partition(".")[0] not in table.columns):
            there = ", ".join(map(str, table.columns)) or "none"
            raise MirageError(f"{table.name}: has no column {name!r} ({key}); there are: {there}")


def _examples(mapping: Mapping, tables: list[Table], name: str) -> Iterator[Trajectory]:
    found = False
    for row in rows(tables):
        if _taken(mapping, row):
            found = True
            yield example(mapping, row)
    if not found:
        asked = f" where {mapping.where}" if mapping.where else ""
        raise MirageError(f"{name}: has no rows{asked}")


def _taken(mapping: Mapping, row: Row) -> bool:
    for name, wanted in mapping.where.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if str(cell(row, name)) not in map(str, allowed):
            return False
    return True


def example(mapping: Mapping, row: Row) -> Trajectory:
    """The example of one row.

    Raises:
        MirageError: the row has a fault.
    """
    question = text(row, mapping.question)
    if mapping.remove:
        question = re.sub(mapping.remove, "", question)
    meta: dict[str, Any] = {"id": text(row, mapping.id) if mapping.id else str(row.number)}
    lines = [mapping.prefix, question.strip()]
    if mapping.choices is None:
        meta["answer"] = _open(row, mapping.answer.column)
        answer = meta["answer"] if isinstance(meta["answer"], str) else ", ".join(meta["answer"])
    else:
        choices, letter = _dealt(mapping, mapping.choices, row, question)
        meta |= {"choices": choices, "letter": letter}
        answer = letter
        if not any(choices.values()):
            lines.append(IN_PICTURE.format(letters=", ".join(choices)))
        elif not (mapping.choices.shown or mapping.choices.pattern):
            lines += [f"({name}) {words}" for name, words in choices.items()]
    lines.append(mapping.ending)
    if mapping.level:
        meta["level"] = _kept(row, mapping.level)
    meta |= {name: _kept(row, name) for name in mapping.keep}
    images = [image for column in mapping.images for image in pictures(row, column)]
    if mapping.images and not images:
        raise MirageError(f"{row.where}: has no picture in {', '.join(mapping.images)}")
    helpers = [image for column in mapping.helpers for image in pictures(row, column)]
    made = make(images, "\n".join(line for line in lines if line), helpers, answer, meta)
    return with_right_gold(made, f"{row.where}: {mapping.answer.column}")


def _kept(row: Row, column: str) -> Any:
    """A value for `meta`, which is written as JSON."""
    value = cell(row, column)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as fault:
        raise MirageError(f"{row.where}: {column}: {str(value)[:40]!r} cannot be kept in meta: {fault}") from fault
    return value


def with_right_gold(example: Trajectory, where: str) -> Trajectory:
    """The example itself, whose own response must be right: else no answer could be.

    Raises:
        MirageError: it is not; the message begins with `where`.
    """
    try:
        found = CHOICE.score(example)
    except MirageError as fault:
        raise MirageError(f"{where}: {fault}") from fault
    if not found.correct:
        raise MirageError(f"{where}: the right answer would not count as right: {found.verdict}")
    return example


def make(images: list[Image], question: str, helpers: list[Image], answer: str, meta: dict[str, Any]) -> Trajectory:
    """An example of the task `choice`: pictures, then the question; helper images, then the boxed answer."""
    response: tuple[Segment, ...] = (*map(LatentSpan, helpers), Text(rf"\boxed{{{answer}}}"))
    return Trajectory(
        messages=(user_turn(*images, question), assistant_turn(*response)), task=CHOICE.name, answer=answer, meta=meta
    )


def _open(row: Row, column: str) -> str | list[str]:
    value = cell(row, column)
    if isinstance(value, list) and value and all(isinstance(part, str) and part.strip() for part in value):
        return [part.strip() for part in value]
    answer = text(row, column).strip()
    if not answer:
        raise MirageError(f"{row.where}: {column}: is empty")
    return answer


def _dealt(mapping: Mapping, choices: Choices, row: Row, question: str) -> tuple[dict[str, str], str]:
    """The text of each letter, and the right letter."""
    found = _choices(choices, row, question)
    letters = list(found)
    right = _right(mapping, row, found)
    if choices.shuffle:
        order = letters[:]
        random.Random(f"{question}/{row.number}").shuffle(order)  # the same in every run, and for every machine
        found, right = {new: found[old] for new, old in zip(letters, order, strict=True)}, letters[order.index(right)]
    return found, right


def _choices(choices: Choices, row: Row, question: str) -> dict[str, str]:
    if choices.pattern:
        whole = text(row, choices.column) if choices.column else question
        matches = list(re.finditer(choices.pattern, whole))
        found = {match[1].strip().upper(): match[2].strip() for match in matches}
        if len(found) < 2 or len(found) < len(matches):
            raise MirageError(f"{row.where}: choices.pattern: finds {len(matches)} choices in {whole[:80]!r}")
        return found
    if choices.columns:
        values = zip(choices.names, (cell(row, name) for name in choices.columns), strict=False)
        found = {letter: str(value).strip() for letter, value in values if value is not None and str(value).strip()}
    else:
        listed = cell(row, choices.column) if choices.column else None
        if listed is None and choices.letters:
            return dict.fromkeys(choices.letters, "")
        if not isinstance(listed, list) or any(value is None for value in listed):
            raise MirageError(f"{row.where}: {choices.column}: must be a list of texts, not {str(listed)[:60]!r}")
        if len(listed) > (most := len(choices.names)):
            raise MirageError(f"{row.where}: {choices.column}: has {len(listed)} choices, but there are {most} letters")
        found = {letter: str(value).strip() for letter, value in zip(choices.names, listed, strict=False)}
    if len(found) < 2:
        raise MirageError(f"{row.where}: has {len(found)} choices")
    return found


def _right(mapping: Mapping, row: Row, choices: dict[str, str]) -> str:
    """The right letter.

    Raises:
        MirageError: the row does not say, or names none of the choices.
    """
    column = mapping.answer.column
    said = text(row, column).strip()

    def fail(problem: str) -> MirageError:
        return MirageError(f"{row.where}: {column}: {said[:40]!r} {problem} ({', '.join(choices)})")

    if mapping.kind == "letter":
        letter = said.strip("()[].: ").upper()
        if letter not in choices:
            raise fail("is none of the letters")
        return letter
    if mapping.kind == "text":
        same = [letter for letter, words in choices.items() if words.casefold() == said.casefold()]
        if len(same) != 1:
            raise fail("is the text of none of the choices" if not same else f"is the text of {' and '.join(same)}")
        return same[0]
    try:
        place = int(float(said)) - (mapping.kind == "number")
    except (ValueError, OverflowError):
        raise fail("is not a whole number") from None
    # of several columns the place counts those, too, that are empty in this row
    letters = mapping.choices.names if mapping.choices and mapping.choices.columns else tuple(choices)
    if float(said) != int(float(said)) or not 0 <= place < len(letters) or letters[place] not in choices:
        raise fail("is the number of none of the choices")
    return letters[place]

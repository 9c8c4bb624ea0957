"""Which column of somebody's data is what: a small YAML, checked as it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase

from mirage_vlm.errors import MirageError
from mirage_vlm.settings import Where, read_settings

KINDS = ("letter", "index", "number", "text", "open")
IN_BOX = "Answer with the letter of the right choice in \\boxed{}."
OPEN_IN_BOX = "Answer in \\boxed{}."
ROW = "row"  # what a template may name beside columns: the number of the row, from 1
_NAMES = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Choices:
    r"""Where the choices are: one of `column`, `columns`, `pattern` and, for choices in the picture, `letters` alone.

    Attributes:
        column: a column with a list of texts; with `pattern`, a column with one text that holds them all.
        columns: several columns with a text each; those that are empty in a row are left out.
        pattern: a regular expression with two groups, letter and text, found again and again in `column` or, without
            one, in the question.
        letters: what the choices are called, in order. Where a row has no list, these are in the picture.
        shuffle: deal them anew, the same for every run: for data that has the right one always at the same place.
        shown: the question shows them already, so they are not written below it; always so with a pattern.
    """

    column: str | None = None
    columns: tuple[str, ...] = ()
    pattern: str | None = None
    letters: tuple[str, ...] = ()
    shuffle: bool = False
    shown: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The letters, A to Z where none are named."""
        return self.letters or tuple(ascii_uppercase)


@dataclass(frozen=True)
class Answer:
    """Where the right answer is.

    Attributes:
        column: its column.
        kind: how it is given: the `letter` of a choice, its `index` from 0 or `number` from 1, its `text`, or, without
            choices, `open`: a text (or a list of texts, of which all must be given, in any order). By default `letter`
            with choices and `open` without.
    """

    column: str
    kind: str | None = None


@dataclass(frozen=True)
class Mapping:
    r"""How the rows of a data set become examples.

    A column may be a path into nested data (`plan.picture`), through lists too. `question`, `images`, `helpers` and
    `id` may also be a template with columns in braces (`photos/{number}.jpg`), in which `{row}` is the row's number
    from 1. Attributes whose default says nothing may be left out.

    Attributes:
        question: the question.
        answer: the right answer.
        images: the pictures, in the order in which they are shown; empty cells are left out, lists are many.
        helpers: the helper images: in the response a latent span each, before the answer.
        choices: None where the answer is open.
        id: of a row; by default its number.
        level: what results are broken down by.
        keep: columns to keep in `meta`.
        where: of each column named the value (or a list of values) that a row must have to be taken.
        remove: a regular expression; what it finds is taken out of the question.
        prefix: put before the question.
        suffix: put after the question and its choices; by default it asks for the answer in a box.
        dataset: the hub name, where none is given.
        config: the subset.
        configs: the subsets there are, where one must be named.
        split: the split.
        file: which files of a local folder to read, as a glob in which `{split}` and `{config}` stand for those.
        download: the repository to download as files, for data that is not a dataset by itself.
    """

    question: str
    answer: Answer
    images: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()
    choices: Choices | None = None
    id: str | None = None
    level: str | None = None
    keep: tuple[str, ...] = ()
    where: dict = field(default_factory=dict)  # bare, since settings read it as it stands
    remove: str | None = None
    prefix: str = ""
    suffix: str | None = None
    dataset: str | None = None
    config: str | None = None
    configs: tuple[str, ...] = ()
    split: str | None = None
    file: str | None = None
    download: str | None = None

    @property
    def kind(self) -> str:
        """How the answer is given."""
        return self.answer.kind or ("open" if self.choices is None else "letter")

    @property
    def ending(self) -> str:
        """What is put after the question."""
        return self.suffix if self.suffix is not None else (OPEN_IN_BOX if self.choices is None else IN_BOX)

    def columns(self) -> dict[str, str]:
        """The columns that must be there, each under the field that names it."""
        found: dict[str, str] = {}
        for key, values in (("question", (self.question,)), ("images", self.images), ("helpers", self.helpers)):
            for i, value in enumerate(values):
                place = key if key == "question" else f"{key}[{i}]"
                found |= {name: place for name in names_in(value)}
        found[self.answer.column] = "answer.column"
        if self.choices is not None:
            found |= {self.choices.column: "choices.column"} if self.choices.column else {}
            found |= {name: f"choices.columns[{i}]" for i, name in enumerate(self.choices.columns)}
        for key, single in (("id", self.id), ("level", self.level)):
            found |= {name: key for name in names_in(single)} if single else {}
        found |= {name: f"keep[{i}]" for i, name in enumerate(self.keep)}
        found |= {str(name): f"where.{name}" for name in self.where}
        return found


def is_template(value: str) -> bool:
    """Whether a value is a template, not the name of a column."""
    return _NAMES.search(value) is not None


def names_in(value: str) -> list[str]:
    """The columns that a column's name or a template stands for."""
    return [name for name in _NAMES.findall(value) if name != ROW] if is_template(value) else [value]


def fill(template: str, values: dict[str, str]) -> str:
    """A template with its values."""
    return _NAMES.sub(lambda name: values[name[1]], template)


def read_mapping(path: str | Path, split: str | None = None, config: str | None = None) -> Mapping:
    """Read a mapping.

    Args:
        path: the YAML file.
        split: in place of the file's own.
        config: likewise.

    Raises:
        MirageError: the file cannot be read, or a key or value is wrong; the message names file, line and key.
    """
    mapping, where = read_settings(Mapping, path, what="the mapping")
    # as they stand, not as YAML: a split called 2024 is no number
    mapping = replace(
        mapping,
        split=mapping.split if split is None else split,
        config=mapping.config if config is None else config,
    )
    _check(mapping, where)
    return mapping


def _check(mapping: Mapping, where: Where) -> None:
    def fail(key: str, message: str) -> None:
        raise MirageError(f"{where(key)}: {key}: {message}")

    choices, kind = mapping.choices, mapping.kind
    if kind not in KINDS:
        fail("answer.kind", f"must be one of {', '.join(KINDS)}, not {kind!r}")
    if choices is None and kind != "open":
        fail("answer.kind", f"{kind!r} needs choices")
    if choices is not None:
        if kind == "open":
            fail("answer.kind", "'open' has no choices")
        if bool(choices.columns) + bool(choices.column or choices.pattern) > 1:
            fail("choices", "name one list (column), several columns, or a pattern, not more than one of them")
        if not (choices.columns or choices.column or choices.pattern or choices.letters):
            fail("choices", "name a column with a list, several columns, a pattern, or the letters in the picture")
        if choices.shuffle and (choices.pattern or choices.shown):
            fail("choices.shuffle", "choices that the question shows cannot be dealt anew")
        if choices.shuffle and kind == "letter":
            fail("choices.shuffle", "the answer must then be an index, a number or a text")
        if choices.columns and len(choices.columns) > len(choices.names):
            fail("choices.letters", f"there are {len(choices.columns)} columns, but {len(choices.names)} letters")
    for key, pattern, groups in (("remove", mapping.remove, 0), ("choices.pattern", choices and choices.pattern, 2)):
        try:
            found = re.compile(pattern).groups if pattern else groups
        except re.error as fault:
            fail(key, f"is not a regular expression: {fault}")
        if found < groups:
            fail(key, "must have two groups: the letter and the text of a choice")
    if mapping.config is not None and mapping.configs and mapping.config not in mapping.configs:
        fail("config", f"there is no {mapping.config!r}; choose from {', '.join(mapping.configs)}")
    for name, value in mapping.where.items():
        if not isinstance(value, str | int | float | bool | list):
            fail(f"where.{name}", f"must be a value or a list of values, not {value!r}")

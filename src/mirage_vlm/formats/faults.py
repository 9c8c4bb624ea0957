"""What a check of a data file reports."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

FEW = 3  # faults of one kind that are still told one by one
_PLACE = re.compile(r"(.*?)(?::(\d+)|\[(\d+)\])")
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|[^\s:;,()]*[/.][^\s:;,()]*|\d[\d,]*")


@dataclass(frozen=True)
class Fault:
    """One fault of one record.

    Attributes:
        field: path of the value, such as `messages[1].content[0].helper`; empty for the whole record.
        message: what is wrong with it, and what to do.
    """

    field: str
    message: str

    def __str__(self) -> str:
        return one_line(f"{self.field}: {self.message}" if self.field else self.message)

    @property
    def kind(self) -> str:
        """What faults that differ in places, numbers, names and paths alone have in common."""
        return f"{re.sub(r'[0-9]+', '', self.field)}: {_VARYING.sub('…', self.message)}"


@dataclass
class Kind:
    """The faults of one kind: the first ones, and how many records have one.

    Attributes:
        first: the place and the fault, of the first few.
        places: the number of records.
        faults: the number of faults.
        alike: all say the same.
    """

    first: list[tuple[str, Fault]] = field(default_factory=list)
    places: int = 0
    faults: int = 0
    alike: bool = True
    last: str = ""

    def add(self, where: str, fault: Fault) -> None:
        """Count one more."""
        self.alike = self.alike and (not self.first or self.first[0][1] == fault)
        self.faults += 1
        self.places += where != self.last or not self.first
        self.last = where
        if len(self.first) < FEW:
            self.first.append((where, fault))

    @property
    def many(self) -> bool:
        """Whether they are told in one line."""
        return self.places >= FEW

    def lines(self) -> Iterator[str]:
        """One line for each fault where they are few, otherwise one for all."""
        if not self.many:
            yield from (placed(where, fault) for where, fault in self.first)
            if (more := self.faults - len(self.first)) > 0:
                yield f"{self.first[0][0]}: … and {more} more like these"
            return
        where, fault = self.first[0]
        match = _PLACE.fullmatch(where)
        path, number = (match[1], match[2] or match[3]) if match else ("", where)
        unit = "rows" if match and match[3] else "lines"
        like = "" if self.alike else " and the like"
        said = f"{str(fault).rstrip('.')},{like} in {self.places:,} {unit}, first {number}"
        yield f"{path}: {said}" if path else said


class Faults:
    """Many faults, counted by kind, so that a thousand alike are one line.

    Of a large file nothing is kept but the kinds.
    """

    def __init__(self, found: Iterable[tuple[str, Fault]] = ()) -> None:
        self.kinds: dict[str, Kind] = {}
        self.total = 0
        for where, fault in found:
            self.add(where, fault)

    def __len__(self) -> int:
        return self.total

    def add(self, where: str, fault: Fault) -> None:
        """Count one fault of the record at `where` (`train.jsonl:3`)."""
        self.total += 1
        self.kinds.setdefault(fault.kind, Kind()).add(where, fault)

    def lines(self, most: int = 50) -> Iterator[str]:
        """A line for each kind, or for each of a kind's few faults; after about `most` lines only how many are left."""
        count = told = 0
        for kind in self.kinds.values():
            if count >= most:
                rest = self.total - told
                yield f"… and {rest:,} more {'fault' if rest == 1 else 'faults'}, of other kinds"
                return
            for line in kind.lines():
                count += 1
                yield line
            told += kind.faults

    def summary(self) -> str:
        """One line for all: the first kind, and how many faults there are besides."""
        kind = next(iter(self.kinds.values()))
        line = next(iter(kind.lines()))
        told = kind.faults if kind.many else 1
        more = self.total - told
        return f"{line} (and {more} more {'fault' if more == 1 else 'faults'})" if more else line


def placed(where: str, fault: Fault) -> str:
    """A fault with its place."""
    return f"{where}: {fault}" if where else str(fault)


def summary(faults: list[tuple[str, Fault]]) -> str:
    """One line for many faults, each with its place: the first of them, and how many more there are."""
    return Faults(faults).summary()


def one_line(text: str) -> str:
    """A text with what would break a line, or could not be written, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """A value as an error message shows it: on one line and short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def text_fault(value: object) -> str | None:
    """What is wrong with a value that should be text; None where nothing is."""
    if not isinstance(value, str):
        return f"must be a string, not {shown(value)}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character; write the character itself"
    return None

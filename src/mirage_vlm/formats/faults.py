"""What a check of a data file reports."""

from __future__ import annotations

from dataclasses import dataclass


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
        return f"{self.field}: {self.message}" if self.field else self.message


def summary(faults: list[tuple[str, Fault]]) -> str:
    """One line for many faults, each with its place: the first of them, and how many more there are."""
    (where, fault), more = faults[0], len(faults) - 1
    line = f"{where}: {fault}" if where else str(fault)
    return f"{line} (and {more} more {'fault' if more == 1 else 'faults'})" if more else line


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

"""Reading an answer that is one of several choices, by rules that are written down and nowhere lenient in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mirage_vlm.tasks.base import boxed

_SIGNS = re.compile(r"[\s.:;,()\[\]*]+")


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        letter: None where nothing, or more than one thing, was.
        reason: why not, in a few words; empty where a letter was read.
    """

    letter: str | None
    reason: str = ""


def read_choice(text: str, choices: Mapping[str, str]) -> Choice:
    r"""The letter of a response.

    What the last `\boxed{}` holds counts, or the whole response if it has none and is nothing but an answer. It is one
    choice if it is a letter (`B`, `(b)`, `B.`), the text of a choice, or both together (`B: in a hole`); letters and
    texts are compared without case, spaces and punctuation. Two letters, a letter with the text of another choice, or
    a text that two choices share, are ambiguous, and so is anything else that is not one choice: wrong, and said so.

    Args:
        choices: the text of each letter; it may be empty.
    """
    content = boxed(text)
    if content is None:
        if r"\boxed" in text:
            return Choice(None, r"\boxed{} is not closed")
        content = text
    said = _bare(content)
    if not said:
        return Choice(None, "no answer")
    found = set()
    for letter, words in choices.items():
        forms = {_bare(letter)}
        if _bare(words):
            forms |= {_bare(words), _bare(f"{letter} {words}")}
        if said in forms:
            found.add(letter)
    if len(found) == 1:
        return Choice(found.pop())
    if found:
        return Choice(None, f"{content.strip()[:40]!r} is {' and '.join(sorted(found))}")
    return Choice(None, f"{content.strip()[:40]!r} is not one choice")


def _bare(text: str) -> str:
    return " ".join(_SIGNS.sub(" ", text).split()).casefold()

"""Questions with choices or a short answer, read by rules that are written down and nowhere lenient in silence.

Real benchmarks are of this task: `mirage_vlm.sources` reads them.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import Fault
from mirage_vlm.tasks.base import STEP_BY_STEP, Score, Task, boxed
from mirage_vlm.trajectory import Image, Message, Text, Trajectory, user_turn

MOST_DIGITS = 300  # an answer longer than this is no number

_SIGNS = re.compile(r"[\s.:;,()\[\]*]+")
_DEGREES = re.compile(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})|\s*\\degree")
# digits behind a leading zero are no number: 012 is not 12
_NUMBER = (
    r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?"
    r"|[+-]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?|[+-]?\d+/[1-9]\d*"
)
_AMOUNT = re.compile(rf"({_NUMBER})\s*((?:[%°€£¥]|[^\W\d_]).*)?", re.IGNORECASE)  # a number, and its unit
_MATH = re.compile(r"\\[()\[\]]|\$")  # the marks around a formula
_AROUND = " \t\r\n.;:,()[]*\"'`"


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
    texts are compared without case, spaces and punctuation. A letter alone is the letter, even if it is the text of
    another choice. Two letters, a letter with the text of another choice, or a text that two choices share, are
    ambiguous, and so is anything else that is not one choice: wrong, and said so.

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
    found = {letter for letter in choices if said == _bare(letter)} or {
        letter
        for letter, words in choices.items()
        if _bare(words) and said in (_bare(words), _bare(f"{letter} {words}"))
    }
    if len(found) == 1:
        return Choice(found.pop())
    if found:
        return Choice(None, f"{content.strip()[:40]!r} is {' and '.join(sorted(found))}")
    return Choice(None, f"{content.strip()[:40]!r} is not one choice")


def _bare(text: str) -> str:
    return " ".join(_SIGNS.sub(" ", text).split()).casefold()


class Choose(Task):
    r"""`choice`: any question whose right answer is known, with or without choices.

    `meta` has `choices`, the text of each letter (empty where the choices are in the picture), and the right `letter`;
    or `answer`, a text, or a list of texts that must all be given, in any order. With neither, any of the example's own
    accepted answers is right.
    """

    name = "choice"
    needs = ("question",)
    sizes = range(1, 2)
    usual = (1,)

    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        """There is nothing to make them of.

        Raises:
            MirageError: always.
        """
        raise MirageError("choice has no generator: its questions come from data (`mirage data import`, then --data)")

    def key(self, trajectory: Trajectory) -> str:
        """The question with all that is known of it."""
        texts = [s.text for message in trajectory.prompt for s in message.segments if isinstance(s, Text)]
        return json.dumps([texts, trajectory.meta], sort_keys=True)

    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        """The prompt; it needs the detail `question`, which names the choices and how to answer."""
        self.check_style(style)
        question = str(details.get("question", "")).strip()
        if not question:
            raise MirageError(f"{self.name} needs a question")
        return (user_turn(image, question + (STEP_BY_STEP if style == "cot" else "")),)

    def score(self, trajectory: Trajectory) -> Score:
        """By the letter or the answer of `meta`, with `read_choice` or `same_answer`; else by any of `answer`.

        Raises:
            MirageError: the first of `faults`.
        """
        for fault in self.faults(trajectory):
            where, _, name = fault.field.rpartition(".")
            raise MirageError(f'cannot score: "{name}"{" in meta" if where else ""} {fault.message}')
        meta = trajectory.meta
        if "choices" in meta:
            return score_letter(trajectory.text, dict(meta["choices"]), meta["letter"])
        if "answer" in meta:
            return _score_answer(trajectory.text, meta["answer"])
        scores = [_score_answer(trajectory.text, answer) for answer in trajectory.answers]
        return next((score for score in scores if score.correct), scores[0])

    def faults(self, trajectory: Trajectory) -> Iterator[Fault]:
        """What is missing, or not as `score` reads it."""
        meta = trajectory.meta
        if "choices" in meta:
            yield from _choices_faults(meta["choices"], meta.get("letter"))
        elif "answer" in meta:
            truth = meta["answer"]
            known = [truth] if isinstance(truth, str) else truth
            if not isinstance(known, list) or not known or not all(isinstance(p, str) and p.strip() for p in known):
                yield Fault("meta.answer", f"must be a text or a list of texts, not {truth!r:.200}")
        elif not trajectory.answers:
            yield Fault("answer", 'is missing, and meta has neither "choices" with a "letter" nor "answer"')
        elif not all(answer.strip() for answer in trajectory.answers):
            yield Fault("answer", "is empty")


def _choices_faults(choices: Any, letter: Any) -> Iterator[Fault]:
    if not isinstance(choices, Mapping) or not all(isinstance(words, str) for words in choices.values()):
        hint = ' such as {"A": "left", "B": "right"}' if isinstance(choices, list) else ""
        yield Fault("meta.choices", f"must be an object of texts{hint}, not {choices!r:.200}")
    elif not isinstance(letter, str) or letter not in choices:
        yield Fault(
            "meta.letter", f"is {letter!r:.40}, which is none of {', '.join(map(str, choices)) or 'the choices'}"
        )


def score_letter(
    text: str,
    choices: Mapping[str, str],
    truth: str,
    said: Callable[[str], str] = str,
    right: Callable[[str], str] = str,
) -> Score:
    """By the letter that `read_choice` reads.

    Args:
        said, right: how the verdict calls the letter that was chosen, and that which is right.
    """
    choice = read_choice(text, choices)
    if choice.letter is None:
        return Score(False, False, None, choice.reason)
    if choice.letter == truth:
        return Score(True, True, None, f"{said(truth)} is right")
    return Score(False, True, None, f"{said(choice.letter)} is wrong: it is {right(truth)}")


def _score_answer(text: str, truth: str | Sequence[str]) -> Score:
    content = boxed(text)
    if content is None and r"\boxed" in text:
        return Score(False, False, None, r"\boxed{} is not closed")
    content = (text if content is None else content).strip()
    if not content.strip(_AROUND):
        return Score(False, False, None, "no answer")
    known = truth if isinstance(truth, str) else " ".join(truth)
    if same_answer(content, truth):
        return Score(True, True, None, f"{content[:40]!r} is right")
    return Score(False, True, None, f"{content[:40]!r} is wrong: it is {known[:40]!r}")


def same_answer(given: str, truth: str | Sequence[str]) -> bool:
    r"""Whether two answers say the same.

    Two numbers are the same if their values are (`0.5`, `.50`, `1/2`, `\frac{1}{2}`; `1,000` and `1000`); a unit or a
    percent sign must be there in both or in neither, with a space before it or without. Other texts are compared
    without case, without the spaces and punctuation around them, and without the marks around formulas.

    Args:
        given: what was answered.
        truth: what is right; of a list, all parts must be given, in any order, with commas, semicolons or `and`
            between, or also with spaces if no part has one inside.
    """
    if isinstance(truth, str):
        return _plain_answer(given) == _plain_answer(truth)
    known = {_plain_answer(part) for part in truth}
    return any({_plain_answer(part) for part in parts} == known for parts in _lists(given, truth))


def _lists(given: str, truth: Sequence[str]) -> Iterator[list[str]]:
    """The ways to read an answer as a list: `1,000` may be one number or two, and `50 %` one part or none."""
    whole = _MATH.sub(" ", given).strip(_AROUND)
    spaces = ("",) if any(len(part.split()) > 1 for part in truth) else ("", r"|\s+")
    for comma, space in itertools.product((",", r",(?!\d{3})"), spaces):
        parts = re.split(rf"\s*(?:{comma}|;)\s*(?:and\s+)?|\s+and\s+{space}", whole)
        yield [part for part in parts if part.strip(_AROUND)]


def _plain_answer(text: str) -> tuple[Fraction | None, str]:
    """A number as its value and its unit, anything else as a text that is alike for all ways to write it."""
    plain = _DEGREES.sub("°", _MATH.sub(" ", text))
    plain = re.sub(r"\\d?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2", plain).replace("\u2212", "-")
    plain = " ".join(plain.split())
    # a point before a digit is not around a number but of it
    bare = plain.strip(_AROUND) if not re.search(r"(?<!\d)\.\d", plain) else plain.lstrip(" ([*\"'`").rstrip(_AROUND)
    amount = _AMOUNT.fullmatch(bare) if len(bare) <= MOST_DIGITS else None
    if amount is None:
        return None, bare.casefold()
    return Fraction(amount[1].replace(",", "")), (amount[2] or "").casefold()


CHOICE = Choose()

"""When a written reasoning text is accepted.

A text is taken apart at the mark, which stands for the helper image, and at its final `\\boxed{}`. What speaks against
it is said in whole sentences, since it goes back to the model that wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import text_fault
from mirage_vlm.tasks import Task, get_task, task_names
from mirage_vlm.tasks.base import boxed, find_boxed
from mirage_vlm.trajectory import LatentSpan, Segment, Text, Trajectory

Check = Callable[[str], str | None]
"""Says what is wrong with the content of the final box; None where it is right."""

_PICTURES = r"(?:image|picture|photo|photograph|screenshot)s?"
_DRAWN = r"(?:image|picture|photo|photograph|screenshot|figure|diagram|drawing|illustration|map|version|view|overlay)s?"
_GIVEN = r"(?:given|provided|supplied|attached|included|accompanying)"
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

# What a reader who has the prompt alone cannot know of, whatever the number of its pictures.
UNSEEN = (
    r"\bhelper\b",
    rf"\b(?:auxiliary|hint|solution|solved|annotated|marked|marked-up|labell?ed|overlaid|reference|answer|"
    rf"ground[- ]truth|intermediate|supplementary) {_DRAWN}\b",
    rf"\b(?:additional|extra|attached|accompanying|supplied|edited|modified|updated) {_PICTURES}\b",
    r"\bas (?:is |can be )?(?:shown|drawn|marked|indicated|highlighted|depicted|illustrated|seen|given) "
    r"(?:in|on|by|with) (?:the |an? )?(?:solution|answer|annotat\w+|hint|overlay|highlight\w*)\b",
    rf"\b(?:{_GIVEN}|known|reference|official|ground[- ]truth) (?:answer|solution|result)\b",
    r"\b(?:answer|solution) (?:key|(?:is|was|has been) (?:given|provided|supplied|told|known))\b",
    r"\b(?:i|we|you) (?:am|are|was|were|have been|had been) (?:told|given|shown) (?:that )?(?:the |an? )?"
    r"(?:answer|solution|hint)\b",
    r"\baccording to the (?:answer|solution|hint)\b",
)

# What ends a thought that is the writer's own and no part of the text; some servers leave out where it begins.
_OWN_THOUGHT = re.compile(r"\A(?:\s*<think>)?(?:(?!<think>).)*?</think>", re.DOTALL)
_SPECIAL = re.compile(r"<\|[^<>|]*\|>|</?think>|<image>|<output_image>")
_AFTER_BOX = " \t\r\n.$*"  # what may follow the box, and is left out


@dataclass(frozen=True)
class Rules:
    """What a text must be like.

    Attributes:
        mark: stands for the helper image in the text, once.
        max_words: most words, the mark and the box left out.
        min_words: fewest words, counted alike.
        forbid: regular expressions, found whatever the case, of which none may occur; added to the built-in ones.

    Raises:
        MirageError: a rule cannot be kept.
    """

    mark: str = "<helper/>"
    max_words: int = 300
    min_words: int = 8
    forbid: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.search(r"\w", self.mark) or self.mark != self.mark.strip() or "\n" in self.mark:
            raise MirageError(f"--mark must have a letter and no space around it, such as <helper/>, not {self.mark!r}")
        if "boxed" in self.mark or _SPECIAL.search(self.mark):
            raise MirageError(f"--mark: {self.mark!r} has a meaning of its own; choose another, such as <helper/>")
        if not 0 < self.min_words <= self.max_words:
            raise MirageError(f"--max-words must be at least {self.min_words}, not {self.max_words}")
        for pattern in self.forbid:
            try:
                re.compile(pattern)
            except re.error as fault:
                raise MirageError(f"--forbid: {pattern!r} is not a regular expression: {fault}") from fault


@dataclass(frozen=True)
class Written:
    """The parts of an accepted text: what comes before and after the helper image, and the content of the box."""

    before: str
    after: str
    answer: str

    def response(self, span: LatentSpan) -> tuple[Segment, ...]:
        """The response of a trajectory, with the span in its place."""
        return Text(f"<think>{self.before}"), span, Text(rf"{self.after}</think>\boxed{{{self.answer}}}")


def answer_check(example: Trajectory) -> Check:
    r"""How the final answer to an example is judged.

    By the checker of its task where `get_task` knows that and `meta` has what it needs: right, and as short as can be
    where that has a meaning. Otherwise the box must hold `answer`, whatever the case and the length of white space.

    Raises:
        MirageError: the example has no answer, none that fits in `\boxed{}`, or one that its own checker calls wrong.
    """
    known = _answer_of(example)
    if not known.strip():
        raise MirageError("answer: is missing")
    reference = boxed(rf"\boxed{{{known}}}")
    if not reference or r"\boxed" in known:
        raise MirageError(rf"answer: {known!r} cannot stand in \boxed{{}}")

    def equal(content: str) -> str | None:
        right = _bare(content) in {_bare(reference), *map(_bare, example.answers)}
        return None if right else rf"the final answer \boxed{{{content}}} is wrong; it must be \boxed{{{reference}}}"

    task = _task_of(example)
    if task is None:
        return equal

    def checked(content: str) -> str | None:
        score = task.score(example.with_response((Text(rf"\boxed{{{content}}}"),)))
        if score.correct and score.optimal is not False:
            return None
        return rf"the final answer \boxed{{{content}}} is wrong: {score.verdict}"

    try:
        fault = checked(reference)
    except MirageError:  # which says that `meta` lacks something
        return equal
    if fault is not None:
        raise MirageError(f"answer: the checker of {task.name} does not take it: {fault}")
    return checked


def _answer_of(example: Trajectory) -> str:
    """The reference answer, of several the first."""
    return next(iter(example.answers), "")


def _task_of(example: Trajectory) -> Task | None:
    """The task, where it is one of the package or a user's own."""
    name = example.task
    return get_task(name) if name is not None and (":" in name or name in task_names()) else None


def judge(text: str, example: Trajectory, rules: Rules, check: Check) -> tuple[Written | None, list[str]]:
    """What a text comes to.

    Args:
        text: as the model wrote it; a thought of its own before it, up to `</think>`, is left out.
        example: what the text is for; its prompt tells how many pictures the reader has.
        rules: what the text must be like.
        check: `answer_check` of the example.

    Returns:
        The parts of the text, or None and all that speaks against it.
    """
    text = _without_thought(text, rules.mark).strip()
    if not text:
        return None, ["there is no text"]
    if (fault := text_fault(text)) is not None:
        return None, [f"the text {fault}"]
    faults = []
    body, content, rest = _at_box(text)
    if text.count(rules.mark) != 1:
        n = text.count(rules.mark)
        faults.append(f"the mark {rules.mark} must stand in the text exactly once, but it stands there {n} times")
    elif rules.mark not in body:
        faults.append(f"the mark {rules.mark} must stand before the final answer")
    if found := _near_mark(rules.mark).search(text.replace(rules.mark, "")):
        faults.append(f"{found.group()} is not the mark; it must be written exactly as {rules.mark}")
    if content is None:
        faults.append(r"the text does not end with the final answer in \boxed{}")
    elif rest.strip(_AFTER_BOX):
        faults.append(rf"nothing may follow the final \boxed{{}}, but {_short(rest)!r} does")
    if r"\boxed" in body:
        faults.append(r"there must be one \boxed{}, at the end")
    if found := _SPECIAL.search(text.replace(rules.mark, "")):
        faults.append(f"{found.group()} must not stand in the text")
    if content is not None and (wrong := check(content)) is not None:
        faults.append(wrong)
    words = len(body.replace(rules.mark, " ").split())
    if words > rules.max_words:
        faults.append(f"the text has {words} words, but may have {rules.max_words}")
    elif words < rules.min_words:
        faults.append(f"the text has {words} words, but a reasoning has at least {rules.min_words}")
    faults += [
        f"the text says {phrase!r}, of which the reader knows nothing" for phrase in phrases(body, example, rules)
    ]
    if faults or content is None:
        return None, faults
    before, _, after = body.partition(rules.mark)
    reference = boxed(rf"\boxed{{{_answer_of(example)}}}") or content
    answer = reference if _bare(content) == _bare(reference) else content
    return Written(before, after.rstrip(_AFTER_BOX.replace(".", "")), answer), []


def phrases(text: str, example: Trajectory, rules: Rules) -> Iterator[str]:
    """Each forbidden phrase of a text. What the question itself says may be said again, except by `rules.forbid`."""
    plain = " ".join(re.sub(r"[*_`\"“”]+", "", text.replace(rules.mark, " … ")).split())
    question = " ".join(
        segment.text for message in example.prompt for segment in message.segments if isinstance(segment, Text)
    )
    asked = " ".join(question.split()).casefold()
    for pattern in (*UNSEEN, *_numbered(sum(1 for _ in example.images()))):
        for found in re.finditer(pattern, plain, re.IGNORECASE):
            if found.group().casefold() not in asked:
                yield found.group()
                break
    for pattern in rules.forbid:
        if found_own := re.search(pattern, plain, re.IGNORECASE):
            yield found_own.group()


def _numbered(pictures: int) -> Iterator[str]:
    """What speaks of more pictures than the prompt has; of a single one, whatever counts them."""
    known = pictures if pictures > 1 else 0
    ordinals = [*_ORDINALS[known:], *(f"{i}(?:st|nd|rd|th)" for i in range(known + 1, 11))]
    yield rf"\b(?:{'|'.join(ordinals)}) {_PICTURES}\b"
    numbers = [*_NUMBERS[known:], *(f"{i}(?!\\d)" for i in range(known + 1, 11))]
    verb = "".join(rf"(?<!\b{word} )" for word in ("i", "we", "you", "to", "can", "me", "us"))  # I picture two moves
    yield rf"{verb}\b{_PICTURES} (?:(?:number|no\.?|nr\.?) )?#?(?:{'|'.join(numbers)})(?!\w)"
    if pictures < 2:
        yield rf"\b(?:final|last|next|new|previous) {_PICTURES}\b"
        many = "both|two|three|several|other|another|these|those|all"
        yield rf"\b(?:{many}) (?:of )?(?:the )?(?:{_GIVEN} )?{_PICTURES}\b"
        yield rf"\b(?:the|{_GIVEN}) (?:image|picture|photo|photograph|screenshot)s\b"
    if pictures == 0:
        yield rf"\b(?:the|this|that|{_GIVEN}) {_PICTURES}\b"


def _without_thought(text: str, mark: str) -> str:
    """The text after the writer's own thought; one that holds the mark, which the rest does not, is the text itself."""
    thought = _OWN_THOUGHT.match(text)
    if thought is None:
        return text
    rest = text[thought.end() :]
    if mark in thought.group() and mark not in rest:
        return thought.group().replace("<think>", "", 1).removesuffix("</think>") + rest
    return rest


def _at_box(text: str) -> tuple[str, str | None, str]:
    r"""What comes before the last `\boxed{}`, what it holds, and what comes after; None in it where there is none."""
    place = find_boxed(text)
    if place is None:
        return text, None, ""
    start, end = place
    return text[:start], boxed(text[start:end]), text[end:]


def _near_mark(mark: str) -> re.Pattern[str]:
    """The mark in another case, with spaces, as an opening or a closing tag."""
    name = r"\s*".join(map(re.escape, re.findall(r"\w+", mark)))
    return re.compile(rf"[<\[{{]\s*/?\s*{name}\s*/?\s*[>\]}}]", re.IGNORECASE)


def _bare(text: str) -> str:
    return " ".join(text.split()).casefold()


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:37] + "..."

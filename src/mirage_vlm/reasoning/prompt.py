"""The words that ask for a reasoning text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mirage_vlm.formats import embed
from mirage_vlm.reasoning.accept import Rules
from mirage_vlm.trajectory import Image, Text, Trajectory

PROMPT_VERSION = 1  # raise it with every change of the words below

SYSTEM = """\
You write reasoning texts from which another model, the reader, learns to think. The reader sees the question and its \
pictures, and nothing else. You also see the right answer and one more picture, which the reader is to have in mind at \
one point of its thoughts."""

INSTRUCTIONS = """\
Write the thoughts that lead the reader from the question to this answer.
- At the point where the reader should have the last picture in mind, write {mark} in place of that picture: exactly \
once, exactly like this. What comes before prepares it, what comes after uses it.
- Never speak of the last picture as something that was given, shown or numbered, and never say that the answer was \
known or given: the reader has neither.
- Check every step against the pictures. Plain sentences, no headings, no lists, at most {max_words} words.
- End with the answer in \\boxed{{}}, once, as the question asks for it. Nothing may follow it."""

AGAIN = """\
This text cannot be used:
{faults}
Write the whole text again, with nothing before or after it."""


def prompt_of(example: Trajectory, rules: Rules) -> list[dict[str, Any]]:
    """The messages that ask for a text: the question with its pictures, the answer, the helper image, what to do.

    Pictures are embedded as PNG; http(s) URLs are left to the endpoint to fetch.

    Raises:
        MirageError: a picture cannot be loaded.
    """
    parts: list[dict[str, Any]] = [_text("The question, as the reader sees it:")]
    for message in example.prompt:
        if len(example.prompt) > 1:
            parts.append(_text(f"({message.role})"))
        for segment in message.segments:
            if isinstance(segment, Text):
                parts.append(_text(segment.text))
            elif isinstance(segment, Image):
                parts.append(_picture(segment))
    helper = example.spans[0].helper
    assert helper is not None  # such lines are refused as they are read
    known = " or ".join(example.answers)
    parts += [_text(f"The right answer: {known}\n\nThe last picture, which the reader will not see:")]
    parts += [_picture(helper), _text(INSTRUCTIONS.format(mark=rules.mark, max_words=rules.max_words))]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}]


def correction(text: str, faults: Sequence[str]) -> list[dict[str, Any]]:
    """The messages that follow a text which cannot be used, and say why."""
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be sent
    said = [{"role": "assistant", "content": text}] if text.strip() else []
    again = AGAIN.format(faults="\n".join(f"- {fault}" for fault in faults))
    return [*said, {"role": "user", "content": again}]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _picture(image: Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": embed(image)}}

"""What lmms-eval asks of a task, for a line of our chat JSONL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image

from mirage_vlm.formats import from_record
from mirage_vlm.tasks import score
from mirage_vlm.trajectory import Image, Text, Trajectory, assistant_turn

FOLDER = Path("mazes")  # where the data file lies, and its paths start
AGAIN = "The same moves once more, please."


def example(doc: dict[str, Any]) -> Trajectory:
    """A row of `datasets`, in which null stands for what a part has not."""
    return from_record(doc, base=FOLDER)


def pictures(doc: dict[str, Any]) -> list[PIL.Image.Image]:
    """Those of the prompt."""
    return [segment.load() for segment in example(doc).messages[0].segments if isinstance(segment, Image)]


def text(doc: dict[str, Any]) -> str:
    """That of the prompt."""
    return "".join(segment.text for segment in example(doc).messages[0].segments if isinstance(segment, Text))


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompt in lmms-eval's chat form."""
    shown = [{"type": "image", "url": picture} for picture in pictures(doc)]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text(doc)}]}]


def right(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """By the checker of the example's own task, as `mirage eval` scores it."""
    prompt = example(doc)
    answered = replace(prompt, messages=(prompt.messages[0], assistant_turn(results[0])))
    return {"right": float(score(answered).correct)}


def rounds(
    doc: dict[str, Any],
    round_idx: int | None = None,
    previous_output: list[str] | None = None,
    previous_round_info: Any = None,
) -> Any:
    """The prompt; then what was answered, and a second question; then the end."""
    asked = messages(doc)
    if round_idx is None:
        return asked
    if round_idx == 2:
        return None, True, previous_output, None
    said = {"role": "assistant", "content": [{"type": "text", "text": previous_output[0]}]}
    again = {"role": "user", "content": [{"type": "text", "text": AGAIN}]}
    return [*asked, said, again], False, previous_output, None


def right_at_first(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """The score of the first round."""
    return right(doc, results[0])

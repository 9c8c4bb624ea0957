"""The data format of the reference implementation: one question, one response, pictures by path.

A record is `{"text_input", "image_input", "text_output", "image_output"}`, the images a path or a list of
paths; `map_desc` is optional. It is read as

- the prompt: the pictures of `image_input`, then `text_input`; where that says `<image>`, the pictures stand there;
- the response: `text_output`, with a latent span at each mark, its helper image the next of `image_output`.
  A mark is `<output_image>`, `<image>` or `<|latent_start|>…<|latent_end|>`; without marks the spans come
  first. Where both outputs are absent or empty there is a prompt alone, as in a test file.
- or the response: `sequence_plan` in the place of the two outputs, as ILVR's files have it: a list of
  `{"type": "text", "content"}` and `{"type": "latent", "helper_image"}`, text and spans as they follow.
- `map_desc` becomes `meta["map"]`: rows of letters, or of numbers (-1 a hole, 0 safe, 1 the start, 2 the goal).
  A prompt alone that has one, and neither task nor answer, is of the task `vsp-planning`.
- `task`, `answer` (for which ILVR says `original_final_answer`) and `meta` are read as in the chat form.

Relative paths start at the data file's folder or, where nothing is there, at the working directory, from
which the reference implementation opens them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import chat_faults
from mirage_vlm.formats.answers import write_answer
from mirage_vlm.formats.chat_faults import LATENT_TOKENS
from mirage_vlm.formats.columns import MARK as MARKED
from mirage_vlm.formats.columns import split_at_marks
from mirage_vlm.formats.faults import Fault, shown, text_fault
from mirage_vlm.formats.pictures import ImageSource, as_given, picture_fault
from mirage_vlm.pictures import scheme_of
from mirage_vlm.trajectory import Image, LatentSpan, Text, Trajectory

MARK = "<output_image>"
PLANNING = "vsp-planning"  # the task that a map alone is enough to score
_CELLS = {-1: "H", 0: "F", 1: "S", 2: "G"}
_CELL_NAMES = ("hole", "safe", "start", "goal")
_MARKS = re.compile(r"<output_image>|<image>|<\|latent_start\|>(?:<[^<>]+>|\s)*?<\|latent_end\|>")


def to_record(trajectory: Trajectory, *, image_source: ImageSource | None = None, where: str = "") -> dict[str, Any]:
    """The trajectory in the reference implementation's format.

    Args:
        trajectory: one user turn (pictures, then text) and one assistant turn.
        image_source: says what to write for a picture; None as in the chat form. The reference implementation
            opens paths only.
        where: what the error message names as the place of the trajectory.

    Raises:
        MirageError: the format has no place for something in the trajectory; nothing is left out silently.
    """
    source = image_source or as_given
    problem = _misfit(trajectory)
    if problem:
        raise MirageError(f"{where or 'this example'}: the reference format {problem}")
    question = trajectory.messages[0].segments
    mark = "" if _leading_spans(trajectory) else MARK
    record: dict[str, Any] = {
        "text_input": "".join(segment.text for segment in question if isinstance(segment, Text)),
        "image_input": _one_or_list([source(image) for image in trajectory.images()]),
        "text_output": "".join(segment.text if isinstance(segment, Text) else mark for segment in trajectory.response),
        "image_output": _one_or_list([source(span.helper) for span in trajectory.spans if span.helper]),
    }
    meta = dict(trajectory.meta)
    if "map" in meta:
        record["map_desc"] = meta.pop("map")
    if trajectory.task is not None:
        record["task"] = trajectory.task
    if trajectory.answer is not None:
        record["answer"] = write_answer(trajectory.answer)
    if meta:
        record["meta"] = meta
    return record


def _misfit(trajectory: Trajectory) -> str | None:
    """What of a trajectory the format cannot hold."""
    roles = [message.role for message in trajectory.messages]
    if roles != ["user", "assistant"]:
        return f"holds one user turn and one assistant turn, not {', '.join(roles) or 'nothing'}"
    question = trajectory.messages[0].segments
    kinds = [type(segment) for segment in question]
    if kinds != sorted(kinds, key=(Image, Text, LatentSpan).index) or LatentSpan in kinds:
        return "holds the pictures of the question before its text"
    if any(isinstance(segment, Text) and MARKED in segment.text for segment in question):
        return f"reads {MARKED!r} in a question as the place of a picture"
    for segment in trajectory.response:
        if isinstance(segment, Image):
            return "has no pictures in the response"
        if isinstance(segment, Text) and (mark := _MARKS.search(segment.text)):
            return f"reads {mark.group()!r} in a response as a latent span"
        if isinstance(segment, Text) and (token := next((t for t in LATENT_TOKENS if t in segment.text), None)):
            return f"reads {token!r} in a response as part of a latent span"
        if isinstance(segment, LatentSpan) and segment.helper is None:
            return "needs a helper image for every latent span"
        if isinstance(segment, LatentSpan) and segment.k is not None:
            return f"has no place for the number of latents of a span (k = {segment.k})"
        if isinstance(segment, LatentSpan) and segment.latents is not None:
            return "has no place for decoded latents"
    return None if trajectory.decoding is None else "has no place for decoded tokens"


def _leading_spans(trajectory: Trajectory) -> bool:
    """Whether all spans of the response come before its text, where no marks are needed."""
    kinds = [isinstance(segment, Text) for segment in trajectory.response]
    return kinds == sorted(kinds)


def _one_or_list(values: list[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else values


def to_chat(record: Mapping[str, Any], base: Path | None) -> dict[str, Any]:
    """The record in the chat form; it is one in which `faults` finds no fault."""
    pictures = [{"type": "image", "image": _find(image, base)} for image in _as_list(record["image_input"])]
    pieces = list(split_at_marks(record["text_input"]))
    if None not in pieces:
        question = [*pictures, {"type": "text", "text": record["text_input"]}]
    else:
        remaining = iter(pictures)
        question = [next(remaining) if piece is None else {"type": "text", "text": piece} for piece in pieces]
    meta = dict(record.get("meta") or {})
    if record.get("map_desc") is not None:
        meta["map"] = _letters(record["map_desc"])
    messages = [{"role": "user", "content": question}]
    task, answer = record.get("task"), _answer(record)
    if not is_prompt(record):
        messages.append({"role": "assistant", "content": _response(record, base)})
    elif "map" in meta and "plan" not in meta and task is None and answer is None:
        task = PLANNING
    return {"messages": messages, "task": task, "answer": answer, "meta": meta}


def _response(record: Mapping[str, Any], base: Path | None) -> list[dict[str, Any]]:
    """The parts of the assistant turn."""
    if record.get("sequence_plan") is not None:
        return [
            {"type": "text", "text": step["content"]}
            if step["type"] == "text"
            else {"type": "latent", "helper": _find(step["helper_image"], base)}
            for step in record["sequence_plan"]
        ]
    text, helpers = record["text_output"], _as_list(record["image_output"])
    pieces = _MARKS.split(text)
    if len(pieces) == 1:  # no mark: the spans come first
        pieces = [*[""] * len(helpers), text]
    response: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index > 0:
            response.append({"type": "latent", "helper": _find(helpers[index - 1], base)})
        if piece:
            response.append({"type": "text", "text": piece})
    return response


def is_prompt(record: Mapping[str, Any]) -> bool:
    """Whether there is nothing but a question, as in a test file."""
    if record.get("sequence_plan") is not None:
        return False
    return record.get("text_output") in (None, "") and record.get("image_output") in (None, "", [])


def faults(record: Mapping[str, Any], *, base: Path | None, check_files: bool) -> Iterator[Fault]:
    """Every fault of a record in the reference format; arguments as for `records.faults`."""
    prompt, plan = is_prompt(record), record.get("sequence_plan")
    outputs = not prompt and plan is None
    for key in ("text_input", "text_output") if outputs else ("text_input",):
        value = record.get(key)
        if value is None:
            yield Fault(key, "is missing")
        elif message := text_fault(value):
            yield Fault(key, message)
        elif key == "text_output":  # where marks have their meaning
            bare = _MARKS.sub("", value)
            for token in LATENT_TOKENS:
                if token in bare:
                    yield Fault(key, f"holds the token {token}, but no <|latent_start|>…<|latent_end|> there")
    for key in ("image_input", "image_output") if outputs else ("image_input",):
        if key not in record:
            yield Fault(key, "is missing; where there is no picture, write []")
            continue
        for index, value in enumerate(_as_list(record[key])):
            field = f"{key}[{index}]" if isinstance(record[key], list) else key
            if message := picture_fault(_find(value, base), base, check_files):
                yield Fault(field, message)
    text = record.get("text_output")
    marks = len(_MARKS.findall(text)) if isinstance(text, str) and outputs else 0
    if marks and "image_output" in record and marks != len(_as_list(record["image_output"])):
        images = len(_as_list(record["image_output"]))
        yield Fault("text_output", f"marks {marks} latent spans, but image_output has {images} pictures")
    asked, images = record.get("text_input"), len(_as_list(record.get("image_input")))
    places = asked.count(MARKED) if isinstance(asked, str) else 0
    if places and "image_input" in record and places != images:
        yield Fault("text_input", f"marks {places} pictures with {MARKED}, but image_input has {images}")
    if plan is not None:
        yield from _plan_faults(plan, base, check_files)
        for key in ("text_output", "image_output"):
            if record.get(key) not in (None, "", []):
                yield Fault(key, "stands beside `sequence_plan`; give one of the two")
    if record.get("map_desc") is not None and (fault := _map_fault(record["map_desc"])):
        yield fault
    yield from chat_faults.known_faults({**record, "answer": _answer(record)})


def _answer(record: Mapping[str, Any]) -> Any:
    """The reference answer, also under ILVR's name for it."""
    return record["answer"] if record.get("answer") is not None else record.get("original_final_answer")


def _plan_faults(plan: Any, base: Path | None, check_files: bool) -> Iterator[Fault]:
    if not isinstance(plan, list) or not plan:
        yield Fault("sequence_plan", f"must be a list of at least one step, not {shown(plan)}")
        return
    for index, step in enumerate(plan):
        field = f"sequence_plan[{index}]"
        kind = step.get("type") if isinstance(step, Mapping) else None
        if not isinstance(step, Mapping):
            yield Fault(field, f"must be an object with a `type`, not {shown(step)}")
        elif kind == "text":
            if step.get("content") is None:
                yield Fault(f"{field}.content", "is missing")
            else:
                yield from chat_faults.text_faults(step["content"], f"{field}.content")
        elif kind == "latent":
            value = step.get("helper_image")
            problem = "is missing" if value is None else picture_fault(_find(value, base), base, check_files)
            if problem:
                yield Fault(f"{field}.helper_image", problem)
        else:
            yield Fault(f"{field}.type", f"must be text or latent, not {shown(kind)}")


def _map_fault(rows: Any) -> Fault | None:
    """What is wrong with a map as such; whether it can be walked is for the task to say."""
    if not isinstance(rows, list) or not rows:
        return Fault("map_desc", f"must be a list of rows, not {shown(rows)}")
    for index, row in enumerate(rows):
        if isinstance(row, str):
            if message := text_fault(row):
                return Fault(f"map_desc[{index}]", message)
            continue
        if not isinstance(row, list):
            return Fault(f"map_desc[{index}]", f"must be a row of letters or of numbers, not {shown(row)}")
        for column, cell in enumerate(row):
            if not _is_cell(cell):
                numbers = ", ".join(f"{number} ({name})" for number, name in zip(_CELLS, _CELL_NAMES, strict=True))
                return Fault(f"map_desc[{index}][{column}]", f"must be one of {numbers}, not {shown(cell)}")
    return None


def _is_cell(cell: Any) -> bool:
    if isinstance(cell, str):
        return len(cell) == 1 and cell in _CELLS.values()
    return isinstance(cell, int | float) and not isinstance(cell, bool) and cell in _CELLS


def _letters(rows: list[Any]) -> list[str]:
    """The rows of a map as letters."""
    return [row if isinstance(row, str) else "".join(_CELLS.get(cell, cell) for cell in row) for row in rows]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _find(value: Any, base: Path | None) -> Any:
    """A picture's value with a path that only the working directory has made absolute."""
    if base is None or not isinstance(value, str) or not value or "\0" in value or scheme_of(value) != "path":
        return value
    here = Path(value)
    return str(here.absolute()) if not (base / here).exists() and here.exists() else value

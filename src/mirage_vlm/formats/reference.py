"""The data format of the reference implementation: one question, one response, pictures by path.

A record is `{"text_input", "image_input", "text_output", "image_output"}`, the images a path or a list of
paths; `map_desc` is optional. It is read as

- the prompt: the pictures of `image_input`, then `text_input`;
- the response: `text_output`, with a latent span at each mark, its helper image the next of `image_output`.
  A mark is `<output_image>`, `<image>` or `<|latent_start|>…<|latent_end|>`; without marks the spans come
  first.
- `map_desc` becomes `meta["map"]`; `task`, `answer` and `meta` are read as in the chat form.

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
from mirage_vlm.formats.chat_faults import LATENT_TOKENS
from mirage_vlm.formats.faults import Fault, text_fault
from mirage_vlm.formats.pictures import ImageSource, as_given, picture_fault
from mirage_vlm.trajectory import Image, LatentSpan, Text, Trajectory

MARK = "<output_image>"
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
        record["answer"] = trajectory.answer
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
    question = [{"type": "image", "image": _find(image, base)} for image in _as_list(record["image_input"])]
    question.append({"type": "text", "text": record["text_input"]})
    meta = dict(record.get("meta") or {})
    if record.get("map_desc") is not None:
        meta["map"] = record["map_desc"]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return {"messages": messages, "task": record.get("task"), "answer": record.get("answer"), "meta": meta}


def faults(record: Mapping[str, Any], *, base: Path | None, check_files: bool) -> Iterator[Fault]:
    """Every fault of a record in the reference format; arguments as for `records.faults`."""
    for key in ("text_input", "text_output"):
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
    for key in ("image_input", "image_output"):
        if key not in record:
            yield Fault(key, "is missing; where there is no picture, write []")
            continue
        for index, value in enumerate(_as_list(record[key])):
            field = f"{key}[{index}]" if isinstance(record[key], list) else key
            if message := picture_fault(_find(value, base), base, check_files):
                yield Fault(field, message)
    text = record.get("text_output")
    marks = len(_MARKS.findall(text)) if isinstance(text, str) else 0
    if marks and "image_output" in record and marks != len(_as_list(record["image_output"])):
        images = len(_as_list(record["image_output"]))
        yield Fault("text_output", f"marks {marks} latent spans, but image_output has {images} pictures")
    known = {key: record[key] for key in ("task", "answer", "meta") if key in record}
    sound = {"role": "user", "content": ""}
    yield from chat_faults.faults({"messages": [sound], **known}, check_files=False)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _find(value: Any, base: Path | None) -> Any:
    """A picture's value with a path that only the working directory has made absolute."""
    if base is None or not isinstance(value, str) or not value or "\0" in value or value.startswith("data:"):
        return value
    here = Path(value)
    return str(here.absolute()) if not (base / here).exists() and here.exists() else value

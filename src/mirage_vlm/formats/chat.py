"""The chat-message convention of TRL and the OpenAI API, with one more content part: the latent span.

A record is `{"messages": [{"role", "content": [part, …]}, …], "task", "answer", "meta"}`, where a part is
`{"type": "text", "text"}`, `{"type": "image", "image": path | URL | data URL}` (with `reading`, a list of words, where
the decoder is to learn to read each patch in place) or, in an assistant turn,
`{"type": "latent", "helper": path | URL | data URL, "k", "regions"}`, where `regions` has a box `[left, top, right,
bottom]`, in fractions of the picture, for each latent. Keys with nothing to say are left out.

Read, but never written: `content` as a plain string; OpenAI's `{"type": "image_url", "image_url": {"url"}}`;
image parts whose pictures are listed, in order, under `images` (TRL), and latent parts whose helper images
are listed under `helpers`; see `columns` for plain texts with pictures. `answer` may be a number, true or false, or
a list of accepted answers. Values that are null count as absent; unknown keys are ignored, but not inside a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirage_vlm.formats.answers import read_answer, write_answer
from mirage_vlm.formats.chat_faults import image_value
from mirage_vlm.formats.columns import place_columns
from mirage_vlm.formats.decoded import decoding_record, pack, read_decoding, unpack
from mirage_vlm.formats.pictures import ImageSource, as_given, read_picture
from mirage_vlm.trajectory import Image, LatentSpan, Message, Segment, Text, Trajectory


def to_record(trajectory: Trajectory, *, image_source: ImageSource | None = None) -> dict[str, Any]:
    """The trajectory as an object that JSON can hold.

    Args:
        trajectory: what to write.
        image_source: says what to write for a picture; None writes paths and URLs as they are and embeds
            pictures in memory as PNG data URLs.

    Raises:
        MirageError: a picture in memory cannot be drawn.
    """
    source = image_source or as_given
    record: dict[str, Any] = {
        "messages": [
            {"role": message.role, "content": [_to_part(segment, source) for segment in message.segments]}
            for message in trajectory.messages
        ]
    }
    if trajectory.task is not None:
        record["task"] = trajectory.task
    if trajectory.answer is not None:
        record["answer"] = write_answer(trajectory.answer)
    if trajectory.meta:
        record["meta"] = trajectory.meta
    if trajectory.decoding is not None:
        record["decoding"] = decoding_record(trajectory.decoding)
    return record


def _to_part(segment: Segment, source: ImageSource) -> dict[str, Any]:
    part: dict[str, Any]
    if isinstance(segment, Text):
        return {"type": "text", "text": segment.text}
    if isinstance(segment, Image):
        part = {"type": "image", "image": source(segment)}
        return part if segment.reading is None else part | {"reading": list(segment.reading)}
    part = {"type": "latent"}
    if segment.helper is not None:
        part["helper"] = source(segment.helper)
    if segment.k is not None:
        part["k"] = segment.k
    if segment.regions is not None:
        part["regions"] = [list(box) for box in segment.regions]
    if segment.latents is not None:
        part["latents"] = pack(segment.latents)
    return part


def from_record(record: Mapping[str, Any], base: Path | None) -> Trajectory:
    """The trajectory of a chat record in which `chat_faults.faults` finds no fault. Pictures are not opened.

    Args:
        record: the object, as parsed from JSON.
        base: the folder at which relative image paths start; None is the working directory.
    """
    record, _, _ = place_columns(record)
    decoding = record.get("decoding")
    return Trajectory(
        messages=tuple(
            Message(message["role"], tuple(_segments(message.get("content"), base))) for message in record["messages"]
        ),
        task=record.get("task"),
        answer=read_answer(record.get("answer")),
        meta=dict(record.get("meta") or {}),
        decoding=read_decoding(decoding) if decoding else None,
    )


def _segments(content: Any, base: Path | None) -> Iterator[Segment]:
    if isinstance(content, str):
        yield Text(content)
        return
    for part in content:
        if part["type"] == "text":
            yield Text(part["text"])
        elif part["type"] == "latent":
            helper, regions, packed = part.get("helper"), part.get("regions"), part.get("latents")
            yield LatentSpan(
                helper=None if helper is None else read_picture(helper, base),
                k=part.get("k"),
                regions=None if regions is None else tuple(map(tuple, regions)),
                latents=None if packed is None else unpack(packed),
            )
        else:
            reading = part.get("reading")
            yield replace(read_picture(image_value(part), base), reading=None if reading is None else tuple(reading))

"""Pictures that a record lists beside its messages, put in their places: TRL's, LLaVA's and ms-swift's layouts.

They go, in order, to the image parts that have no picture of their own. Where a conversation has none, as its
contents are plain texts, they stand where the user's texts say `<image>`, or before the first of them if none does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mirage_vlm.formats.faults import Fault, shown

MARK = "<image>"
_MARK = re.compile(r"\n?<image>\n?")  # with the line break that LLaVA puts between picture and text


def place_columns(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault], dict[str, str]]:
    """Put the pictures of `images` and `helpers` into the parts that have none of their own, in order.

    Returns:
        The record without the two columns; what is wrong with them; and for each field that came out of a column, its
        place there.
    """
    placed, names = dict(record), dict[str, str]()
    found = unread(record)
    if placed.get("image") is not None:  # one picture, as beside a prompt
        if placed.get("images") is not None:
            found.append(Fault("image", "stands beside images; give one of the two"))
        else:
            single = placed["image"]
            placed["images"] = single if isinstance(single, list) else [single]
    for column, kind, key in (("images", "image", "image"), ("helpers", "latent", "helper")):
        pictures = placed.pop(column, None)
        if pictures is not None and not isinstance(pictures, list):
            found.append(Fault(column, f"must be a list of pictures, not {shown(pictures)}"))
        elif pictures is not None:
            if kind == "image" and pictures and _plain(placed.get("messages")):
                placed["messages"], fault, names = _by_marks(placed["messages"], pictures)
                found += [fault] if fault else []
                continue
            placed["messages"], places = _fill(placed.get("messages"), kind, key, pictures)
            if places != len(pictures):
                problem = f"lists {len(pictures)} for {places} {kind} parts without a {key} of their own"
                found.append(Fault(column, problem))
    return placed, found, names


def unread(record: Mapping[str, Any]) -> list[Fault]:
    """What a record has beside its text that would be lost without a word."""
    return [
        Fault(key, "videos are not read; leave the example out, or give frames of it as pictures")
        for key in ("video", "videos", "audio", "audios")
        if record.get(key) not in (None, [], "")
    ]


def split_at_marks(text: str) -> Iterator[str | None]:
    """The pieces of a text, with None for each `<image>`; empty pieces are left out."""
    for index, piece in enumerate(_MARK.split(text)):
        if index:
            yield None
        if piece:
            yield piece


def _plain(messages: Any) -> bool:
    """Whether no message of a conversation has a part for a picture, and the user says something as plain text."""
    if not isinstance(messages, list):
        return False
    said = [message for message in messages if isinstance(message, Mapping)]
    parts = [part for message in said if isinstance(message.get("content"), list) for part in message["content"]]
    pictures = any(isinstance(part, Mapping) and part.get("type") in ("image", "image_url") for part in parts)
    return not pictures and any(m.get("role") == "user" and isinstance(m.get("content"), str) for m in said)


def _by_marks(messages: list[Any], pictures: list[Any]) -> tuple[list[Any], Fault | None, dict[str, str]]:
    """The messages with the pictures at the marks, or before the first user's text where there are no marks."""
    users = [
        i
        for i, m in enumerate(messages)
        if isinstance(m, Mapping) and m.get("role") == "user" and isinstance(m.get("content"), str)
    ]
    marks = sum(len(_MARK.findall(messages[i]["content"])) for i in users)
    if marks not in (0, len(pictures)):
        said = f"{marks} {'place' if marks == 1 else 'places'}"
        return messages, Fault("images", f"lists {len(pictures)} for {said} that the user's texts mark with {MARK}"), {}
    placed, names, number = list(messages), {}, 0
    for i in users:
        text = messages[i]["content"]
        whole: list[str | None] = [None] * len(pictures) + [text] if not marks and i == users[0] else []
        pieces = whole or (list(split_at_marks(text)) if marks else []) or [text]
        parts: list[dict[str, Any]] = []
        for piece in pieces:
            if piece is None:
                names[f"messages[{i}].content[{len(parts)}].image"] = f"images[{number}]"
                parts.append({"type": "image", "image": pictures[number]})
                number += 1
            else:
                names[f"messages[{i}].content[{len(parts)}].text"] = f"messages[{i}].content"
                parts.append({"type": "text", "text": piece})
        placed[i] = {**messages[i], "content": parts}
    return placed, None, names


def _fill(messages: Any, kind: str, key: str, pictures: list[Any]) -> tuple[Any, int]:
    """The messages, with `key` from the list in each part of a kind that lacks it; how many lacked it."""
    filled, places = [], 0
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            parts = []
            for part in content:
                if isinstance(part, Mapping) and part.get("type") == kind and not _has_own(part, key):
                    part = {**part, key: pictures[places] if places < len(pictures) else None}
                    places += 1
                parts.append(part)
            message = {**message, "content": parts}
        filled.append(message)
    return (filled if isinstance(messages, list) else messages), places


def _has_own(part: Mapping[str, Any], key: str) -> bool:
    """Whether a part names its picture itself; image parts may do so as transformers' chat templates have it."""
    return any(part.get(spelt) is not None for spelt in ((key, "url", "path") if key == "image" else (key,)))

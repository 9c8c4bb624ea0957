"""The faults of a chat record (`mirage_vlm.formats.chat`), each with the path of its field."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirage_vlm.formats.answers import answer_fault
from mirage_vlm.formats.columns import place_columns
from mirage_vlm.formats.decoded import decoding_faults, latents_fault
from mirage_vlm.formats.faults import Fault, shown, text_fault
from mirage_vlm.formats.pictures import picture_fault

LATENT_TOKENS = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")
ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image", "image_url", "latent")
PART_KEYS = {
    "text": ("text",),
    "image": ("image", "url", "path", "reading"),
    "image_url": ("image_url", "reading"),
    "latent": ("helper", "k", "regions", "latents"),
}
IMAGE_KEYS = ("image", "url", "path")  # `url` and `path` as transformers' chat templates have them
OF_OTHERS = ("cache_control", "detail", "annotations")  # keys of parts that mean nothing here


def faults(record: Any, *, base: Path | None = None, check_files: bool = True) -> Iterator[Fault]:
    """Every fault of a chat record. Whether its task exists is not looked at.

    Args:
        record: the object, as parsed from JSON.
        base: the folder at which relative image paths start; None is the working directory.
        check_files: also open and decode every picture that is not an http(s) URL.
    """
    if not isinstance(record, Mapping):
        yield Fault("", f"must be an object, not {shown(record)}")
        return
    record, found, names = place_columns(record)
    for fault in _faults(record, found, base, check_files):
        yield replace(fault, field=names.get(fault.field, fault.field))


def _faults(record: Mapping[str, Any], found: list[Fault], base: Path | None, check_files: bool) -> Iterator[Fault]:
    """As `faults`, of a record without columns; `found` is what was wrong with those."""
    messages = record.get("messages")
    if messages is None:
        yield Fault("messages", "is missing; an example is an object with a list of messages")
    elif not isinstance(messages, list) or not messages:
        yield Fault("messages", f"must be a list of at least one message, not {shown(messages)}")
    else:
        for index, message in enumerate(messages):
            decoded = index == len(messages) - 1 and record.get("decoding") is not None
            yield from _message_faults(message, f"messages[{index}]", base, check_files, decoded)
        yield from _order_faults(messages)
    yield from found
    yield from known_faults(record)
    if record.get("decoding") is not None:
        yield from decoding_faults(record["decoding"])


def known_faults(record: Mapping[str, Any]) -> Iterator[Fault]:
    """The faults of what is known beside the messages: `task`, `answer` and `meta`."""
    if record.get("task") is not None and (message := text_fault(record["task"])):
        yield Fault("task", message)
    if record.get("answer") is not None and (message := answer_fault(record["answer"])):
        yield Fault("answer", message)
    meta = record.get("meta")
    if meta is None:
        return
    if not isinstance(meta, Mapping):
        yield Fault("meta", f"must be an object, not {shown(meta)}")
        return
    if isinstance(meta.get("level"), list | dict):
        yield Fault("meta.level", f"must be a number or a text, not {shown(meta['level'])}")
    yield from _text_faults_within(meta, "meta")


def _text_faults_within(value: Any, field: str) -> Iterator[Fault]:
    """The texts within a value that are no characters, keys among them."""
    if isinstance(value, str):
        if message := text_fault(value):
            yield Fault(field, message)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            if message := text_fault(key):
                yield Fault(field, f"the key {shown(key)} {message}")
            else:
                yield from _text_faults_within(entry, f"{field}.{key}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _text_faults_within(entry, f"{field}[{index}]")


def _order_faults(messages: list[Any]) -> Iterator[Fault]:
    """An optional system turn, then user and assistant in turn, beginning with the user."""
    before = None
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:  # already reported
            before = "?"
            continue
        field = f"messages[{index}].role"
        if role == "system" and index > 0:
            yield Fault(field, "a system turn can only be the first")
        elif role == "assistant" and before in (None, "system"):
            yield Fault(field, "an assistant turn must follow a user turn")
        elif role == before and role != "system":
            yield Fault(field, f"follows another {role} turn; join the two")
        before = role
    if before == "system":
        field = f"messages[{len(messages) - 1}].role"
        yield Fault(field, "the last turn must be the user's or the assistant's")


def _message_faults(message: Any, field: str, base: Path | None, check_files: bool, decoded: bool) -> Iterator[Fault]:
    """The faults of a turn; `decoded` where a model has written it."""
    if not isinstance(message, Mapping):
        yield Fault(field, f"must be an object with `role` and `content`, not {shown(message)}")
        return
    role, content = message.get("role"), message.get("content")
    for key in ("image", "images", "image_url", "video", "videos"):
        if message.get(key) not in (None, [], ""):
            told = "is not read there; write a part of the content, or list pictures under `images` beside the messages"
            yield Fault(f"{field}.{key}", told)
    if role not in ROLES:
        yield Fault(f"{field}.role", f"must be one of {', '.join(ROLES)}, not {shown(role)}")
    if isinstance(content, str):
        yield from text_faults(content, f"{field}.content")
    elif not isinstance(content, list):
        problem = "is missing" if content is None else f"is {shown(content)}"
        yield Fault(f"{field}.content", f"{problem}; it must be a string or a list of parts")
    elif not content and role != "assistant":  # a decoded response may be empty
        yield Fault(f"{field}.content", "has no parts")
    else:
        for index, part in enumerate(content):
            yield from _part_faults(part, f"{field}.content[{index}]", role, base, check_files, decoded)


def text_faults(text: Any, field: str) -> Iterator[Fault]:
    if message := text_fault(text):
        yield Fault(field, message)


def _part_faults(
    part: Any, field: str, role: Any, base: Path | None, check_files: bool, decoded: bool
) -> Iterator[Fault]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in PART_KEYS:
        yield from _unknown_keys(part, kind, field)
    if not isinstance(part, Mapping):
        yield Fault(field, f"must be an object with a `type`, not {shown(part)}")
    elif not isinstance(kind, str) or kind not in PART_TYPES:
        yield Fault(f"{field}.type", f"must be one of {', '.join(PART_TYPES)}, not {shown(kind)}")
    elif kind == "text":
        if part.get("text") is None:
            yield Fault(f"{field}.text", "is missing")
        else:
            yield from text_faults(part["text"], f"{field}.text")
    elif kind == "latent":
        yield from _latent_faults(part, field, role, base, check_files, decoded)
    else:
        value = image_value(part)
        reading = part.get("reading")
        if reading is not None and not (isinstance(reading, list) and all(isinstance(word, str) for word in reading)):
            yield Fault(f"{field}.reading", "must be a list of strings, one for each patch")
        nested = kind == "image_url" and isinstance(part.get("image_url"), Mapping)
        spelt = next((key for key in IMAGE_KEYS if kind == "image" and part.get(key) is not None), kind)
        key = f"{field}.{spelt}{'.url' if nested else ''}"
        problem = "is missing" if value is None else picture_fault(value, base, check_files)
        if problem:
            yield Fault(key, problem)


def _unknown_keys(part: Mapping[str, Any], kind: str, field: str) -> Iterator[Fault]:
    """A key that is not read would be missed in silence; null counts as absent."""
    known = PART_KEYS[kind]
    for key, value in part.items():
        if value is None or key == "type" or key in known or key in OF_OTHERS:
            continue
        near = difflib.get_close_matches(key, known, 1, 0.7)
        hint = f"did you mean `{near[0]}`?" if near else f"a part of the type {kind} has {', '.join(known)}"
        yield Fault(f"{field}.{key}", f"is an unknown key; {hint}")


def _latent_faults(
    part: Mapping[str, Any], field: str, role: Any, base: Path | None, check_files: bool, decoded: bool
) -> Iterator[Fault]:
    if role in ROLES and role != "assistant":
        yield Fault(field, f"a latent span can only stand in an assistant turn, not in a {role} turn")
    helper, k, packed, regions = (part.get(key) for key in ("helper", "k", "latents", "regions"))
    least = 0 if decoded else 1  # a model may close a span, or be cut off, before it has thought
    if helper is None and packed is None and regions is None and not (decoded and k is not None):
        yield Fault(f"{field}.helper", "is missing; a latent span needs its helper image to be learnt from")
    elif helper is not None and (message := picture_fault(helper, base, check_files)):
        yield Fault(f"{field}.helper", message)
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < least):
        yield Fault(f"{field}.k", f"must be a whole number of at least {least}, not {shown(k)}")
        k = None
    if regions is not None:
        if message := _regions_fault(regions):
            yield Fault(f"{field}.regions", message)
        elif k is not None and len(regions) != k:
            yield Fault(f"{field}.k", f"is {k}, but there are {len(regions)} regions")
    if packed is not None:
        if message := latents_fault(packed):
            yield Fault(f"{field}.latents", message)
        elif k is not None and packed["shape"][0] != k:
            yield Fault(f"{field}.k", f"is {k}, but the span holds {packed['shape'][0]} latents")


def _regions_fault(regions: Any) -> str | None:
    if not isinstance(regions, list) or not regions:
        return f"must be a list of boxes, one for each latent, not {shown(regions)}"
    for i, box in enumerate(regions):
        numbers = isinstance(box, list) and all(isinstance(x, int | float) and type(x) is not bool for x in box)
        if not numbers or not box or len(box) % 4 or not all(map(_is_box, zip(*[iter(box)] * 4, strict=True))):
            return (
                f"[{i}] must be [left, top, right, bottom] with 0 ≤ left < right ≤ 1 and so down, or several such "
                f"fours in one list, not {shown(box)}"
            )
    return None


def _is_box(box: tuple[float, ...]) -> bool:
    left, top, right, bottom = box
    return 0 <= left < right <= 1 and 0 <= top < bottom <= 1


def image_value(part: Mapping[str, Any]) -> Any:
    """The picture of an image part, in any spelling."""
    if part["type"] == "image":
        return next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
    url = part.get("image_url")
    return url.get("url") if isinstance(url, Mapping) else url

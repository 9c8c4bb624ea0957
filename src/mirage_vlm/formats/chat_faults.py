"""The faults of a chat record (`mirage_vlm.formats.chat`), each with the path of its field."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mirage_vlm.formats.faults import Fault, shown, text_fault
from mirage_vlm.formats.pictures import picture_fault

LATENT_TOKENS = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")
ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image", "image_url", "latent")
FINISH_REASONS = ("stop", "length")


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
    record, found = place_columns(record)
    messages = record.get("messages")
    if messages is None:
        yield Fault("messages", "is missing; an example is an object with a list of messages")
    elif not isinstance(messages, list) or not messages:
        yield Fault("messages", f"must be a list of at least one message, not {shown(messages)}")
    else:
        for index, message in enumerate(messages):
            yield from _message_faults(message, f"messages[{index}]", base, check_files)
        yield from _order_faults(messages)
    yield from found
    for key in ("task", "answer"):
        if record.get(key) is not None and (message := text_fault(record[key])):
            yield Fault(key, message)
    meta = record.get("meta")
    if meta is not None and not isinstance(meta, Mapping):
        yield Fault("meta", f"must be an object, not {shown(meta)}")
    if record.get("decoding") is not None:
        yield from _decoding_faults(record["decoding"])


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


def _message_faults(message: Any, field: str, base: Path | None, check_files: bool) -> Iterator[Fault]:
    if not isinstance(message, Mapping):
        yield Fault(field, f"must be an object with `role` and `content`, not {shown(message)}")
        return
    role, content = message.get("role"), message.get("content")
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
            yield from _part_faults(part, f"{field}.content[{index}]", role, base, check_files)


def text_faults(text: Any, field: str) -> Iterator[Fault]:
    if message := text_fault(text):
        yield Fault(field, message)


def _part_faults(part: Any, field: str, role: Any, base: Path | None, check_files: bool) -> Iterator[Fault]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping):
        yield Fault(field, f"must be an object with a `type`, not {shown(part)}")
    elif kind not in PART_TYPES:
        yield Fault(f"{field}.type", f"must be one of {', '.join(PART_TYPES)}, not {shown(kind)}")
    elif kind == "text":
        if part.get("text") is None:
            yield Fault(f"{field}.text", "is missing")
        else:
            yield from text_faults(part["text"], f"{field}.text")
    elif kind == "latent":
        yield from _latent_faults(part, field, role, base, check_files)
    else:
        value = image_value(part)
        reading = part.get("reading")
        if reading is not None and not (isinstance(reading, list) and all(isinstance(word, str) for word in reading)):
            yield Fault(f"{field}.reading", "must be a list of strings, one for each patch")
        nested = kind == "image_url" and isinstance(part.get("image_url"), Mapping)
        key = f"{field}.{kind}{'.url' if nested else ''}"
        problem = "is missing" if value is None else picture_fault(value, base, check_files)
        if problem:
            yield Fault(key, problem)


def _latent_faults(
    part: Mapping[str, Any], field: str, role: Any, base: Path | None, check_files: bool
) -> Iterator[Fault]:
    if role in ROLES and role != "assistant":
        yield Fault(field, f"a latent span can only stand in an assistant turn, not in a {role} turn")
    helper, k, packed, regions = (part.get(key) for key in ("helper", "k", "latents", "regions"))
    if helper is None and packed is None and regions is None:
        yield Fault(f"{field}.helper", "is missing; a latent span needs its helper image to be learnt from")
    elif helper is not None and (message := picture_fault(helper, base, check_files)):
        yield Fault(f"{field}.helper", message)
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        yield Fault(f"{field}.k", f"must be a whole number of at least 1, not {shown(k)}")
        k = None
    if regions is not None:
        if message := _regions_fault(regions):
            yield Fault(f"{field}.regions", message)
        elif k is not None and len(regions) != k:
            yield Fault(f"{field}.k", f"is {k}, but there are {len(regions)} regions")
    if packed is not None:
        if message := _latents_fault(packed):
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


def _latents_fault(packed: Any) -> str | None:
    if not isinstance(packed, Mapping):
        return f"must be an object with `shape`, `dtype` and `data`, not {shown(packed)}"
    shape, dtype, data = packed.get("shape"), packed.get("dtype"), packed.get("data")
    sizes = shape if isinstance(shape, list) else []
    if len(sizes) != 2 or not all(type(size) is int and size >= 0 for size in sizes):
        return f"must have the shape [k, width], not {shown(shape)}"
    if dtype != "float32":
        return f"must have the dtype 'float32', not {shown(dtype)}"
    try:
        size = len(base64.b64decode(data if isinstance(data, str) else "?", validate=True))
    except ValueError:
        return "must hold base64 under `data`"
    expected = 4 * sizes[0] * sizes[1]
    return None if size == expected else f"must hold {expected} bytes for the shape {shape}, not {size}"


def _decoding_faults(decoding: Any) -> Iterator[Fault]:
    if not isinstance(decoding, Mapping):
        yield Fault("decoding", f"must be an object, not {shown(decoding)}")
        return
    ids, reason = decoding.get("token_ids"), decoding.get("finish_reason")
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        yield Fault("decoding.token_ids", f"must be a list of token ids, not {shown(ids)}")
    if reason not in FINISH_REASONS:
        problem = f"must be one of {', '.join(FINISH_REASONS)}, not {shown(reason)}"
        yield Fault("decoding.finish_reason", problem)


def image_value(part: Mapping[str, Any]) -> Any:
    """The picture of an image part, in either spelling."""
    if part["type"] == "image":
        return part.get("image")
    url = part.get("image_url")
    return url.get("url") if isinstance(url, Mapping) else url


def place_columns(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Put the pictures of `images` and `helpers` into the parts that have none of their own, in order.

    Returns:
        The record without the two columns, and what is wrong with them.
    """
    placed, found = dict(record), []
    for column, kind, key in (("images", "image", "image"), ("helpers", "latent", "helper")):
        pictures = placed.pop(column, None)
        if pictures is not None and not isinstance(pictures, list):
            found.append(Fault(column, f"must be a list of pictures, not {shown(pictures)}"))
        elif pictures is not None:
            placed["messages"], places = _fill(placed.get("messages"), kind, key, pictures)
            if places != len(pictures):
                problem = f"lists {len(pictures)} for {places} {kind} parts without a {key} of their own"
                found.append(Fault(column, problem))
    return placed, found


def _fill(messages: Any, kind: str, key: str, pictures: list[Any]) -> tuple[Any, int]:
    """The messages, with `key` from the list in each part of a kind that lacks it; how many lacked it."""
    filled, places = [], 0
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            parts = []
            for part in content:
                if isinstance(part, Mapping) and part.get("type") == kind and part.get(key) is None:
                    part = {**part, key: pictures[places] if places < len(pictures) else None}
                    places += 1
                parts.append(part)
            message = {**message, "content": parts}
        filled.append(message)
    return (filled if isinstance(messages, list) else messages), places

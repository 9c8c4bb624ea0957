"""What people hand over where a conversation is asked for: trajectories, messages, dictionaries, texts, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, cast

import PIL.Image

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.chat_faults import ROLES
from mirage_vlm.formats.faults import shown
from mirage_vlm.formats.pictures import from_bytes
from mirage_vlm.formats.records import from_record
from mirage_vlm.pictures import is_array
from mirage_vlm.trajectory import Image, LatentSpan, Message, Segment, Text, Trajectory, user_turn

Asked: TypeAlias = Trajectory | Message | Mapping[str, Any] | str | Sequence[Any]
"""One conversation; see `as_prompt`."""

RIGHT = 'vlm.generate([[user_turn(Image("map.png"), "Which way?")]])'
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SOURCES = ("image", "url", "path", "image_url", "value")  # of a picture, in the parts of several conventions


def as_prompts(asked: Any) -> Sequence[Any]:
    """The conversations of a call: of one alone a list with it.

    A list of messages, of chat dictionaries with a `role`, or of pictures and texts is one conversation; any other list
    is of several, each in a form of its own. What is no list but can be indexed like one (a data set) is left as it is,
    so that its examples are made when they are needed; the others are made into trajectories here.

    Raises:
        MirageError: it is none of these; the message shows the right call.
    """
    if isinstance(asked, list | tuple):
        if not asked:
            return []
        if isinstance(asked, tuple) and all(isinstance(item, str) for item in asked):
            raise MirageError(f"a tuple of texts may be a path and a question, or several questions; write {RIGHT}")
        if _is_one(asked):
            return [as_prompt(asked)]
        found = []
        for i, item in enumerate(asked):
            try:
                found.append(as_prompt(item))
            except MirageError as fault:
                raise MirageError(f"prompts[{i}]: {fault}") from fault
        return found
    if isinstance(asked, Trajectory | Message | Mapping | str) or _is_picture(asked):
        return [as_prompt(asked)]
    if hasattr(asked, "__len__") and hasattr(asked, "__getitem__"):
        return asked
    if isinstance(asked, Iterator):
        return as_prompts(list(asked))
    raise MirageError(f"prompts must be trajectories or conversations, not {type(asked).__name__}; write {RIGHT}")


def _is_one(items: Sequence[Any]) -> bool:
    """Whether a list is one conversation: of messages, of chat dictionaries, or of the parts of one turn."""
    if all(isinstance(item, Message) for item in items) or all(_has(item, "role") for item in items):
        _check_order([item.role if isinstance(item, Message) else item["role"] for item in items])
        return True
    return any(_is_picture(item) or isinstance(item, Text) or _has(item, "type") for item in items)


def as_prompt(asked: Any) -> Trajectory:
    """A conversation as a trajectory: itself; messages; chat dictionaries; a record of a data file; or one question.

    A question is a text, or a list of texts and pictures (PIL, bytes of a file, a `Path`, an `Image`), at least one
    of each.

    Raises:
        MirageError: it is none of these; the message shows the right call.
    """
    if isinstance(asked, Trajectory):
        return _checked(asked)
    if isinstance(asked, Message):
        return _checked(Trajectory((asked,)))
    if _has(asked, "messages"):
        return _checked(from_record(_drawable(asked)))
    if _has(asked, "role"):
        return Trajectory(messages_of([asked]))
    if isinstance(asked, str):
        if _names_picture(asked):
            raise MirageError(f"{shown(asked)} names a picture, but nothing is asked about it; write {RIGHT}")
        return Trajectory((user_turn(asked),))
    if _is_picture(asked):
        raise MirageError(f"a picture alone asks nothing; write {RIGHT}")
    if isinstance(asked, Sequence) and len(asked):
        if all(isinstance(item, Message) for item in asked):
            return _checked(Trajectory(tuple(asked)))
        if all(_has(item, "role") for item in asked):
            return Trajectory(messages_of(asked))
        if any(isinstance(item, Trajectory) or _has(item, "messages") for item in asked):
            raise MirageError("here one conversation is asked for, not a list of them; give them to vlm.generate([…])")
        return _question(asked)
    raise MirageError(f"a prompt must be a trajectory or a conversation, not {shown(asked)}; write {RIGHT}")


def _question(parts: Sequence[Any]) -> Trajectory:
    """One user turn of texts and pictures."""
    segments = []
    for part in parts:
        if isinstance(part, str | Text | Image | Mapping):
            segments.append(part if isinstance(part, Text | Image) else segment(part))
        elif _is_picture(part):
            segments.append(picture(part))
        else:
            raise MirageError(f"a question is made of texts and pictures, not of {shown(part)}; write {RIGHT}")
    kinds = {type(part) for part in segments}
    if kinds != {Text, Image}:
        raise MirageError(f"a question in one list needs a picture and a text; write {RIGHT}")
    return Trajectory((Message("user", tuple(segments)),))


def messages_of(turns: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Chat dictionaries as messages.

    Args:
        turns: `{"role": …, "content": …}` with text, or a list of parts; see `segment`.

    Raises:
        MirageError: a turn or a part is not of this form; the message names it.
    """
    messages = []
    for i, turn in enumerate(turns):
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise MirageError(f"messages[{i}].role must be one of {', '.join(ROLES)}, not {shown(role)}")
        parts = [content] if isinstance(content, str | Mapping) else content
        if not isinstance(parts, Sequence) or isinstance(parts, bytes) or not (parts or role == "assistant"):
            raise MirageError(f"messages[{i}].content must be a text or a list of parts, not {shown(content)}")
        try:
            messages.append(Message(role, tuple(map(segment, parts))))
        except MirageError as fault:
            raise MirageError(f"{fault} (messages[{i}].content)") from fault
    return tuple(messages)


def segment(part: Any) -> Segment:
    """A part of a chat message as others write it.

    Args:
        part: a text; `{"type": "text", "text" or "value": …}`; or `{"type": "image" or "image_url", …}` with a picture
            under `image`, `url`, `path`, `image_url` or `value`. OpenAI's `input_text` and `input_image` are the same.

    Raises:
        MirageError: it is neither text nor a picture.
    """
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, Mapping):
        raise MirageError(f"a part must be a text or have a `type`, not {shown(part)}")
    kind = part.get("type")
    if kind in ("text", "input_text"):
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise MirageError(f"a text part must have its text, not {shown(text)}")
        return Text(text)
    if kind in ("image", "image_url", "input_image"):
        source = next((part[name] for name in SOURCES if part.get(name) is not None), None)
        if source is None:
            raise MirageError(f"an {kind} part has no picture; give it under `image` or `image_url`")
        return picture(source)
    raise MirageError(f"only text and pictures can be read; this request holds {kind!r}")


def picture(source: Any) -> Image:
    """A picture as people hand it over: PIL, bytes, a path, a file, http(s) or data URL, or a dict with one of them.

    Raises:
        MirageError: it is none of these.
    """
    if isinstance(source, Mapping):  # of the `datasets` library, or of OpenAI's messages
        source = next((source[name] for name in ("bytes", "path", "url") if source.get(name)), None)
    if isinstance(source, Image):
        return source
    if isinstance(source, bytes):
        return from_bytes(source)
    if isinstance(source, str):
        return Image(source)
    if isinstance(source, Path) or _is_picture(source):
        return cast("Image", user_turn(source).segments[0])
    raise MirageError(f"a picture must be a PIL image, bytes, a path or a URL, not {type(source).__name__}")


def _checked(asked: Trajectory) -> Trajectory:
    """A trajectory whose prompt is made of messages, and these of segments: what the classes do not look at."""
    for i, message in enumerate(asked.messages):
        if not isinstance(message, Message):
            raise MirageError(f"messages[{i}] must be a Message, not {shown(message)}; user_turn(…) makes one")
        wrong = [part for part in message.segments if not isinstance(part, Text | Image | LatentSpan)]
        if wrong:
            raise MirageError(
                f"messages[{i}] holds {shown(wrong[0])}, which is no segment; user_turn(…) makes them of texts"
            )
    if not asked.prompt:
        raise MirageError(f"a prompt needs at least one turn of the user's; write {RIGHT}")
    return asked


def _check_order(roles: Sequence[Any]) -> None:
    """In a bare list, two turns of the user's are as likely to be two questions."""
    for before, role in pairwise(roles):
        if before == role == "user":
            raise MirageError(
                "two turns of the user's follow one another: for two questions give each in a list of its own, "
                "[[first], [second]]; for one, join them"
            )


def _has(item: Any, key: str) -> bool:
    return isinstance(item, Mapping) and key in item


def _is_picture(item: Any) -> bool:
    return isinstance(item, PIL.Image.Image | Image | Path | bytes | bytearray | memoryview) or is_array(item)


def _names_picture(text: str) -> bool:
    """Whether a text can only be meant as a picture's place."""
    place = text.strip().lower()
    return place.startswith("data:image/") or (len(place.split()) == 1 and place.endswith(PICTURE_ENDINGS))


def _drawable(record: Any) -> Any:
    """A record whose decoded pictures, as `datasets` hands them out, are drawing functions instead."""
    if isinstance(record, PIL.Image.Image):
        return Image(record).load
    if isinstance(record, Mapping):
        return {key: _drawable(value) for key, value in record.items()}
    return [_drawable(value) for value in record] if isinstance(record, list | tuple) else record

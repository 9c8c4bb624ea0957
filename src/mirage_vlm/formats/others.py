"""Records as others write them, turned into the chat form: ShareGPT's `conversations`, TRL's `prompt` and `completion`.

What cannot be said in the chat form is a fault of the record; all else is left to the chat form's own check, whose
faults get the names that the fields have here.

`conversations` is a list of `{"from", "value"}`; `from` is `human` or `user`, `gpt` or `assistant`, or `system`. The
pictures are listed under `image` or `images`, and stand where the text says `<image>`. TRL's `prompt` and
`completion` are both texts or both lists of messages, with the pictures under `images`; a `prompt` may be alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mirage_vlm.formats.columns import MARK, unread
from mirage_vlm.formats.faults import Fault, shown

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
_PAIRS = ("chosen", "rejected")
_KEPT = ("task", "answer", "meta", "helpers", "decoding")


@dataclass(frozen=True)
class InChatForm:
    """A record in the chat form.

    Attributes:
        record: the object.
        faults: what of the original has no place in it.
        names: for a field of the chat form, how the field is called in the original.
    """

    record: dict[str, Any]
    faults: tuple[Fault, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, fault: Fault) -> Fault:
        """A fault of `record` as one of the original."""
        matching = (
            name for name in self.names if fault.field == name or fault.field.startswith((f"{name}.", f"{name}["))
        )
        longest = max(matching, key=len, default=None)
        if longest is None:
            return fault
        return replace(fault, field=self.names[longest] + fault.field[len(longest) :])


def from_conversations(record: Mapping[str, Any]) -> InChatForm:
    """A ShareGPT or LLaVA record in the chat form."""
    found = unread(record)
    names: dict[str, str] = {}
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        return _only(Fault("conversations", f"must be a list of at least one turn, not {shown(turns)}"))
    messages: list[dict[str, Any]] = []
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        found.append(Fault("system", f"must be a string, not {shown(system)}"))
    elif system:
        names["messages[0]"] = "system"
        messages.append({"role": "system", "content": system})
    for index, turn in enumerate(turns):
        place = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            found.append(Fault(place, f"must be an object with `from` and `value`, not {shown(turn)}"))
            continue
        for key in ("image", "images", "video", "videos"):
            if turn.get(key) not in (None, [], ""):
                found.append(
                    Fault(f"{place}.{key}", "is not read there; list pictures under `images` beside the turns")
                )
        by, says = ("role" if turn.get("from") is None and "role" in turn else "from"), "value"
        says = next((key for key in ("value", "text", "content") if turn.get(key) is not None), says)
        role = turn.get(by)
        if not isinstance(role, str) or role not in _ROLES:
            found.append(Fault(f"{place}.{by}", f"must be one of {', '.join(_ROLES)}, not {shown(role)}"))
        if turn.get(says) is None:
            found.append(Fault(f"{place}.{says}", "is missing"))
        names[f"messages[{len(messages)}].role"] = f"{place}.{by}"
        names[f"messages[{len(messages)}].content"] = f"{place}.{says}"
        names[f"messages[{len(messages)}]"] = place
        messages.append({"role": _ROLES.get(role) if isinstance(role, str) else None, "content": turn.get(says)})
    said = [m["content"] for m in messages if m["role"] == "user" and isinstance(m["content"], str)]
    marks = sum(text.count(MARK) for text in said)
    if marks and not any(record.get(key) for key in ("image", "images")):
        found.append(Fault("image", f"is missing, but the user's texts mark {marks} with {MARK}"))
    if found:
        return InChatForm({}, tuple(found))
    return _with_pictures(record, {"messages": messages}, names)


def from_prompt(record: Mapping[str, Any]) -> InChatForm:
    """A record of TRL's prompt and completion in the chat form."""
    found = unread(record) + [
        Fault(key, "a preference pair is not read; give the response to learn as `completion`")
        for key in _PAIRS
        if record.get(key) is not None
    ]
    names: dict[str, str] = {}
    messages: list[Any] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.get(key)
        if value is None and key == "completion":
            continue
        if isinstance(value, list) and value:
            for index, message in enumerate(value):
                names[f"messages[{len(messages)}]"] = f"{key}[{index}]"
                messages.append(message)
        elif isinstance(value, str) or (isinstance(value, Mapping) and "role" in value):
            names[f"messages[{len(messages)}]" + (".content" if isinstance(value, str) else "")] = key
            names.setdefault(f"messages[{len(messages)}]", key)
            messages.append({"role": role, "content": value} if isinstance(value, str) else value)
        else:
            found.append(Fault(key, f"must be a text or a list of at least one message, not {shown(value)}"))
    if found:
        return InChatForm({}, tuple(found))
    return _with_pictures(record, {"messages": messages}, names)


def _only(fault: Fault) -> InChatForm:
    return InChatForm({}, (fault,))


def _with_pictures(record: Mapping[str, Any], made: dict[str, Any], names: dict[str, str]) -> InChatForm:
    """The chat record with the pictures of `image` or `images` as its column, and all else that the form has."""
    made |= {key: record[key] for key in _KEPT if record.get(key) is not None}
    given = [key for key in ("image", "images") if record.get(key) is not None]
    if len(given) > 1:
        return _only(Fault("image", "stands beside `images`; give one of the two"))
    for key in given:
        several = isinstance(record[key], list)
        made["images"] = record[key] if several else [record[key]]
        names["images"] = key
        names |= {f"images[{i}]": f"{key}[{i}]" if several else key for i in range(len(made["images"]))}
    return InChatForm(made, names=names)

"""What a row says beside its text is read, or is a fault: a picture is never lost without a word."""

from __future__ import annotations

import pytest

from mirage_vlm.formats.records import faults, from_record

QUESTION = [{"role": "user", "content": "<image>\nQ"}, {"role": "assistant", "content": "A"}]
TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


def test_one_picture_beside_messages_is_read():
    found = from_record({"messages": QUESTION, "image": "map.png"})
    assert [str(image) for image in found.images()] == ["map.png"]
    assert "<image>" not in "".join(s.text for m in found.messages for s in m.segments if hasattr(s, "text"))


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"messages": QUESTION, "image": "a.png", "images": ["b.png"]}, "image"),
        ({"messages": [{"role": "user", "content": "Q", "image": "a.png"}]}, "messages[0].image"),
        ({"messages": [{"role": "user", "content": "Q", "images": ["a.png"]}]}, "messages[0].images"),
        ({"messages": QUESTION, "images": ["a.png"], "videos": ["x.mp4"]}, "videos"),
        ({"conversations": TURNS, "video": "x.mp4"}, "video"),
        ({"conversations": [{**TURNS[0], "image": "a.png"}, TURNS[1]]}, "conversations[0].image"),
        ({"prompt": "Q", "completion": "A", "video": "x.mp4"}, "video"),
    ],
)
def test_what_would_be_lost_is_a_fault(record, field):
    assert field in [fault.field for fault in faults(record, check_files=False)]


@pytest.mark.parametrize("key", ["video", "videos", "image", "images"])
@pytest.mark.parametrize("value", [None, []])
def test_what_is_empty_is_none(key, value):
    plain = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert not list(faults({"messages": plain, key: value}, check_files=False))

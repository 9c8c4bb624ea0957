"""What may be handed over where conversations are asked for, and what is refused with the right call."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.asked import as_prompt, as_prompts
from mirage_vlm.trajectory import Image, LatentSpan, Message, Text, Trajectory, assistant_turn, user_turn

PICTURE = PIL.Image.new("RGB", (6, 4), "red")
URL = "data:image/png;base64,"


def png() -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return file.getvalue()


def shape(trajectory: Trajectory) -> list[tuple]:
    """Roles with texts and sizes of pictures."""
    return [
        (m.role, *(s.text if isinstance(s, Text) else s.size() for s in m.segments if not isinstance(s, LatentSpan)))
        for m in trajectory.messages
    ]


QUESTION = [("user", (6, 4), "Which way?")]
TEXT = [("user", "Which way?")]
TURN = user_turn(PICTURE, "Which way?")
DATA = URL + base64.b64encode(png()).decode()


def chat(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


WORDS = {"type": "text", "text": "Which way?"}

ONE = [
    (Trajectory((TURN,)), QUESTION),
    (TURN, QUESTION),
    ([TURN], QUESTION),
    ((TURN,), QUESTION),
    ("Which way?", TEXT),
    ((PICTURE, "Which way?"), QUESTION),
    (["Which way?", PICTURE], [("user", "Which way?", (6, 4))]),
    ((png(), "Which way?"), QUESTION),
    ((np.zeros((4, 6, 3), dtype=np.uint8), "Which way?"), QUESTION),
    ((Image(PICTURE), Text("Which way?")), QUESTION),
    ([{"type": "image", "image": PICTURE}, "Which way?"], QUESTION),
    ({"role": "user", "content": "Which way?"}, TEXT),
    ([{"role": "user", "content": "Which way?"}], TEXT),
    (chat(WORDS), TEXT),
    (chat({"type": "image_url", "image_url": {"url": DATA}}, WORDS), QUESTION),
    (chat({"type": "image_url", "image_url": DATA}, WORDS), QUESTION),
    (chat({"type": "image", "image": PICTURE}, WORDS), QUESTION),
    (chat({"type": "image", "url": DATA}, WORDS), QUESTION),
    (chat({"type": "input_image", "image_url": DATA}, {"type": "input_text", "text": "Which way?"}), QUESTION),
    ({"messages": chat({"type": "image", "image": PICTURE}, WORDS), "task": "x"}, QUESTION),
    ({"messages": chat({"type": "image"}, WORDS), "images": [PICTURE]}, QUESTION),
    (
        [{"role": "system", "content": "Be short."}, *chat(WORDS), {"role": "assistant", "content": "U"}, *chat(WORDS)],
        [("system", "Be short."), *TEXT, ("assistant", "U"), *TEXT],
    ),
    ([TURN, assistant_turn("U"), user_turn("Why?")], [*QUESTION, ("assistant", "U"), ("user", "Why?")]),
]


@pytest.mark.parametrize(("asked", "expected"), ONE)
def test_one_conversation_is_a_list_of_one(asked, expected):
    (found,) = as_prompts(asked)
    assert shape(found) == expected
    assert shape(as_prompt(asked)) == expected
    several = as_prompts([asked, Trajectory((TURN,))])
    assert [shape(each) for each in several] == [expected, QUESTION], "and as one of several"


def test_several():
    rows = [Trajectory((TURN,)), Trajectory((user_turn("?"), assistant_turn("!")))]
    assert as_prompts(rows) == rows and as_prompts(tuple(rows)) == rows and as_prompts(iter(rows)) == rows
    assert [shape(each) for each in as_prompts(["a", "b"])] == [[("user", "a")], [("user", "b")]]
    assert [shape(each) for each in as_prompts([chat(WORDS), chat(WORDS)])] == [TEXT, TEXT]
    assert [shape(each) for each in as_prompts([{"messages": chat(WORDS)}] * 2)] == [TEXT, TEXT]
    assert as_prompts([]) == [] == as_prompts(())

    class Lazy:
        def __len__(self):
            return 1000

        def __getitem__(self, i):
            raise AssertionError("not yet")

    assert len(as_prompts(Lazy())) == 1000


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (None, "not NoneType; write vlm.generate"),
        (3, "not int; write vlm.generate"),
        ({1, 2}, "not set; write vlm.generate"),
        ({}, "write vlm.generate"),
        ({"prompt": "x"}, "write vlm.generate"),
        (PICTURE, "a picture alone asks nothing; write vlm.generate"),
        (Path("map.png"), "a picture alone asks nothing"),
        (png(), "a picture alone asks nothing"),
        ([PICTURE], "needs a picture and a text"),
        ("map.png", "names a picture, but nothing is asked about it"),
        (DATA, "names a picture"),
        (["map.png", "Which way?"], r"prompts\[0\]: 'map.png' names a picture|names a picture"),
        (("map.png", "Which way?"), "may be a path and a question"),
        ([user_turn("a"), user_turn("b")], "two turns of the user's follow one another"),
        ([*chat(WORDS), *chat(WORDS)], "two turns of the user's follow one another"),
        ([Trajectory((TURN,)), 3], r"prompts\[1\]: a prompt must be a trajectory or a conversation, not 3"),
        ([[]], r"prompts\[0\]: a prompt must be"),
        ([Trajectory(())], "needs at least one turn"),
        ([[assistant_turn("x")]], "needs at least one turn"),
        ([Message("user", ("Which way?",))], "which is no segment; user_turn"),
        ([Trajectory(("Which way?",))], "must be a Message"),
        ([{"role": "usr", "content": "x"}], r"messages\[0\].role must be one of system, user, assistant, not 'usr'"),
        ([{"role": "user"}], r"messages\[0\].content must be a text or a list of parts"),
        (chat({"type": "video", "video": "a.mp4"}), r"only text and pictures .*'video' \(messages\[0\].content\)"),
        (chat({"type": "image"}), "image part has no picture"),
        (chat({"type": "text"}), "a text part must have its text"),
        (chat({"type": "image", "image": 3}), "a picture must be a PIL image, bytes, a path or a URL, not int"),
        (chat(3), "a part must be a text or have a `type`, not 3"),
        ({"messages": []}, "must be a list of at least one message"),
    ],
)
def test_what_is_refused_says_what_to_write(asked, message):
    with pytest.raises(MirageError, match=message) as told:
        as_prompts(asked)
    assert "\n" not in str(told.value)


def test_where_one_is_asked_for_a_list_of_them_is_refused():
    for several in ([Trajectory((TURN,))] * 2, [{"messages": chat(WORDS)}] * 2):
        with pytest.raises(MirageError, match=r"not a list of them; give them to vlm.generate"):
            as_prompt(several)

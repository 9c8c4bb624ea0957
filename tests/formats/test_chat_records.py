import json

import pytest
import torch
from samples import COLOURS, chat_record, picture, reference_record

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import detect_format, faults, from_record, to_record
from mirage_vlm.trajectory import (
    Image,
    LatentSpan,
    Trajectory,
    assistant_turn,
    user_turn,
)


def test_record_has_the_documented_form(folder):
    record = chat_record()
    assert to_record(from_record(record)) == record


def test_absent_keys_are_left_out():
    record = to_record(Trajectory((user_turn("?"), assistant_turn(LatentSpan(helper=Image("h.png"))))))
    assert record == {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "?"}]},
            {"role": "assistant", "content": [{"type": "latent", "helper": "h.png"}]},
        ]
    }


def test_relative_paths_start_at_base_and_urls_stay(folder):
    record = chat_record()
    record["messages"][0]["content"] += [
        {"type": "image", "image": "https://example.org/x.png"},
        {"type": "image", "image": str(folder / "images/other.png")},
    ]
    trajectory = from_record(record, base=folder)
    sources = [image.source for image in trajectory.images()]
    assert sources == [folder / "images/map.png", "https://example.org/x.png", folder / "images/other.png"]
    assert trajectory.spans[0].helper.source == folder / "images/helper.png"


def test_pictures_in_memory_are_embedded_as_png():
    record = to_record(Trajectory((user_turn(Image(picture("map")), Image(lambda: picture("other"))),)))
    parts = record["messages"][0]["content"]
    assert all(part["image"].startswith("data:image/png;base64,") for part in parts)
    colours = [image.load().getpixel((0, 0)) for image in from_record(record).images()]
    assert colours == [COLOURS["map"], COLOURS["other"]]


def test_image_source_says_what_is_written():
    trajectory = Trajectory((user_turn(Image("a")), assistant_turn(LatentSpan(helper=Image("b")))))
    record = to_record(trajectory, image_source=lambda image: f"<{image.source}>")
    assert record["messages"][0]["content"][0]["image"] == "<a>"
    assert record["messages"][1]["content"][0]["helper"] == "<b>"


def test_readings_are_kept():
    record = to_record(Trajectory((user_turn(Image("a.png", reading=("x", "y"))),)))
    assert record["messages"][0]["content"] == [{"type": "image", "image": "a.png", "reading": ["x", "y"]}]
    assert next(from_record(record).images()).reading == ("x", "y")


def test_content_may_be_a_string():
    trajectory = from_record({"messages": [{"role": "user", "content": "hello"}]})
    assert trajectory.messages == (user_turn("hello"),)


@pytest.mark.parametrize("value", [{"url": "images/map.png"}, "images/map.png"])
def test_openai_image_parts(folder, value):
    record = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": value}]}]}
    assert list(faults(record, base=folder)) == []
    (image,) = from_record(record, base=folder).images()
    assert image.source == folder / "images/map.png"


def test_trl_columns_fill_the_parts_without_a_picture(folder):
    record = chat_record()
    del record["messages"][0]["content"][0]["image"]
    record["messages"][0]["content"].append({"type": "image", "image": "images/other.png"})
    record["messages"][0]["content"].append({"type": "image"})
    del record["messages"][1]["content"][1]["helper"]
    record |= {"images": ["images/map.png", "images/helper.png"], "helpers": ["images/other.png"]}
    assert list(faults(record, base=folder)) == []
    trajectory = from_record(record, base=folder)
    assert [image.source.name for image in trajectory.images()] == ["map.png", "other.png", "helper.png"]
    assert trajectory.spans[0].helper.source.name == "other.png"


def test_nulls_count_as_absent():
    record = chat_record()
    record["messages"][1]["content"][1]["k"] = None
    record |= {"task": None, "answer": None, "meta": None, "decoding": None}
    trajectory = from_record(record)
    assert (trajectory.task, trajectory.answer, trajectory.meta, trajectory.decoding) == (
        None,
        None,
        {},
        None,
    )
    assert trajectory.spans[0].k is None


def test_bfloat16_latents_that_need_grad_are_written_as_float32():
    latents = torch.tensor([[1.5, -2.25]], dtype=torch.bfloat16, requires_grad=True)
    record = to_record(Trajectory((user_turn("?"), assistant_turn(LatentSpan(latents=latents)))))
    packed = record["messages"][1]["content"][0]["latents"]
    assert packed["shape"] == [1, 2] and packed["dtype"] == "float32"
    (span,) = from_record(json.loads(json.dumps(record))).spans
    assert span.latents.dtype == torch.float32 and span.latents.tolist() == [[1.5, -2.25]]


def test_from_record_raises_with_its_place():
    with pytest.raises(MirageError) as error:
        from_record({"messages": [{"role": "user"}], "answer": {}}, where="x.jsonl:7")
    assert str(error.value).startswith("x.jsonl:7: messages[0].content: is missing")
    assert str(error.value).endswith("(and 1 more fault)")


@pytest.mark.parametrize(
    ("record", "form"),
    [
        (chat_record(), "chat"),
        (reference_record(), "reference"),
        ({"level": 3, "id": 0, "map": []}, "vsp"),
        ({"steps": 1, "id": 0, "map": [], "plan": "U", "safe": True}, "vsp"),
        ({"map": []}, None),
        ({}, None),
        ([], None),
        ("text", None),
    ],
)
def test_detect_format(record, form):
    assert detect_format(record) == form

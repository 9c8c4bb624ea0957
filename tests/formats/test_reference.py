import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from samples import COLOURS, picture, reference_record, shape_of, write_lines

from mirage_vlm import formats
from mirage_vlm.errors import MirageError
from mirage_vlm.formats import Fault, faults, from_record
from mirage_vlm.trajectory import (
    Decoding,
    Image,
    LatentSpan,
    Message,
    Text,
    Trajectory,
    assistant_turn,
    user_turn,
)


def response_of(record: dict, folder: Path) -> list:
    assert list(faults(record, base=folder)) == []
    trajectory = from_record(record, base=folder)
    return [part.text if isinstance(part, Text) else part.helper.source.name for part in trajectory.response]


def test_reference_prompt(folder):
    one = from_record(reference_record(), base=folder)
    assert one.prompt == (user_turn(Image(folder / "images/map.png"), "Which way?"),)
    two = from_record(reference_record(image_input=["images/map.png", "images/other.png"]), base=folder)
    assert [image.source.name for image in two.images()] == ["map.png", "other.png"]
    none = from_record(reference_record(image_input=[]), base=folder)
    assert none.prompt == (user_turn("Which way?"),)


@pytest.mark.parametrize(
    ("text", "images", "response"),
    [
        ("Up.", "images/helper.png", ["helper.png", "Up."]),
        ("Up.", ["images/helper.png", "images/map.png"], ["helper.png", "map.png", "Up."]),
        ("Up.", [], ["Up."]),
        ("Up.", None, ["Up."]),
        ("a <output_image> b", "images/helper.png", ["a ", "helper.png", " b"]),
        ("a<image>b<image>", ["images/helper.png", "images/map.png"], ["a", "helper.png", "b", "map.png"]),
        (
            "<|latent_start|><|latent_pad|> <|latent_pad|><|latent_end|>b",
            ["images/map.png"],
            ["map.png", "b"],
        ),
        ("<|latent_start|><image><|latent_end|>b", ["images/map.png"], ["map.png", "b"]),
        (
            "a<image>b<|latent_start|><|latent_end|><output_image>",
            ["images/map.png", "images/helper.png", "images/other.png"],
            ["a", "map.png", "b", "helper.png", "other.png"],
        ),
    ],
)
def test_reference_response(folder, text, images, response):
    assert response_of(reference_record(text_output=text, image_output=images), folder) == response


def test_reference_extras(folder):
    record = reference_record(map_desc=["SF", "FG"], task="t", answer="U", meta={"id": 4})
    trajectory = from_record(record, base=folder)
    assert (trajectory.task, trajectory.answer) == ("t", "U")
    assert trajectory.meta == {"id": 4, "map": ["SF", "FG"]}


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"text_input": None}, "text_input", "is missing"),
        ({"text_output": 4}, "text_output", "must be a string"),
        ({"text_output": "a<image>b<image>"}, "text_output", "marks 2 latent spans, but image_output has 1"),
        ({"text_output": "<output_image>", "image_output": []}, "text_output", "marks 1"),
        ({"text_output": "<image>", "image_output": ["images/map.png"] * 2}, "text_output", "marks 1"),
        ({"text_output": "<|latent_start|>x"}, "text_output", "<|latent_start|>"),
        ({"image_input": "images/no.png"}, "image_input", "no such file"),
        ({"image_input": ["images/map.png", 3]}, "image_input[1]", "must be a path"),
        ({"image_output": ["images/map.png", "images/broken.png"]}, "image_output[1]", "not a picture"),
        ({"answer": {}}, "answer", "must be a text"),
        ({"meta": []}, "meta", "must be an object"),
    ],
)
def test_reference_faults(folder, changes, field, message):
    (fault,) = faults(reference_record(**changes), base=folder)
    assert fault.field == field and message in fault.message


@pytest.mark.parametrize("key", ["image_input", "image_output"])
def test_reference_pictures_must_be_named_or_denied(folder, key):
    record = reference_record()
    del record[key]
    assert list(faults(record, base=folder)) == [Fault(key, "is missing; where there is no picture, write []")]


def test_reference_paths_may_start_at_the_working_directory(folder, monkeypatch):
    """The reference implementation opens them from there; the data file's folder goes first."""
    (folder / "data").mkdir()
    path = write_lines(folder / "data/train.jsonl", reference_record())
    monkeypatch.chdir(folder)
    assert formats.read_jsonl(path)[0].spans[0].helper.load().getpixel((0, 0)) == COLOURS["helper"]
    (folder / "data/images").mkdir()
    picture("other").save(folder / "data/images/helper.png")
    assert formats.read_jsonl(path)[0].spans[0].helper.load().getpixel((0, 0)) == COLOURS["other"]


def test_reference_round_trip(folder):
    records = [
        reference_record(),
        reference_record(image_input=["images/map.png", "images/other.png"], map_desc=["SG"], answer="U", task="t"),
        reference_record(text_output="a <output_image> b", meta={"id": 3}),
        reference_record(text_output="a<output_image><output_image>", image_output=["images/map.png"] * 2),
        reference_record(image_output=["images/map.png"] * 2),
        reference_record(image_input=[], image_output=[]),
    ]
    path = write_lines(folder / "data.jsonl", *records)
    assert formats.write_reference(folder / "copy.jsonl", formats.read_jsonl(path)) == 6
    assert [json.loads(line) for line in (folder / "copy.jsonl").read_text().splitlines()] == records


def test_reference_pictures_in_memory_become_files(folder):
    trajectory = Trajectory(
        (
            user_turn(Image(picture("map")), "?"),
            assistant_turn(LatentSpan(helper=Image(picture("helper"))), "!"),
        )
    )
    formats.write_reference(folder / "data.jsonl", [trajectory])
    record = json.loads((folder / "data.jsonl").read_text())
    assert record["image_input"].startswith("data-images/") and record["image_output"].startswith("data-images/")
    assert shape_of(formats.read_jsonl(folder / "data.jsonl")[0]) == shape_of(trajectory)


SPAN = LatentSpan(helper=Image("h.png"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((user_turn("?"),), "one user turn and one assistant turn, not user"),
        (
            (Message("system", (Text("s"),)), user_turn("?"), assistant_turn("!")),
            "not system, user, assistant",
        ),
        ((user_turn("?", Image("a.png")), assistant_turn("!")), "pictures of the question before its text"),
        ((user_turn("?"), assistant_turn(SPAN, Image("a.png"))), "no pictures in the response"),
        ((user_turn("?"), assistant_turn("<image>", SPAN)), "reads '<image>'"),
        ((user_turn("?"), assistant_turn("<|latent_pad|>", SPAN)), "reads '<|latent_pad|>'"),
        ((user_turn("?"), assistant_turn(LatentSpan(k=3, helper=Image("h.png")))), "k = 3"),
        ((user_turn("?"), assistant_turn(LatentSpan(latents=torch.zeros(1, 2)))), "needs a helper image"),
        ((user_turn("?"), assistant_turn(replace(SPAN, latents=torch.zeros(1, 2)))), "decoded latents"),
    ],
)
def test_what_the_reference_format_cannot_hold_is_refused(folder, messages, message):
    with pytest.raises(MirageError) as error:
        formats.write_reference(folder / "data.jsonl", [Trajectory(messages)])
    assert str(error.value).startswith("example 1: the reference format") and message in str(error.value)
    with pytest.raises(MirageError, match="decoded tokens"):
        decoded = Trajectory((user_turn("?"), assistant_turn("!")), decoding=Decoding((1,), "stop"))
        formats.write_reference(folder / "data.jsonl", [decoded])
    assert not (folder / "data.jsonl").exists()

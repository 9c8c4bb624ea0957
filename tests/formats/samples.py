"""Records and trajectories that the tests of the formats share."""

import json
from pathlib import Path

import PIL.Image
import torch

from mirage_vlm.formats import from_record
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

COLOURS = {"map": (250, 10, 20), "helper": (10, 250, 20), "other": (10, 20, 250)}


def picture(name: str) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (5, 3), COLOURS[name])


def chat_record() -> dict:
    return {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "images/map.png"},
                    {"type": "text", "text": "Which way?"},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see: "},
                    {"type": "latent", "helper": "images/helper.png", "k": 4},
                    {"type": "text", "text": "↑ up."},
                ],
            },
        ],
        "task": "vsp-planning",
        "answer": "U",
        "meta": {"level": 3, "map": ["SF", "FG"]},
    }


def reference_record(**changes: object) -> dict:
    return {
        "text_input": "Which way?",
        "image_input": "images/map.png",
        "text_output": "Up.",
        "image_output": "images/helper.png",
        **changes,
    }


def shape_of(trajectory: Trajectory) -> list:
    """A trajectory as plain values; pictures as their colour."""

    def plain(segment):
        if isinstance(segment, Text):
            return segment.text
        if isinstance(segment, Image):
            return segment.load().getpixel((0, 0))
        helper = segment.helper and segment.helper.load().getpixel((0, 0))
        return (
            "latent",
            helper,
            segment.k,
            None if segment.latents is None else segment.latents.tolist(),
            segment.regions,
        )

    turns = [(message.role, [plain(segment) for segment in message.segments]) for message in trajectory.messages]
    return [turns, trajectory.task, trajectory.answer, trajectory.meta, trajectory.decoding]


def varied(folder: Path) -> list[Trajectory]:
    """Every kind of segment and picture source, several spans, turns and optional fields."""
    images = folder / "images"
    return [
        from_record(chat_record(), base=folder),
        Trajectory((user_turn("A prompt alone.", Image(picture("other"))),), meta={"deep": [1, {"é": None}]}),
        Trajectory(
            (
                Message("system", (Text("Be brief."),)),
                user_turn(Image(lambda: picture("map")), Image(str(images / "other.png")), "?"),
                assistant_turn(LatentSpan(helper=Image(picture("helper"))), "a\u2028b"),
                user_turn("And now?"),
                assistant_turn(
                    LatentSpan(helper=Image(images / "helper.png")),
                    LatentSpan(helper=Image(images / "map.png"), k=9),
                    LatentSpan(Image(images / "map.png"), regions=((0.0, 0.25, 0.5, 1.0), (0.1, 0.0, 1.0, 0.3))),
                    LatentSpan(k=1, regions=((0.0, 0.0, 1.0, 1.0),)),
                ),
            )
        ),
        Trajectory(
            (
                user_turn("decoded"),
                assistant_turn("x", LatentSpan(latents=torch.tensor([[0.1, -2.5e-8, 3.0], [4.0, 5.5, -6.0]])), "y"),
            ),
            decoding=Decoding((7, 8, 9), "length"),
        ),
        Trajectory((user_turn("silence"), assistant_turn()), decoding=Decoding((), "stop")),
    ]


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

"""What a picture may be given as: paths, URLs, bytes, arrays; and what is refused by name."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from mirage_vlm import formats
from mirage_vlm.adapters.messages import picture
from mirage_vlm.errors import MirageError
from mirage_vlm.formats.pictures import ImageFolder, as_given, embed, is_file, picture_fault, png, read_picture
from mirage_vlm.pictures import path_of, scheme_of
from mirage_vlm.trajectory import Image, LatentSpan, Text, Trajectory, assistant_turn, user_turn

RED = PIL.Image.new("RGB", (6, 4), (255, 0, 0))


@pytest.fixture
def red(tmp_path) -> Path:
    folder = tmp_path / "a b"
    folder.mkdir()
    RED.save(folder / "50% ü#?.png")
    return folder / "50% ü#?.png"


def asking(part: dict) -> dict:
    return {"messages": [{"role": "user", "content": [part]}]}


def urls(path: Path) -> list[str]:
    uri = path.as_uri()
    return [uri, uri.replace("file://", "file://localhost"), uri.replace("file://", "FILE:")]


# -- file URLs -------------------------------------------------------------------------------------------------------


def test_file_urls_are_read_wherever_paths_are(red, tmp_path):
    for url in urls(red):
        assert scheme_of(url) == "file" and path_of(url) == red
        assert Image(url).load().tobytes() == RED.tobytes() and Image(url).size() == (6, 4)
        assert picture(url).load().tobytes() == picture({"url": url}).load().tobytes() == RED.tobytes()
        assert picture_fault(url, tmp_path, True) is None and read_picture(url, tmp_path).source == red
        assert is_file(Image(url)) and as_given(Image(url)) == red.as_posix()
        assert formats.seen_from(tmp_path)(Image(url)) == red.relative_to(tmp_path).as_posix()
        assert ImageFolder(tmp_path / "images", tmp_path)(Image(url)) == red.relative_to(tmp_path).as_posix()
        assert embed(Image(url)).startswith("data:image/png")


def test_what_is_written_by_hand_without_escapes_is_read_too(red):
    assert path_of(f"file://{red}") == red


def test_file_urls_in_data_files(red, tmp_path):
    url = red.as_uri()
    for form, record in (
        ("chat", asking({"type": "image", "image": url})),
        ("openai", asking({"type": "image_url", "image_url": {"url": url}})),
        ("reference", {"text_input": "?", "image_input": url, "text_output": "!", "image_output": []}),
    ):
        path = tmp_path / f"{form}.jsonl"
        path.write_text(json.dumps(record) + "\n")
        (example,) = formats.read_jsonl(path)
        assert [image.load().tobytes() for image in example.images()] == [RED.tobytes()]
        formats.save_dataset_dir(tmp_path / form, [example])
        (again,) = formats.load_dataset_dir(tmp_path / form)
        assert [image.load().tobytes() for image in again.images()] == [RED.tobytes()]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file://elsewhere/map.png", "a file URL of another machine, 'elsewhere'; file:///folder/picture.png is one"),
        ("file://map.png", "a file URL of another machine, 'map.png'"),
        ("file:///", "a file URL without a path"),
        ("file:///a%00b.png", "holds a NUL character"),
        ("file:///nowhere/map.png", "no such file|No such file"),
    ],
)
def test_wrong_file_urls_are_one_line(tmp_path, url, message):
    with pytest.raises(MirageError, match=message) as at:
        Image(url).load()
    assert "\n" not in str(at.value)
    with pytest.raises(MirageError, match=message):
        picture(url).size()
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(asking({"type": "image", "image": url})) + "\n")
    with pytest.raises(MirageError, match=rf"data\.jsonl:1: messages\[0\]\.content\[0\]\.image: .*({message})"):
        formats.read_jsonl(path)


def test_a_path_that_only_looks_like_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RED.save("file:red.png")
    assert Image("file:red.png").load().tobytes() == RED.tobytes()


# -- what is no file -------------------------------------------------------------------------------------------------


@pytest.fixture
def strange(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.png"))
        yield {
            tmp_path / "pipe.png": "a named pipe",
            tmp_path / "folder.png": "a folder",
            tmp_path / "socket.png": "a socket",
            Path("/dev/zero"): "a device",
        }


def test_pipes_devices_and_folders_are_refused_at_once(strange, tmp_path):
    def refuse():
        for path, name in strange.items():
            for source in (path, str(path), path.as_uri()):
                for read in (Image.load, Image.size):
                    with pytest.raises(MirageError, match=f"cannot read the picture .*: is {name}, not a picture file"):
                        read(Image(source))
                assert f"is {name}, not a picture file" in str(picture_fault(str(source), None, True))
            for write in (png, embed):
                with pytest.raises(MirageError, match=f"is {name}"):
                    write(Image(path))
            with pytest.raises(MirageError, match=f"is {name}"):
                formats.save_dataset_dir(tmp_path / "dataset", [Trajectory((user_turn(Image(path)),))])
        done.append(True)

    done: list[bool] = []
    worker = threading.Thread(target=refuse, daemon=True)
    worker.start()
    worker.join(timeout=20)
    assert done, "something was waited for"


# -- what is in memory -----------------------------------------------------------------------------------------------


def encoded() -> bytes:
    content = io.BytesIO()
    RED.save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("turn", [user_turn, assistant_turn])
@pytest.mark.parametrize(
    "given",
    [
        RED,
        np.asarray(RED),
        np.asarray(RED) / 255,
        np.asarray(RED).astype(np.uint16) * 257,
        np.asarray(RED.convert("RGBA")),
        encoded(),
        bytearray(encoded()),
        memoryview(encoded()),
        Image(RED),
    ],
    ids=["PIL", "array", "floats", "16 bits", "with alpha", "bytes", "bytearray", "memoryview", "Image"],
)
def test_turns_take_pictures_as_they_are(turn, given):
    message = turn(given, "Which way?")
    shown, text = message.segments
    assert isinstance(shown, Image) and text == Text("Which way?")
    assert shown.load().tobytes() == RED.tobytes() and shown.size() == (6, 4)


def test_turns_take_paths(red):
    (shown,) = user_turn(red).segments
    assert shown == Image(red)
    assert user_turn(str(red)).segments == (Text(str(red)),), "a string is text"
    span = LatentSpan(k=2)
    assert assistant_turn(span, "Go").segments == (span, Text("Go"))


@pytest.mark.parametrize(
    ("given", "name"),
    [(None, "NoneType"), (5, "int"), (torch.zeros(3, 4, 4), "Tensor"), ({"type": "text"}, "dict"), (["a"], "list")],
)
def test_turns_name_what_they_do_not_take(given, name):
    with pytest.raises(MirageError, match=rf"user_turn takes text, pictures and latent spans, not {name}: user_turn\("):
        user_turn(given)
    with pytest.raises(MirageError, match=rf"assistant_turn takes text, pictures and latent spans, not {name}"):
        assistant_turn("a", given)
    if not isinstance(given, str):
        with pytest.raises(MirageError, match=f"a picture is given as .*, not as {name}"):
            Image(given).load()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\] is no picture; it must be \[height, width\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"shape \[1, 8, 8, 3\]"),
        (np.zeros(4, np.uint8), r"shape \[4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\] has no pixels"),
        (np.full((4, 4), "a"), "type <U1"),
        (np.zeros((4, 4), complex), "type complex128"),
        (np.full((4, 4, 3), np.nan), "type float64 has values that are not finite"),
        (np.full((4, 4, 3), -0.5), "type float64 has values from -0.5 to -0.5"),
        (np.full((4, 4), 1 << 20), "type int64 has values from"),
    ],
)
def test_arrays_that_are_no_pictures(array, message):
    with pytest.raises(MirageError, match=f"user_turn: .*{message}"):
        user_turn(array)
    with pytest.raises(MirageError, match=message):
        Image(array).load()


def test_arrays_of_every_kind():
    grey = np.uint8([[0, 200]])
    for array in (
        grey,
        grey[..., None],
        grey / 255,
        grey.astype(np.int64),
        grey.astype(np.float16),
        grey * 257.0 / 65535,
    ):
        assert np.asarray(Image(array).load())[..., 0].tolist() == grey.tolist()
    assert np.asarray(Image(grey > 100).load())[..., 0].tolist() == [[0, 255]]
    with_alpha = np.stack([grey, np.uint8([[0, 255]])], axis=-1)
    assert np.asarray(Image(with_alpha).load())[..., 0].tolist() == [[255, 200]]


# -- what is saved reads the same ------------------------------------------------------------------------------------


def test_a_saved_picture_reads_the_same(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    PIL.Image.fromarray(np.arange(96, dtype=np.uint8).reshape(4, 6, 4)).save(content, "PNG", exif=exif)
    given = PIL.Image.open(io.BytesIO(content.getvalue()))
    expected = Image(content.getvalue()).load().tobytes()
    url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    folder = ImageFolder(tmp_path / "images", tmp_path)
    for source in (given, content.getvalue(), url):
        image = Image(source)
        for again in (png(image), embed(image), tmp_path / folder(image)):
            assert Image(again).load().tobytes() == expected and Image(again).size() == (4, 6)
        formats.save_dataset_dir(tmp_path / f"{type(source).__name__}", [Trajectory((user_turn(image),))])
        (stored,) = formats.load_dataset_dir(tmp_path / f"{type(source).__name__}")
        (back,) = stored.images()
        assert back.load().tobytes() == expected and back.size() == (4, 6)

import base64
import functools
import io
from pathlib import Path

import PIL.Image
import pytest

from mirage_vlm.errors import MirageError
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

RED = PIL.Image.new("RGB", (6, 4), (255, 0, 0))


def png_bytes(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def same_picture(one: PIL.Image.Image, other: PIL.Image.Image) -> bool:
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()


@pytest.fixture
def example() -> Trajectory:
    return Trajectory(
        (
            Message("system", (Text("Be brief."),)),
            user_turn(Image("a.png"), "first?"),
            assistant_turn(LatentSpan(helper=Image("h0.png")), "one"),
            user_turn("second?", Image("b.png")),
            assistant_turn("see ", LatentSpan(helper=Image("h1.png")), "two", LatentSpan(helper=Image("h2.png"), k=3)),
        )
    )


class TestTrajectory:
    def test_prompt_is_everything_before_the_last_response(self, example):
        assert example.prompt == example.messages[:4]
        assert example.response == example.messages[4].segments

    def test_without_a_response_the_prompt_is_everything(self, example):
        asked = Trajectory(example.messages[:4])
        assert asked.prompt == asked.messages
        assert asked.response == () and asked.text == "" and asked.spans == ()

    def test_no_messages(self):
        assert Trajectory(()).prompt == () and Trajectory(()).response == ()

    def test_text_leaves_the_spans_out(self, example):
        assert example.text == "see two"

    def test_spans_are_those_of_the_last_response(self, example):
        assert [str(span.helper) for span in example.spans] == ["h1.png", "h2.png"]

    def test_images_are_those_of_the_prompt_in_order_without_helpers(self, example):
        assert [str(image) for image in example.images()] == ["a.png", "b.png"]

    def test_with_response_replaces_it_and_keeps_the_rest(self, example):
        decoding = Decoding((5, 6), "stop")
        other = example.with_response((Text("no"),), decoding)
        assert other.prompt == example.prompt and other.text == "no" and other.decoding is decoding
        assert example.text == "see two", "the original is untouched"

    def test_with_response_adds_one_where_there_is_none(self, example):
        asked = Trajectory(example.messages[:4], task="t", meta={"id": 1})
        answered = asked.with_response((Text("yes"),))
        assert answered.prompt == asked.messages and answered.text == "yes"
        assert (answered.task, answered.meta) == ("t", {"id": 1})


class TestImage:
    def test_every_kind_of_source_gives_the_same_picture(self, tmp_path):
        content = png_bytes(RED)
        path = tmp_path / "red.png"
        path.write_bytes(content)
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        sources = [
            path,
            str(path),
            url,
            RED,
            functools.partial(PIL.Image.open, path),
            path.as_uri().removeprefix("file://"),
        ]
        for source in sources:
            assert same_picture(Image(source).load(), RED), source

    def test_other_modes_become_rgb(self, tmp_path):
        RED.convert("P").save(tmp_path / "palette.png")
        RED.convert("RGBA").save(tmp_path / "alpha.png")
        for name in ("palette.png", "alpha.png"):
            assert same_picture(Image(tmp_path / name).load(), RED)

    @pytest.mark.parametrize("content", [b"", b"not a picture", png_bytes(RED)[:50]])
    def test_a_broken_file_is_named(self, tmp_path, content):
        path = tmp_path / "broken.png"
        path.write_bytes(content)
        with pytest.raises(MirageError, match=r"cannot read the picture .*broken\.png"):
            Image(path).load()

    @pytest.mark.parametrize(
        "url", ["data:image/png,abc", "data:image/png;base64,!!!", "data:image/png;base64,AAAA", "data:"]
    )
    def test_a_broken_data_url_is_an_error(self, url):
        with pytest.raises(MirageError, match="cannot read the picture data:"):
            Image(url).load()

    def test_a_missing_file_is_named(self):
        with pytest.raises(MirageError, match=r"nowhere/x\.png"):
            Image(Path("nowhere/x.png")).load()

    def test_long_urls_are_shortened_in_messages(self):
        assert len(str(Image("data:" + "A" * 1000))) == 80
        assert str(Image(RED)) == "(in memory)"


@pytest.mark.parametrize(
    ("given", "read"),
    [(3, "3"), (True, "true"), (0.5, "0.5"), (["a", 2], ("a", "2")), (("a",), "a"), ((), None), ([], None), ("A", "A")],
)
def test_an_answer_is_read_as_in_a_file(given, read):
    assert Trajectory((user_turn("q"),), answer=given).answer == read


def test_an_answer_that_is_none_is_named():
    with pytest.raises(MirageError, match="an answer must be a text"):
        Trajectory((user_turn("q"),), answer={"a": 1})

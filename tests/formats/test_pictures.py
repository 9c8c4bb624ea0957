"""Pictures out of the bytes of their files."""

import io
import pickle

import PIL.Image
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.pictures import from_bytes


def encoded(kind):
    content = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), "red").save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bytes_are_a_picture_also_in_another_process(kind):
    image = from_bytes(encoded(kind))
    for same in (image, pickle.loads(pickle.dumps(image))):
        assert same.size() == (6, 4)
        assert same.load().getpixel((1, 1))[0] > 200


def test_of_a_size_only_the_head_is_read():
    assert from_bytes(encoded("PNG")[:45]).size() == (6, 4)


def test_bytes_that_are_none_name_their_place():
    with pytest.raises(MirageError, match=r"data\.jsonl:3: p: is no picture that can be read"):
        from_bytes(b"no picture", "data.jsonl:3: p").load()
    with pytest.raises(MirageError, match="cannot identify"):
        from_bytes(b"no picture").load()

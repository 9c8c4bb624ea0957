"""Whatever bytes are given for a picture, it is an upright picture in RGB or one line that says what is wrong."""

from __future__ import annotations

import base64
import io

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import Fault
from mirage_vlm.formats.pictures import from_bytes, picture_fault
from mirage_vlm.trajectory import Image

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"),
    "BMP": ("1", "L", "P", "RGB"),
}
KINDS = [(name, mode) for name, modes in MODES.items() for mode in modes]


def encoded(name: str, mode: str, orientation: int = 1) -> bytes:
    picture = PIL.Image.radial_gradient("L").resize((16, 8))
    picture = picture.convert(mode) if mode != "I;16" else picture.convert("I").convert("I;16")
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    more = {} if name in ("GIF", "BMP") else {"exif": exif}
    picture.save(file, name, **more)
    return file.getvalue()


def tried(image: Image) -> None:
    """Loaded, in RGB and of the size that was said; or one line."""
    try:
        loaded = image.load()
    except MirageError as fault:
        assert "\n" not in str(fault), fault
        return
    assert loaded.mode == "RGB"
    assert loaded.size == image.size()


@pytest.mark.parametrize(("name", "mode"), KINDS)
@pytest.mark.parametrize("orientation", [0, 1, 6, 8, 9, 255])
def test_sound_pictures(name, mode, orientation):
    image = from_bytes(encoded(name, mode, orientation), "x")
    loaded = image.load()
    assert loaded.mode == "RGB"
    sideways = orientation in (6, 8) and name not in ("GIF", "BMP")
    assert loaded.size == image.size() == ((8, 16) if sideways else (16, 8))


@FUZZ
@given(kind=st.sampled_from(KINDS), changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=12))
def test_damaged_pictures(kind, changes):
    content = bytearray(encoded(*kind, 6))
    for place, value in changes:
        content[place % len(content)] = value
    tried(from_bytes(bytes(content), "x"))


@FUZZ
@given(kind=st.sampled_from(KINDS), share=st.floats(0, 1))
def test_cut_pictures(kind, share):
    content = encoded(*kind)
    tried(from_bytes(content[: int(share * len(content))], "x"))


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    tried(Image(path))
    tried(Image("data:image/png;base64," + base64.b64encode(content).decode()))


VALUES = st.text(max_size=30) | st.sampled_from(
    ["file://", "file:///", "data:,", "data:;base64,", "http://", "~", ".", "/"]
)


@FUZZ
@given(
    value=VALUES | st.integers() | st.none() | st.dictionaries(st.sampled_from(["path", "bytes"]), st.text(max_size=5))
)
def test_any_value_in_a_record(tmp_path, value):
    said = picture_fault(value, tmp_path, True)
    assert said is None or "\n" not in str(Fault("image", said))

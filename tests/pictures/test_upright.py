"""Every picture as people see it: upright, in RGB, on white, with the range of its greys."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.trajectory import Image, user_turn

CASES = Path(__file__).parents[1] / "data" / "cases"
STORED = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)  # rows as they lie in the file

# what the standard says of each value of the tag: where the file's first row and first column are seen
SEEN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda a: a.swapaxes(0, 1)[::-1],  # left, bottom
}


def pixels(source) -> np.ndarray:
    picture = Image(source).load()
    assert picture.mode == "RGB" and not picture.info and picture.size == Image(source).size()
    return np.asarray(picture)


def file_of(picture: PIL.Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def opened(content: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(content))


def turned(array: np.ndarray, kind: str, orientation: int, **options) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return file_of(PIL.Image.fromarray(array), kind, exif=exif, **options)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(samples: bytes, width: int, depth: int, colour: int, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG of one row, written by hand."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" + samples))
    return b"\x89PNG\r\n\x1a\n" + head + before + body + behind + chunk(b"IEND", b"")


# -- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
class TestOrientation:
    def test_a_file_is_read_upright(self, tmp_path, kind, options, orientation):
        content = turned(STORED, kind, orientation, **options)
        stored = np.asarray(opened(turned(STORED, kind, 1, **options)).convert("RGB"))
        path = tmp_path / "picture"
        path.write_bytes(content)
        expected = SEEN[orientation](stored)
        for source in (path, content):
            assert Image(source).size() == expected.shape[1::-1]
            assert np.array_equal(pixels(source), expected)

    def test_a_picture_in_memory_is_read_upright_at_any_time(self, kind, options, orientation):
        content = turned(STORED, kind, orientation, **options)
        expected = pixels(content)
        fresh, loaded = opened(content), opened(content)
        loaded.load()
        for given in (fresh, loaded, opened(content).copy(), opened(content).convert("RGB")):
            before = given.mode
            assert Image(given).size() == expected.shape[1::-1]
            assert np.array_equal(pixels(given), expected)
            assert np.array_equal(pixels(given), expected), "and the second time too"
            assert given.mode == before

    def test_the_model_sees_the_upright_picture(self, tiny, kind, options, orientation):
        seen = SEEN[orientation](np.asarray(opened(turned(STORED, kind, 1, **options)).convert("RGB")))
        ids, found = tiny.encoder.prompt([user_turn(Image(turned(STORED, kind, orientation, **options)), "Go")])
        wanted_ids, wanted = tiny.encoder.prompt([user_turn(PIL.Image.fromarray(np.ascontiguousarray(seen)), "Go")])
        assert ids == wanted_ids and found.keys == wanted.keys


def test_a_png_may_say_so_behind_its_pixels(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    behind = png_of(b"\1\2\3", 3, 8, 0, behind=chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    assert pixels(behind)[:, :, 0].tolist() == [[1], [2], [3]]
    given = opened(behind)
    assert Image(given).size() == (1, 3) and np.array_equal(pixels(given), pixels(behind))


@pytest.mark.filterwarnings("ignore")  # Pillow's own, of what it skips
@pytest.mark.parametrize("exif", [b"rubbish", b"", b"II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_broken_metadata_leave_a_picture_as_it_lies(exif):
    assert pixels(png_of(b"\1\2\3", 3, 8, 0, before=chunk(b"eXIf", exif)))[:, :, 0].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_is_none(orientation):
    assert np.array_equal(pixels(turned(STORED, "PNG", orientation)), STORED)


def test_of_a_size_only_the_head_is_read(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(turned(STORED, "PNG", 6)[:150])
    assert Image(path).size() == (24, 40)
    with pytest.raises(MirageError, match=r"cannot read the picture .*cut\.png"):
        Image(path).load()


# -- modes -----------------------------------------------------------------------------------------------------------


def test_transparency_lies_on_white():
    rgba = PIL.Image.fromarray(np.uint8([[[9, 8, 7, 0], [9, 8, 7, 255], [100, 0, 200, 128]]]))
    on_white = [[[255, 255, 255], [9, 8, 7], [178, 127, 228]]]
    assert np.abs(pixels(rgba).astype(int) - on_white).max() <= 1
    assert np.array_equal(pixels(file_of(rgba, "PNG")), pixels(rgba))
    assert np.abs(pixels(rgba.convert("RGBa")).astype(int) - on_white).max() <= 2
    for grey in (rgba.convert("LA"), rgba.convert("LA").convert("La")):
        assert pixels(grey)[0, 0].tolist() == [255] * 3 and pixels(grey)[0, 1].tolist() == [8] * 3


@pytest.mark.parametrize("key", [1, b"\xff\x00\x80"])
def test_palettes_with_and_without_transparency(key):
    flat = PIL.Image.fromarray(np.uint8([[0, 1, 2]])).convert("P")
    flat.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert pixels(flat).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    last = [70, 80, 90] if key == 1 else [162, 167, 172]
    found = pixels(file_of(flat, "PNG", transparency=key))
    assert np.abs(found.astype(int) - [[[10, 20, 30], [255, 255, 255], last]]).max() <= 1
    if key == 1:
        assert np.array_equal(pixels(file_of(flat, "GIF", transparency=1)), found)
        flat.info["transparency"] = 1
        assert np.array_equal(pixels(flat), found)


def test_a_palette_with_an_alpha_channel():
    found = PIL.Image.new("PA", (2, 1))
    found.putpalette([10, 20, 30, 40, 50, 60])
    found.putdata([(1, 0), (1, 255)])
    assert pixels(found).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    flat = PIL.Image.fromarray(np.uint8([[0, 1]])).convert("P")
    flat.putpalette([10, 20, 30, 0, 40, 50, 60, 255], "RGBA")
    assert pixels(flat).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png_of(b"\x40", 2, 1, 0, chunk(b"tRNS", b"\0\0")), [255, 255]),
        (png_of(b"\x40", 2, 1, 0), [0, 255]),
        (png_of(b"\x60", 2, 2, 0, chunk(b"tRNS", b"\0\1")), [255, 170]),
        (png_of(b"\x6a", 2, 4, 0, chunk(b"tRNS", b"\0\6")), [255, 170]),
        (png_of(b"\x60\x0a", 2, 8, 0, chunk(b"tRNS", b"\0\x60")), [255, 10]),
        (png_of(b"\x60\0\x60\1", 2, 16, 0, chunk(b"tRNS", b"\x60\0")), [255, 96]),
        (png_of(b"\1\1\1\4\4\4", 2, 8, 2, chunk(b"tRNS", b"\0\1\0\1\0\1")), [255, 4]),
        (png_of(b"\1\0\1\0\1\0\4\0\4\0\4\0", 2, 16, 2, chunk(b"tRNS", b"\1\0\1\0\1\0")), [255, 4]),
    ],
    ids=["1 bit", "1 bit without", "2 bits", "4 bits", "8 bits", "16 bits", "RGB", "RGB of 16 bits"],
)
def test_a_colour_that_a_png_declares_transparent_is_white(content, expected):
    assert pixels(content)[0, :, 0].tolist() == expected


def test_black_and_white():
    bits = np.uint8([[0, 255, 255, 0]])
    assert pixels(PIL.Image.fromarray(bits).convert("1")).tolist() == np.repeat(bits[..., None], 3, -1).tolist()


GREY = np.uint8([[0, 1, 46, 128, 254, 255]])


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_grey_of_16_bits_keeps_its_range(mode):
    values = GREY.astype(np.uint16) * 257
    raw = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    assert pixels(PIL.Image.frombytes(mode, (6, 1), raw))[..., 0].tolist() == GREY.tolist()


@pytest.mark.parametrize(
    "values",
    [GREY.astype(np.int32), GREY.astype(np.int32) * 257, GREY / np.float32(255), GREY.astype(np.float32)],
    ids=["I to 255", "I to 65535", "F to 1", "F to 255"],
)
def test_grey_of_32_bits_keeps_its_range(values):
    picture = PIL.Image.fromarray(values)
    assert picture.mode in ("I", "F")
    for source in (picture, file_of(picture, "TIFF"), values):
        assert pixels(source)[..., 0].tolist() == GREY.tolist()


@pytest.mark.parametrize(
    "values",
    [
        np.int32([[0, 70000]]),
        np.int32([[-1, 255]]),
        np.int32([[0, 300]]),  # of 16 bits it would be black
        np.float32([[0, 1.2]]),
        np.float32([[-1, 1]]),
        np.float32([[0, 3000]]),
        np.float32([[0, np.nan]]),
        np.float32([[0, np.inf]]),
    ],
)
def test_grey_of_no_known_range_is_refused_in_one_line(tmp_path, values):
    picture = PIL.Image.fromarray(values)
    picture.save(tmp_path / "grey.tif")
    with pytest.raises(
        MirageError, match=rf"grey\.tif: its mode {picture.mode} has values .*convert it to 8 bits"
    ) as at:
        Image(tmp_path / "grey.tif").load()
    assert "\n" not in str(at.value)


def test_a_tiff_whose_zero_is_white():
    tags = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    picture = PIL.Image.fromarray(GREY.astype(np.uint16) * 257)
    content = bytearray(file_of(picture, "TIFF"))
    place = content.index(struct.pack("<HHIH", 262, 3, 1, 1)) + 8
    content[place : place + 2] = b"\0\0"
    assert pixels(bytes(content))[..., 0].tolist() == (255 - GREY).tolist()


def test_the_colours_of_print_and_video():
    red = PIL.Image.new("RGB", (16, 16), (200, 30, 40))
    for mode, near in (("CMYK", 0), ("YCbCr", 2), ("HSV", 3), ("RGBX", 0)):
        assert np.abs(pixels(red.convert(mode)).astype(int) - np.asarray(red)).max() <= near, mode
    assert np.abs(pixels(file_of(red.convert("CMYK"), "JPEG")).astype(int) - np.asarray(red)).max() <= 6
    assert np.abs(pixels(PIL.Image.new("LAB", (2, 2), (255, 128, 128))).astype(int) - 255).max() <= 1
    assert pixels(PIL.Image.new("LAB", (2, 2), (0, 128, 128))).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [PIL.Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "green")]
    content = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(content).astype(int) - [255, 0, 0]).max() <= 3


def test_no_pixels():
    for read in (Image.load, Image.size):
        with pytest.raises(MirageError, match="a picture of 0 x 4 has no pixels"):
            read(Image(PIL.Image.new("RGB", (0, 4))))


# -- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Pillow's own, of what it skips
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "ICO", "TGA", "JPEG2000"])
def test_damaged_files_are_read_or_refused_in_one_line(kind):
    """Whatever Pillow's decoders raise; never another exception."""
    whole = file_of(PIL.Image.fromarray(STORED).convert("P" if kind == "GIF" else "RGB"), kind)
    rng = np.random.default_rng(1)
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, min(len(content), 400), rng.integers(1, 6)):
            content[place] = rng.integers(0, 256)
        content = bytes(content[: rng.integers(1, len(content) + 1)] if rng.random() < 0.3 else content)
        for read in (Image.load, Image.size):
            try:
                read(Image(content))
            except MirageError as fault:
                assert "\n" not in str(fault)


def test_a_decompression_bomb(monkeypatch, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(file_of(PIL.Image.fromarray(STORED), "PNG"))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MirageError, match=r"cannot read the picture .*bomb\.png: .*exceeds limit"):
        Image(path).load()


# -- the cases of the issue ------------------------------------------------------------------------------------------


def test_maps_as_phones_and_other_programs_save_them(tmp_path):
    plain, grey = pixels(CASES / "map.png"), pixels(CASES / "map-grey.png")
    assert np.array_equal(pixels(CASES / "map-exif6.png"), plain)
    assert np.abs(pixels(CASES / "map-exif6.jpg").astype(int) - plain).mean() < 4
    assert np.array_equal(pixels(CASES / "map-16bit.png"), grey)
    PIL.Image.fromarray(grey[..., 0] / np.float32(255)).save(tmp_path / "float.tif")
    assert np.array_equal(pixels(tmp_path / "float.tif"), grey)
    given = np.asarray(PIL.Image.open(CASES / "map-alpha.png"))
    alpha = pixels(CASES / "map-alpha.png")
    assert (alpha[given[..., 3] == 0] == 255).all()
    assert np.array_equal(alpha[given[..., 3] == 255], given[given[..., 3] == 255][:, :3])

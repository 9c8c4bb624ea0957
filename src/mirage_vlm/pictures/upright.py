"""What is seen in a picture of Pillow: upright, in RGB."""

from __future__ import annotations

import io
import struct
from typing import Any

import PIL.Image
import PIL.TiffImagePlugin

from mirage_vlm.pictures.arrays import eight_bits

ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # tags of EXIF and TIFF
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
LYING = (5, 6, 7, 8)  # orientations in which width and height change places
PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")  # modes that Pillow converts to RGB
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
KEYED = ("1", "L", "RGB", "I", "I;16")  # modes in which one colour may be transparent
KEY_SCALES = {"1": 255, "L;1": 255, "L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # of a PNG's samples to Pillow's pixels


def upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture as people see it, in RGB and without metadata; the picture itself is left as it is.

    Raises:
        ValueError: it has no pixels, or a mode or values that are not understood.
    """
    _check_size(picture)
    samples = _samples(picture)  # which Pillow forgets as it loads
    inverted = getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == 0
    picture.load()
    plain = _rgb(picture, samples, inverted)
    if not isinstance(picture, PIL.TiffImagePlugin.TiffImageFile):  # which Pillow has turned as it was loaded
        turn = TURNS.get(_orientation(picture))
        plain = plain if turn is None else plain.transpose(turn)
    plain.info = {}
    return plain


def _check_size(picture: PIL.Image.Image) -> None:
    if 0 in picture.size:
        raise ValueError(f"a picture of {picture.width} x {picture.height} has no pixels")


def _orientation(picture: PIL.Image.Image) -> int:
    """How a picture is to be turned, as EXIF counts it."""
    if picture.format == "PNG" and "exif" not in picture.info and getattr(picture, "fp", None) is not None:
        if not _speaks_late(picture.fp):  # type: ignore[attr-defined]
            # Pillow would decode all of the picture to see that nothing follows it; what stands before it is there
            picture = _Head(picture.info)
        else:
            picture.load()
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # all kinds: broken metadata do not spoil a picture, and viewers show it as it lies
        return 1
    return found if isinstance(found, int) else 1


class _Head(PIL.Image.Image):
    """The metadata of a picture without its pixels."""

    def __init__(self, info: dict[Any, Any]):
        super().__init__()
        self.info = info


def _speaks_late(file: Any) -> bool:
    """Whether a PNG file has metadata behind its pixels. Only the heads of its parts are read."""
    place, pixels = file.tell(), False
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            pixels = pixels or kind == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _samples(picture: PIL.Image.Image) -> str:
    """How the file of a picture that is not loaded yet stores its samples, in Pillow's words."""
    tile = getattr(picture, "tile", None)
    args = tile[0][3] if tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _rgb(picture: PIL.Image.Image, samples: str, inverted: bool) -> PIL.Image.Image:
    """A loaded picture in RGB, as it lies.

    Args:
        samples: see `_samples`.
        inverted: its black is white, where Pillow has not seen to it.
    """
    mode, key = picture.mode, picture.info.get("transparency")
    if mode != "P" and not isinstance(key, tuple if mode == "RGB" else int):
        key = None  # left over from another mode
    deep = mode in ("I", "F") or mode.startswith("I;16")
    if mode in ALPHA or (mode == "P" and (key is not None or _palette_mode(picture).endswith("A"))):
        clear = picture.convert("LA" if mode == "La" else "RGBA").convert("RGBA")
        plain = PIL.Image.new("RGB", clear.size, "white")
        plain.paste(clear, mask=clear.getchannel("A"))
        return plain
    if mode == "LAB":
        return _from_lab(picture)
    if not deep and mode not in PLAIN:
        raise ValueError(f"its mode, {mode}, is not understood; save it in RGB or L")
    plain = _from_deep(picture, samples, inverted) if deep else picture.convert("RGB")
    return (
        plain if key is None or mode not in ("1", "L", "RGB", "I", "I;16") else _without(plain, picture, key, samples)
    )


def _palette_mode(picture: PIL.Image.Image) -> str:
    return "" if picture.palette is None else str(picture.palette.mode)


def _without(plain: PIL.Image.Image, picture: PIL.Image.Image, key: Any, samples: str) -> PIL.Image.Image:
    """A picture in RGB with white where its pixels are of the colour that its file declares transparent."""
    import numpy as np

    if picture.mode == "1":
        picture = picture.convert("L")
    clear = np.asarray(picture) == np.floor(np.multiply(key, KEY_SCALES.get(samples, 1)))
    pixels = np.array(plain)
    pixels[clear.all(axis=-1) if clear.ndim == 3 else clear] = 255
    return PIL.Image.fromarray(pixels)


def _from_lab(picture: PIL.Image.Image) -> PIL.Image.Image:
    try:
        from PIL import ImageCms

        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        found = ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
    except ImportError as fault:
        raise ValueError("its mode, LAB, needs a Pillow with colour management; save it in RGB") from fault
    assert found is not None  # it is where the conversion is not in place
    return found


def _from_deep(picture: PIL.Image.Image, samples: str, inverted: bool) -> PIL.Image.Image:
    """Grey of more than 8 bits in RGB."""
    import numpy as np

    if picture.mode.startswith("I;16"):
        white: int | None = 4095 if samples == "I;12" else 65535
    else:  # of the formats that Pillow opens in mode I, these say that it is 16 bits
        white = 65535 if picture.mode == "I" and picture.format in ("PNG", "PPM") else None
    grey = eight_bits(np.asarray(picture), f"mode {picture.mode}", white)
    return PIL.Image.fromarray(255 - grey if inverted else grey).convert("RGB")


def upright_size(picture: PIL.Image.Image) -> tuple[int, int]:
    """(width, height) of a picture when it is upright; of one that is not loaded yet only the head is read."""
    _check_size(picture)
    width, height = picture.size
    if not isinstance(picture, PIL.TiffImagePlugin.TiffImageFile):
        return (height, width) if _orientation(picture) in LYING else (width, height)
    turned = picture.tag_v2.get(ORIENTATION)  # which newer versions of Pillow forget as they turn it
    if turned is not None:
        width, height = picture.tag_v2[256], picture.tag_v2[257]
    return (height, width) if turned in LYING else (width, height)

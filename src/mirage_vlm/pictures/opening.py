"""From whatever gives a picture to the picture."""

from __future__ import annotations

import base64
import io
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from mirage_vlm.errors import MirageError
from mirage_vlm.pictures.arrays import from_array, is_array
from mirage_vlm.pictures.places import check_file, path_of, scheme_of
from mirage_vlm.pictures.upright import upright, upright_size

Source = str | Path | bytes | PIL.Image.Image | Callable[[], PIL.Image.Image]


def load(source: Source) -> PIL.Image.Image:
    """The picture of a source, upright, in RGB and without metadata; one of the caller's is left as it is.

    Raises:
        OSError, ValueError: there is none, it cannot be decoded, or it has a mode or values that are not understood.
        MirageError: a file URL is wrong.
    """
    with _opened(source) as picture, _decoding():
        return upright(picture)


def size(source: Source) -> tuple[int, int]:
    """(width, height) of the upright picture; of a file only the head is read.

    Raises:
        OSError, ValueError, MirageError: as `load`, as far as the head shows it.
    """
    with _opened(source) as picture, _decoding():
        return upright_size(picture)


@dataclass(frozen=True)
class Encoded:
    """A drawing function for the content of a picture file.

    Attributes:
        content: the file's bytes.
        where: what messages name; empty where nothing is known.
    """

    content: bytes
    where: str = ""

    def __call__(self) -> PIL.Image.Image:
        """The picture, of which only the head is read yet."""
        return _open(io.BytesIO(self.content), self.where)


@contextmanager
def _opened(source: Any) -> Iterator[PIL.Image.Image]:
    """The picture of a source as Pillow has it.

    Raises:
        OSError, ValueError: there is none.
    """
    scheme = scheme_of(source)
    if isinstance(source, PIL.Image.Image):
        yield source
    elif isinstance(source, bytes | bytearray | memoryview):
        yield _open(io.BytesIO(source))
    elif is_array(source):
        yield from_array(source)
    elif callable(source):
        drawn = source()
        if not isinstance(drawn, PIL.Image.Image):
            raise ValueError(f"what is to draw it gives {type(drawn).__name__}, not a PIL picture")
        yield drawn
    elif scheme == "data":
        head, _, payload = str(source).partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError("a data URL must be base64")
        yield _open(io.BytesIO(base64.b64decode(payload, validate=True)))
    elif scheme == "http":
        with urllib.request.urlopen(str(source), timeout=30) as reply:
            content = reply.read()
        yield _open(io.BytesIO(content))
    elif scheme:
        path = path_of(source)
        check_file(path)
        with _open(path) as picture:
            yield picture
    else:
        raise ValueError(
            f"a picture is given as a PIL picture, a path, a URL, the bytes of a file or an array, not as "
            f"{type(source).__name__}"
        )


def _open(file: Path | io.BytesIO, where: str = "") -> PIL.Image.Image:
    with _decoding():
        try:
            return PIL.Image.open(file)
        except PIL.UnidentifiedImageError as fault:
            if where:
                raise OSError(f"{where}: is no picture that can be read") from fault
            if isinstance(file, Path):
                raise
            raise OSError("cannot identify image file: its bytes are those of no known kind") from fault


@contextmanager
def _decoding() -> Iterator[None]:
    """Pillow's decoders raise all kinds of exceptions at damaged files; here they are one.

    Raises:
        OSError, ValueError: a picture cannot be decoded.
    """
    try:
        yield
    except (OSError, ValueError, MirageError):
        raise
    except Exception as fault:
        raise ValueError(f"cannot be decoded: {str(fault) or type(fault).__name__}") from fault

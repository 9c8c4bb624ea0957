"""Pictures in data files: a path, a file, http(s) or data URL, or the bytes kept by a Hugging Face dataset."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import shown, text_fault
from mirage_vlm.formats.writing import atomic_writer
from mirage_vlm.pictures import Encoded, check_file, path_of, scheme_of
from mirage_vlm.trajectory import Image

ImageSource = Callable[[Image], str]
"""Says how a picture is written into a record: a path, a URL or a data URL."""


def from_bytes(content: bytes, where: str = "") -> Image:
    """The picture of a file's content.

    Args:
        content: the file's bytes.
        where: what messages name.
    """
    return Image(Encoded(content, where))


def read_picture(value: Any, base: Path | None) -> Image:
    """The picture that a record's value stands for; the value is one in which `picture_fault` finds no fault.

    Args:
        value: a path, a URL, a data URL, `{"bytes", "path"}` as datasets store it, or a drawing function.
        base: the folder at which relative paths start; None is the working directory.
    """
    if isinstance(value, Mapping):
        content = value.get("bytes")
        return from_bytes(content) if content else read_picture(value["path"], base)
    if callable(value) or scheme_of(value) in ("data", "http"):
        return Image(value)
    path = path_of(value)
    return Image(base / path if base is not None else path)


def picture_fault(value: Any, base: Path | None, check_files: bool) -> str | None:
    """What is wrong with a record's picture; None where nothing is.

    Args:
        value: as for `read_picture`, or anything else that a faulty file holds.
        base: the folder at which relative paths start.
        check_files: also open and decode files, data URLs and stored bytes. http(s) URLs are never fetched.
    """
    if isinstance(value, Mapping):
        if content := value.get("bytes"):
            if not isinstance(content, bytes):  # JSON has none; the picture is written as a data URL there
                return f"must hold the bytes of a file under `bytes`, not {shown(content)}; JSON takes a data URL"
            return _decode_fault(read_picture(value, base)) if check_files else None
        value = value.get("path")
    if callable(value):
        return _decode_fault(Image(value)) if check_files else None
    if not isinstance(value, str) or not value:
        return f"must be a path, a URL or a data URL, not {shown(value)}"
    if "\0" in value:
        return "holds a NUL character, which no path has"
    if message := text_fault(value):
        return message
    try:
        image = read_picture(value, base)
    except MirageError as fault:  # a file URL that is none
        return str(fault)
    if not check_files or scheme_of(value) == "http":
        return None
    if scheme_of(value) == "data":
        return _decode_fault(image)
    assert isinstance(image.source, Path)
    try:
        status = image.source.stat()
    except FileNotFoundError:
        relative = base is not None and not path_of(value).is_absolute()
        hint = "; relative paths start at the data file's folder" if relative else ""
        return f"no such file: {image.source}{hint}"
    except OSError as fault:
        return f"cannot be opened: {fault}"
    return _file_fault(str(image.source), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1 << 16)
def _file_fault(path: str, modified: int, size: int) -> str | None:
    """As `_decode_fault`; each version of a file is decoded once, however many examples show it."""
    return _decode_fault(Image(path))


def _decode_fault(image: Image) -> str | None:
    try:
        image.load()
    except MirageError as fault:
        reason = " ".join(str(fault.__cause__ or fault).split())
        return f"is not a picture that can be read ({reason})"
    return None


def png(image: Image) -> bytes:
    """The picture as the bytes of a PNG file.

    Raises:
        MirageError: it cannot be loaded.
    """
    buffer = io.BytesIO()
    image.load().save(buffer, "PNG")
    return buffer.getvalue()


def is_file(image: Image) -> bool:
    """Whether the picture is given as a path or a file URL."""
    return scheme_of(image.source) in ("path", "file")


def path_given(image: Image) -> Path:
    """The path of a picture for which `is_file` holds.

    Raises:
        MirageError: its file URL is wrong.
    """
    assert isinstance(image.source, str | Path)
    return path_of(image.source)


def file_of(image: Image) -> Path:
    """As `path_given`, for who opens the file without `Image.load`.

    Raises:
        MirageError: what is there is no file, such as a named pipe, for which nobody should wait.
    """
    path = path_given(image)
    try:
        check_file(path)
    except FileNotFoundError:  # whoever opens it says so
        return path
    except OSError as fault:
        raise MirageError(f"cannot read the picture {image}: {fault}") from fault
    return path


def embed(image: Image) -> str:
    """An image source that puts every picture into the record, as a data URL.

    http(s) URLs and data URLs stay as they are.

    Raises:
        MirageError: the picture cannot be loaded.
    """
    if isinstance(image.source, str) and not is_file(image):
        return image.source
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def as_given(image: Image) -> str:
    """The image source of `to_record`: paths and URLs as they are, pictures in memory as PNG data URLs.

    Raises:
        MirageError: a picture in memory cannot be drawn.
    """
    if is_file(image):
        plain = isinstance(image.source, str) and scheme_of(image.source) == "path"
        return str(image.source) if plain else path_given(image).as_posix()
    return embed(image)


def seen_from(folder: Path, otherwise: ImageSource = embed) -> ImageSource:
    """An image source for a data file in `folder`: picture files below it by their path from there.

    Files elsewhere get their absolute path, so that the data file reads the same from any working directory.

    Args:
        folder: where the data file is.
        otherwise: the image source for pictures that are not files.
    """
    root = folder.absolute()

    def write(image: Image) -> str:
        if not is_file(image):
            return otherwise(image)
        path = Path(os.path.normpath(path_given(image).absolute()))
        return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()

    return write


class ImageFolder:
    """An image source that saves pictures in memory as PNG files of one folder, the same picture once.

    Picture files and http(s) URLs are referred to where they are.
    """

    def __init__(self, folder: Path, data_folder: Path) -> None:
        """
        Args:
            folder: where the pictures go; made when the first is saved.
            data_folder: folder of the data file, from which the paths are seen.
        """
        self.folder = folder
        self._seen = seen_from(data_folder, otherwise=lambda image: str(image.source))

    def __call__(self, image: Image) -> str:
        """The path or URL to write for a picture.

        Raises:
            MirageError: it cannot be drawn, or the folder cannot be written.
        """
        if is_file(image) or scheme_of(image.source) == "http":
            return self._seen(image)
        return self._keep(png(image), ".png")

    def _keep(self, content: bytes, suffix: str) -> str:
        """Save a picture file under a name by its content; gives the path to write."""
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
        if not path.exists():
            with atomic_writer(path) as file:
                file.write(content)
        return self._seen(Image(path))

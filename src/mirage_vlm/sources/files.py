"""Picture files beside a data file, with the content that they have in somebody's data."""

from __future__ import annotations

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.pictures import ImageFolder
from mirage_vlm.pictures import Encoded
from mirage_vlm.trajectory import Image

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


class PictureFiles(ImageFolder):
    """An image source as `ImageFolder`, which saves encoded pictures as they are, not again as PNG."""

    def __call__(self, image: Image) -> str:
        """The path or URL to write for a picture.

        Raises:
            MirageError: it cannot be drawn, or the folder cannot be written.
        """
        if not isinstance(image.source, Encoded):
            return super().__call__(image)
        try:
            image.load()  # a file that is cut off, or that nobody can read, is found now, not when it is trained on
            suffix = SUFFIXES.get(image.source().format or "")
        except MirageError as fault:
            place, reason = image.source.where, str(fault.__cause__ or fault)
            raise MirageError(f"{place}: is no picture that can be read: {reason.removeprefix(place)}") from fault
        return super().__call__(image) if suffix is None else self._keep(image.source.content, suffix)

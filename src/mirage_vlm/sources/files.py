"""Picture files beside a data file, with the content that they have in somebody's data."""

from __future__ import annotations

import io

import PIL.Image

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.pictures import Encoded, ImageFolder
from mirage_vlm.trajectory import Image

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


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
            with PIL.Image.open(io.BytesIO(image.source.content)) as picture:
                suffix = SUFFIXES.get(picture.format or "")
                picture.load()  # a file that is cut off is found now, not when it is trained on
        except (OSError, ValueError, PIL.Image.DecompressionBombError) as fault:
            place = image.source.where
            raise MirageError(f"{place}: is no picture that can be read: {str(fault).removeprefix(place)}") from fault
        return super().__call__(image) if suffix is None else self._keep(image.source.content, suffix)

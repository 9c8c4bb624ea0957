"""Pictures, opened in one place: whatever is given becomes an upright RGB picture, or an error that says why not.

- Turned as its EXIF data says. Of an animation, the first frame (of one in memory, the frame it stands at).
- What is transparent, or half so, lies on white: an alpha channel as well as a colour that a file declares transparent.
- Grey of more than 8 bits keeps its range: white is 65535 in the modes I;16. Modes I and F, and arrays, say nothing of
  their white, so it goes by the values: whole numbers up to 255 or up to 65535, fractions up to 1 or up to 255. Where
  that is in doubt (negative values, larger ones, or so small ones that all would be black) the picture is refused.
- CMYK, YCbCr, HSV, palettes and black and white as Pillow converts them; LAB by its colour management.
- Only files are opened: a named pipe or a device would block, or never end.
"""

from mirage_vlm.pictures.arrays import from_array, is_array
from mirage_vlm.pictures.opening import Encoded, Source, load, size
from mirage_vlm.pictures.places import check_file, path_of, scheme_of
from mirage_vlm.pictures.upright import upright

__all__ = [
    "Encoded",
    "Source",
    "check_file",
    "from_array",
    "is_array",
    "load",
    "path_of",
    "scheme_of",
    "size",
    "upright",
]

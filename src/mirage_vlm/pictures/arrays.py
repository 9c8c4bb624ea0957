"""Values of pixels, of whatever type, as pictures of 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import PIL.Image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEAR = 1e-3  # of white: how far values may lie outside, as rounding leaves them


def eight_bits(values: NDArray[Any], name: str, white: int | None = None) -> NDArray[np.uint8]:
    """Values of pixels, of any number type, as bytes; which of them is white is found out where it is not given.

    Raises:
        ValueError: there is no rule for such values.
    """
    import numpy as np

    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    whole = values.dtype.kind in "iu"
    if not whole and not np.isfinite(values).all():
        raise ValueError(f"its {name} has values that are not finite; convert it to 8 bits")
    low, high = float(values.min()), float(values.max())
    doubtful = False  # so far below the white that they would have that they would be black
    if white is None and whole:
        white = 255 if high <= 255 else 65535
        doubtful = white == 65535 and high < 4096
    elif white is None:
        white = 1 if high <= 1 + NEAR else 255
        doubtful = white == 255 and high < 2
    if doubtful or low < -white * NEAR or high > white * (1 + NEAR):
        ranges = "0 to 255 and 0 to 65535" if whole else "0 to 1 and 0 to 255"
        raise ValueError(
            f"its {name} has values from {low:g} to {high:g}, of which nobody says what is white ({ranges} are known); "
            "convert it to 8 bits"
        )
    return np.rint(values.astype(np.float64) * (255 / white)).clip(0, 255).astype(np.uint8)


def is_array(value: object) -> bool:
    """Whether a value is an array of numpy, or of a library that speaks its protocol."""
    return hasattr(value, "__array_interface__") and not isinstance(value, PIL.Image.Image)


def from_array(value: Any) -> PIL.Image.Image:
    """A picture from an array [height, width] or [height, width, channels]: grey, grey and alpha, RGB, RGBA.

    Raises:
        ValueError: it has another shape or type, or values for which there is no rule.
    """
    import numpy as np

    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an array of type {array.dtype} is no picture; use uint8")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (2, 3, 4)):
        raise ValueError(
            f"an array of the shape {list(array.shape)} is no picture; it must be [height, width] or [height, width, "
            "channels] with 1 to 4 channels"
        )
    if not array.size:
        raise ValueError(f"an array of the shape {list(array.shape)} has no pixels")
    white = {"uint8": 255, "uint16": 65535}.get(str(array.dtype.newbyteorder("=")))
    return PIL.Image.fromarray(np.ascontiguousarray(eight_bits(array, f"type {array.dtype}", white)))

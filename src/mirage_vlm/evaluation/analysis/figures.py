"""What the pictures of the analyses share. They need matplotlib, which the extra `plot` installs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image

from mirage_vlm.formats import atomic_writer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# of kinds of vectors, the same in all pictures
COLOURS = {
    "latents": "#c4502f",
    "patches": "#2f7f93",
    "targets": "#7a5195",
    "prompt text": "#c9ccd1",
    "response text": "#8d939c",
    "words": "#8d939c",
    "span marks": "#e0b050",
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; it has no part in pyplot's state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, dpi: int = 90) -> None:
    """Write a figure as PNG, there in full or not at all.

    Raises:
        MirageError: the file cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    small = PIL.Image.open(drawn).convert("RGB").quantize(256)  # a third of the bytes, and nobody sees it
    with atomic_writer(path) as file:
        small.save(file, format="PNG", optimize=True)

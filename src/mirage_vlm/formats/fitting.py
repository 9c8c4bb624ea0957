"""What an encoder would refuse of an example, told from sizes alone: pictures' heads are read, never their pixels.

Without a model the bounds are those that no model of the Qwen-VL kind lifts; `mirage_vlm.modeling` has those of a
checkpoint.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import Fault
from mirage_vlm.pictures import scheme_of
from mirage_vlm.trajectory import Image, LatentSpan, Message, Trajectory

_PATCH, _FEWEST, _MOST, _SLIMMEST = 28, 56 * 56, 16384 * 28 * 28, 200  # of Qwen's own processors, in pixels
_TEMPLATE = (64, 32)  # tokens that a chat template adds at most: in all, and for each turn and picture


@dataclass(frozen=True)
class Bounds:
    """What a model takes.

    Attributes:
        patches: width and height of a picture → its merged patches; raises ValueError for one of an impossible shape.
            None: no picture is looked at.
        latent_size: latents of a span that does not say how many; None where that is not known.
        pooled: helper images are pooled to that many; otherwise each patch is a latent.
        prompted: the targets of all spans are taken from the prompt's first picture; None: not known.
        context: most positions of an example; None where that is not known.
        source: what the bounds are those of.
    """

    patches: Callable[[int, int], int] | None
    latent_size: int | None = None
    pooled: bool = True
    prompted: bool | None = None
    context: int | None = None
    source: str = " (of 28 pixels a side, as Qwen's models see it)"


def qwen_patches(width: int, height: int) -> int:
    """The merged patches of a picture in the usual sizes of Qwen2.5-VL.

    Raises:
        ValueError: it is more than 200 times as long as wide, or the other way round.
    """
    if max(width, height) / min(width, height) > _SLIMMEST:
        slim = max(width, height) / min(width, height)
        raise ValueError(f"one side is {slim:.0f} times the other, but a model takes at most {_SLIMMEST}")
    rows, columns = round(height / _PATCH), round(width / _PATCH)
    if rows * columns * _PATCH**2 > _MOST:
        shrunk = math.sqrt(height * width / _MOST)
        rows = max(1, math.floor(height / shrunk / _PATCH))
        columns = max(1, math.floor(width / shrunk / _PATCH))
    elif rows * columns * _PATCH**2 < _FEWEST:
        grown = math.sqrt(_FEWEST / (height * width))
        rows, columns = math.ceil(height * grown / _PATCH), math.ceil(width * grown / _PATCH)
    return rows * columns


ANY_MODEL = Bounds(qwen_patches)


def faults(
    trajectory: Trajectory, bounds: Bounds = ANY_MODEL, *, response: bool = True, targets: bool = True
) -> Iterator[Fault]:
    """What an encoder would refuse; fields are those of the chat form.

    Args:
        response: it is to be trained on; otherwise only the prompt is looked at.
        targets: its helper images are to be learnt from.
    """
    turns = len(trajectory.messages)
    last = turns - 1 if trajectory.prompt is not trajectory.messages else turns
    for i, message in enumerate(trajectory.messages):
        for j, segment in enumerate(message.segments):
            field = f"messages[{i}].content[{j}]"
            if i < last and isinstance(segment, LatentSpan):
                yield Fault(field, "an earlier turn holds a latent span; only the last response may have spans")
            elif i < last and isinstance(segment, Image):
                yield from _picture_faults(segment, f"{field}.image", bounds)
            elif response and isinstance(segment, Image):
                problem = (
                    "a response holds a picture; only prompts may have pictures (a span's helper image is not one)"
                )
                yield Fault(field, problem)
            elif response and isinstance(segment, LatentSpan):
                yield from _span_faults(segment, field, trajectory, bounds, targets)


def longest(trajectory: Trajectory, bounds: Bounds, *, response: bool = True) -> int:
    """A number of tokens that an example cannot have more of: as many as bytes, patches and latents."""
    messages: tuple[Message, ...] = trajectory.messages if response else trajectory.prompt
    total = _TEMPLATE[0]
    for message in messages:
        total += _TEMPLATE[1]
        for segment in message.segments:
            if isinstance(segment, LatentSpan):
                k = len(segment.regions) if segment.regions else segment.k or bounds.latent_size or 0
                if not bounds.pooled and segment.regions is None and segment.helper is not None:
                    k = patches_of(segment.helper, bounds) or 0
                total += k + 2
            elif isinstance(segment, Image):
                total += (patches_of(segment, bounds) or 0) + _TEMPLATE[1]
            else:
                total += len(segment.text.encode(errors="replace"))
    return total


def patches_of(image: Image, bounds: Bounds) -> int | None:
    """The merged patches of a picture; None where its size is not known, or impossible."""
    size = None if bounds.patches is None else size_of(image)
    try:
        return None if size is None or bounds.patches is None else bounds.patches(*size)
    except ValueError:
        return None


def size_of(image: Image) -> tuple[int, int] | None:
    """Width and height of a picture; None where it is not at hand, as one of the web, or cannot be read."""
    source = image.source
    try:
        if isinstance(source, Path):
            status = source.stat()
            return _size_of_file(str(source), status.st_mtime_ns, status.st_size)
        if isinstance(source, str) and scheme_of(source) == "http":
            return None
        return image.size()
    except (OSError, MirageError):  # which the check of the files tells
        return None


@functools.lru_cache(maxsize=1 << 16)
def _size_of_file(path: str, modified: int, size: int) -> tuple[int, int]:
    """Each version of a file is opened once, however many examples show it."""
    return Image(Path(path)).size()


def _picture_faults(image: Image, field: str, bounds: Bounds) -> Iterator[Fault]:
    if bounds.patches is None or (size := size_of(image)) is None:
        return
    try:
        bounds.patches(*size)
    except ValueError as fault:
        yield Fault(field, f"is {size[0]} x {size[1]} pixels, which no model takes: {fault}")


def _span_faults(
    span: LatentSpan, field: str, trajectory: Trajectory, bounds: Bounds, targets: bool
) -> Iterator[Fault]:
    if span.regions is not None and span.k not in (None, len(span.regions)):
        yield Fault(f"{field}.k", f"is {span.k}, but there are {len(span.regions)} regions")
        return
    seen, helper = next(trajectory.images(), None), span.helper
    if bounds.context is not None and (span.k or 0) > bounds.context:
        yield Fault(f"{field}.k", f"is {span.k}, but the model's context holds {bounds.context} positions")
        return
    if not targets and bounds.pooled:
        return
    if bounds.prompted:
        helper = seen
        if helper is None:
            yield Fault(field, "the targets are to be taken from the prompt's picture, but the prompt has none")
            return
    elif helper is None:
        known = bounds.prompted is not None or (seen is None and span.latents is None)
        if known:
            yield Fault(f"{field}.helper", "a latent span has no helper image, so it cannot be trained on")
        return
    if not bounds.prompted:
        yield from (slim := list(_picture_faults(helper, f"{field}.helper", bounds)))
        if slim:
            return
    k = span.k or bounds.latent_size
    patches = patches_of(helper, bounds)
    if bounds.pooled and span.regions is None and k is not None and patches is not None and k > patches:
        name = f"{field}.k" if span.k else f"{field}.helper"
        problem = f"k = {k} latents cannot be pooled from the {patches} patches of {helper}{bounds.source}"
        yield Fault(name, f"{problem}: lower latent_size (or the span's k), or use a larger helper image")

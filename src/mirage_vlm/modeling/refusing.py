"""What the encoder of a checkpoint would refuse of an example, with the field, before anything is encoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import fitting
from mirage_vlm.formats.faults import Fault
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling.encoding import Encoder


def bounds_of(encoder: Encoder) -> fitting.Bounds:
    """What a checkpoint takes."""
    config, family = encoder.config, encoder.family

    def patches(width: int, height: int) -> int:
        width, height = encoder.scaled((width, height))
        return encoder.image_processor.get_number_of_image_patches(height, width, {}) // family.merge**2

    return fitting.Bounds(
        patches,
        latent_size=config.latent_size,
        pooled=config.pooling != "full",
        prompted=config.target == "prompt",
        context=family.max_positions,
        source="",
    )


def faults(encoder: Encoder, trajectory: Trajectory, *, response: bool = True, targets: bool = True) -> Iterator[Fault]:
    """What `encoder.example`, or without a response `encoder.prompt`, would raise.

    Sizes tell nearly all. Only what could be longer than the context, or says what its patches are to be read as, is
    encoded for certainty.

    Args:
        response: it is to be trained on; otherwise only the prompt is looked at.
        targets: its helper images are to be learnt from.
    """
    bounds = bounds_of(encoder)
    found = list(fitting.faults(trajectory, bounds, response=response, targets=targets))
    yield from found
    if found:
        return
    read = response and any(image.reading is not None for image in trajectory.images())
    if not read and fitting.longest(trajectory, bounds, response=response) <= encoder.family.max_positions:
        return
    try:
        if response:
            encoder.example(trajectory, targets=False)
        else:
            encoder.prompt(trajectory.prompt)
    except MirageError as fault:
        yield Fault("messages", str(fault))

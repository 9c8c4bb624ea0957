"""How many pixels a picture may have: the limits of the image processor and those of a checkpoint's configuration."""

from __future__ import annotations

from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.config import LIMITS, LatentConfig, check_limits

EDGES = dict(
    zip(LIMITS, ("shortest_edge", "longest_edge"), strict=True)
)  # what transformers calls them: both are areas


def limits_of(image_processor: Any) -> dict[str, int | None]:
    """`min_pixels` and `max_pixels` of an image processor; None where it has no such limit."""
    size = image_processor.size
    return {name: size.get(edge) for name, edge in EDGES.items()}


def limited(image_processor: Any, config: LatentConfig) -> Any:
    """The image processor with the limits of a configuration; itself where they are its own.

    Raises:
        MirageError: together with what the processor says, they are none.
    """
    given = {name: value for name in LIMITS if (value := getattr(config, name)) is not None}
    if not given:  # a model that is only computed with may have no processor
        return image_processor
    there = limits_of(image_processor)
    wanted = there | given
    if wanted == there:
        return image_processor
    try:
        check_limits(**wanted)
    except MirageError as fault:
        said = " and ".join(f"{name}={there[name]}" for name in LIMITS if getattr(config, name) is None)
        raise MirageError(f"{fault}; the checkpoint's image processor has {said}") if said else fault from fault
    size = {edge: wanted[name] for name, edge in EDGES.items()}
    return type(image_processor).from_dict({**image_processor.to_dict(), "size": size})


def check_agreement(image_processor: Any, config: LatentConfig, where: str) -> None:
    """Whether the two files of a checkpoint that state the limits say the same.

    Raises:
        MirageError: they do not.
    """
    for name, value in limits_of(image_processor).items():
        stated = getattr(config, name)
        if stated is not None and stated != value:
            raise MirageError(
                f"{where}: config.json says {name} is {stated}, but preprocessor_config.json says {value} "
                f"(size.{EDGES[name]}); change it in both, or give {name} as you load it"
            )

"""What several commands share: reading option values, loading a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    from mirage_vlm.modeling import LatentVLM


def parse_levels(text: str, option: str = "--levels") -> tuple[int, ...]:
    """`3,4,5` → (3, 4, 5).

    Raises:
        MirageError: it is not a list of whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as fault:
        raise MirageError(f"{option} must be whole numbers with commas, such as 3,4,5,6; got {text!r}") from fault


def load_model(name: str, device: str | None = None) -> LatentVLM:
    """The checkpoint of a `--model` option, loaded without transformers' own progress bars and warnings.

    Raises:
        MirageError: it cannot be loaded.
    """
    from transformers.utils import logging

    from mirage_vlm.modeling import LatentVLM
    from mirage_vlm.modeling.bundled import resolve

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return LatentVLM.from_pretrained(resolve(name), device=device)

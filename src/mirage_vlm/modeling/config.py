"""What a checkpoint says about its latent spans."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mirage_vlm.errors import MirageError

LATENT_START = "<|latent_start|>"
LATENT_PAD = "<|latent_pad|>"
LATENT_END = "<|latent_end|>"
LATENT_TOKENS = (LATENT_START, LATENT_PAD, LATENT_END)

STOP_RULES = ("fixed", "learned")
LONGEST_MARK = 255  # bytes of a text after which a span is opened on demand
TARGETS = ("helper", "prompt")

# field of LatentConfig -> key of config.json; the first five are those of the reference implementation
_KEYS = {
    "latent_size": "latent_size",
    "pad_id": "latent_token_id",
    "start_id": "latent_start_id",
    "end_id": "latent_end_id",
    "pooling": "compress_strategy",
    "feedback": "latent_feedback",
    "stop_rule": "latent_stop_rule",
    "target": "latent_target",
    "places": "latent_places",
    "codes": "latent_codes",
    "evict_images": "latent_evict_images",
    "image_scale": "image_scale",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
}
_LEAST = {"latent_size": 1, "start_id": 0, "pad_id": 0, "end_id": 0, "codes": 1}  # whole numbers
_NAMES = ("pooling", "feedback", "stop_rule", "target")
_FLAGS = ("places", "evict_images")
LIMITS = ("min_pixels", "max_pixels")


@dataclass(frozen=True)
class LatentConfig:
    """The latent part of a checkpoint's `config.json`.

    Attributes:
        latent_size: k, the number of latent tokens of a span that does not state its own.
        start_id, pad_id, end_id: ids of the three special tokens, read from the tokenizer.
        pooling: how helper features become k targets; see `mirage_vlm.modeling.pooling`.
        feedback: how a hidden state becomes an input embedding; see `mirage_vlm.modeling.feedback`.
        stop_rule: `fixed` (a span has k latents) or `learned` (the model emits `latent_end`).
        target: whose features the targets are: the span's `helper` image, or the first picture of the `prompt`, as in
            "Latent Visual Reasoning" (arXiv 2509.24251), for spans with regions.
        places: the targets of regions also say where these lie; see `place_code` in `mirage_vlm.modeling.pooling`.
        codes: entries of the table, for the feedback `codebook`.
        evict_images: the model was trained with the prompt's pictures out of sight once a span has closed (`visibility:
            evict`), and is decoded so unless a request says otherwise.
        image_scale: factor by which pictures are resized before the image processor sees them.
        min_pixels, max_pixels: the image processor then resizes a picture of fewer or more pixels than these, as in
            Qwen's own processors; None: as the checkpoint's processor says.
    """

    latent_size: int
    start_id: int
    pad_id: int
    end_id: int
    pooling: str = "average"
    feedback: str = "identity"
    stop_rule: str = "fixed"
    target: str = "helper"
    places: bool = False
    codes: int = 256
    evict_images: bool = False
    image_scale: float = 1.0
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for name in _KEYS:
            if fault := _kind_fault(name, getattr(self, name)):
                raise MirageError(f"{name} {fault}")
        if len({self.start_id, self.pad_id, self.end_id}) < 3:
            ids = f"{self.start_id}, {self.pad_id} and {self.end_id}"
            raise MirageError(f"start_id, pad_id and end_id must be three different tokens, not {ids}")
        if self.stop_rule not in STOP_RULES:
            raise MirageError(f"unknown stop rule {self.stop_rule!r}; choose one of {', '.join(STOP_RULES)}")
        if self.target not in TARGETS:
            raise MirageError(f"unknown target {self.target!r}; choose one of {', '.join(TARGETS)}")
        check_limits(self.min_pixels, self.max_pixels)

    @classmethod
    def read(cls, config: Any, where: str) -> LatentConfig:
        """Read it from a transformers config.

        Raises:
            MirageError: a key of the latent tokens is missing, or a value is of the wrong kind.
        """
        missing = [_KEYS[name] for name in ("start_id", "pad_id", "end_id") if not hasattr(config, _KEYS[name])]
        if missing or not hasattr(config, "latent_size"):
            raise MirageError(
                f"{where}: the checkpoint has no latent tokens (config.json lacks "
                f"{', '.join(missing or ['latent_size'])}); train one with `mirage train`, or add the tokens with "
                "LatentVLM.from_base"
            )
        values = {name: getattr(config, key) for name, key in _KEYS.items() if hasattr(config, key)}
        for name, value in values.items():
            if fault := _kind_fault(name, value):
                raise MirageError(f"{where}: config.json: {_KEYS[name]} {fault}")
        try:
            return cls(**values)
        except MirageError as fault:
            raise MirageError(f"{where}: config.json: {fault}") from fault

    def write(self, config: Any) -> None:
        """Put it into a transformers config, so that it is saved in `config.json`."""
        for name, key in _KEYS.items():
            value = getattr(self, name)
            if value is not None:
                setattr(config, key, value)
            elif hasattr(config, key):
                delattr(config, key)


def _kind_fault(name: str, value: Any) -> str | None:
    """What is wrong with the kind of a field's value, whatever it came from; None where nothing is."""
    if name in _FLAGS:
        return None if isinstance(value, bool) else f"must be true or false, not {value!r}"
    if name in _NAMES:
        return None if isinstance(value, str) else f"must be a name, not {value!r}"
    if name in _LEAST:
        sound = type(value) is int and value >= _LEAST[name]
        return None if sound else f"must be a whole number of at least {_LEAST[name]}, not {value!r}"
    if name == "image_scale":
        sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        return None if sound else f"must be a number above 0, not {value!r}"
    return None


def check_limits(min_pixels: Any, max_pixels: Any) -> None:
    """Whether two limits of a picture's pixels are such; None is no limit of one's own.

    Raises:
        MirageError: one is no positive whole number, or the first is above the second.
    """
    for name, value in zip(LIMITS, (min_pixels, max_pixels), strict=True):
        if value is not None and (type(value) is not int or value < 1):
            raise MirageError(f"{name} must be a whole number of at least 1, not {value!r}")
    if None not in (min_pixels, max_pixels) and min_pixels > max_pixels:
        raise MirageError(f"min_pixels is {min_pixels}, above max_pixels, which is {max_pixels}")

"""Names that recipes choose by. They are apart from the tables they stand for, which need torch, so that a recipe is
refused before anything heavy is imported; `tests/training/test_light.py` holds names and tables to each other."""

from __future__ import annotations

POOLING_NAMES = ("average", "grid", "random", "full", "resampler")
FEEDBACK_NAMES = (
    "identity",
    "linear",
    "rescaled",
    "codebook",
    "codebook-one",
    "pointer",
    "pointer-one",
    "pause",
)

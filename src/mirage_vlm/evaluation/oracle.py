"""The targets of reference responses: what a model's latents are compared with, and replaced by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.encoding import boxes
from mirage_vlm.modeling.pooling import pool, span_length
from mirage_vlm.trajectory import LatentSpan, Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling import LatentVLM


def oracle_targets(
    vlm: LatentVLM,
    examples: Sequence[Trajectory],
    latent_size: int | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
    refused: Callable[[int, MirageError], None] | None = None,
) -> list[list[torch.Tensor]]:
    """What stands for targets [k, D] in each span of each reference response, in float32 on the CPU.

    With a table of codes that is the entry nearest to each target, as in training. Pooling `random` draws the same
    patches at each call, so that an evaluation can be resumed.

    Args:
        latent_size: k of all spans; None takes the span's, and then the checkpoint's.
        lengths: for each example the k of each span that is wanted instead, of the reference's spans in order and again
            from the first where there are fewer. Pooling `full` gives way to `average` here; of regions, so many are
            taken at even distances.

    Raises:
        MirageError: a reference has no helper image, one cannot be read, or k is larger than its patches.
    """
    found: list[list[torch.Tensor]] = []
    for i, example in enumerate(examples):
        prompts = vlm.config.target == "prompt"
        spans = [span for span in example.spans if prompts or span.helper is not None]
        if not spans:
            raise MirageError(
                f"example {i + 1} of {len(examples)} ({_label(example)}) has no helper image in its reference "
                "response: leave out oracle, count-matched and random-matched"
            )
        sizes = [latent_size or vlm.encoder.own_length(span) or span.k or vlm.config.latent_size for span in spans]
        if lengths is not None:
            sizes = list(lengths[i])
            spans = [spans[j % len(spans)] for j in range(len(sizes))]
        try:
            found.append(_targets(vlm, example, spans, sizes, i, lengths is not None))
        except MirageError as fault:
            if refused is None:
                raise
            refused(i, fault)
            found.append([])
    return found


def _targets(
    vlm: LatentVLM, example: Trajectory, spans: Sequence[LatentSpan], sizes: Sequence[int], seed: int, wanted: bool
) -> list[torch.Tensor]:
    """What stands for the targets of some spans of an example.

    Args:
        sizes: k of each.
        wanted: they are what is wanted in place of the spans' own.
    """
    shown = [vlm.encoder.target_picture(span, example) for span in spans]
    pictures = vlm.encoder.pictures(shown)
    if pictures is None:  # no span is wanted
        return []
    grids = [vlm.family.merged_grid(grid) for grid in pictures.grid_thw]
    pooled = [
        k if span.regions else span_length(vlm.config.pooling, h * w, k, picture)
        for (h, w), k, span, picture in zip(grids, sizes, spans, shown, strict=True)
    ]
    regions = boxes([_spread(span, k) for span, k in zip(spans, pooled, strict=True)], pooled)
    pixels, grid_thw = (tensor.to(vlm.device) for tensor in (pictures.pixel_values, pictures.grid_thw))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = vlm.targets(pixels, grid_thw, pooled, regions=regions)
        targets = list(vlm.feedback.consumed(made).float().cpu().split(pooled))
    if wanted and vlm.config.pooling == "full":
        targets = [
            t if span.regions else pool(t, grid, k, "average")
            for t, grid, k, span in zip(targets, grids, sizes, spans, strict=True)
        ]
    return targets


def _spread(span: LatentSpan, k: int) -> LatentSpan:
    """The span with k of its regions, at even distances, the first and the last among them."""
    if not span.regions or len(span.regions) == k:
        return span
    last = len(span.regions) - 1
    picked = [round(j * last / max(1, k - 1)) for j in range(k)]
    return replace(span, k=None, regions=tuple(span.regions[j] for j in picked))


def _label(example: Trajectory) -> str:
    meta = example.meta
    return str(meta["id"]) if "id" in meta else example.task or "no task"

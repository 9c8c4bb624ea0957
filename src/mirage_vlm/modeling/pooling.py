"""Compression: the patch features of a helper image, pooled to the k targets of a latent span."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.names import POOLING_NAMES

Pooling = Callable[[torch.Tensor, tuple[int, int], int], torch.Tensor]


def average(features: torch.Tensor, grid: tuple[int, int], k: int) -> torch.Tensor:
    """Cut the patches, in raster order, into k contiguous chunks of n // k and average each.

    The n mod k patches that are left over are dropped. This is Mirage's own compression (arXiv 2506.17218).
    """
    size = features.shape[0] // k
    return features[: size * k].reshape(k, size, -1).mean(dim=1)


def grid_average(features: torch.Tensor, grid: tuple[int, int], k: int) -> torch.Tensor:
    """Average over a rows × columns = k lattice of the picture, the one nearest to its shape."""
    height, width = grid
    rows = min(
        (r for r in range(1, k + 1) if k % r == 0), key=lambda r: abs(math.log((r / (k // r)) / (height / width)))
    )
    picture = features.reshape(height, width, -1).permute(2, 0, 1)  # [D, h, w]
    return F.adaptive_avg_pool2d(picture, (rows, k // rows)).flatten(1).T


def random_patches(features: torch.Tensor, grid: tuple[int, int], k: int) -> torch.Tensor:
    """Take k patches at random, kept in raster order; drawn anew at every call."""
    chosen = torch.randperm(features.shape[0])[:k].sort().values
    return features[chosen.to(features.device)]


def full(features: torch.Tensor, grid: tuple[int, int], k: int) -> torch.Tensor:
    """No compression: one latent a patch."""
    return features


def region_averages(features: torch.Tensor, grid: tuple[int, int], boxes: torch.Tensor) -> torch.Tensor:
    """Average the patches whose centres lie in each box; of a box without any, the patch its own centre lies in.

    Args:
        features: [n, D] merged patch features in raster order, n = h · w.
        grid: (h, w).
        boxes: [k, 4] left, top, right, bottom, as fractions of width and height.

    Returns:
        [k, D].
    """
    height, width = grid
    boxes = boxes.to(features.device)
    across = (torch.arange(width, device=features.device) + 0.5) / width
    down = (torch.arange(height, device=features.device) + 0.5) / height
    left, top, right, bottom = boxes.unbind(dim=1)
    columns = (across >= left[:, None]) & (across < right[:, None])  # [k, w]
    rows = (down >= top[:, None]) & (down < bottom[:, None])  # [k, h]
    inside = (rows[:, :, None] & columns[:, None]).flatten(1)  # [k, n]
    centre = ((top + bottom) / 2 * height).long() * width + ((left + right) / 2 * width).long()
    nearest = F.one_hot(centre.clamp(max=height * width - 1), height * width).bool()
    weights = torch.where(inside.any(dim=1, keepdim=True), inside, nearest).to(features.dtype)
    return weights @ features / weights.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Targets:
    """Targets of n latents. The target of one is the mean of its parts; most have a single part.

    Attributes:
        parts: [m, D].
        owner: [m] the latent that each is a part of, in ascending order, from 0 to n − 1.
    """

    parts: torch.Tensor
    owner: torch.Tensor

    @property
    def pooled(self) -> torch.Tensor:
        """[n, D] the targets themselves."""
        return self.mean(self.parts)

    def detach(self) -> Targets:
        """The same without a graph."""
        return Targets(self.parts.detach(), self.owner)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """[m, ...] values of parts → [n, ...] their means."""
        counts = torch.bincount(self.owner)
        if len(counts) == len(values):
            return values
        sums = values.new_zeros(len(counts), *values.shape[1:]).index_add(0, self.owner, values)
        return sums / counts.view(-1, *[1] * (values.ndim - 1))

    @staticmethod
    def join(several: Sequence[Targets]) -> Targets:
        """Those of several spans in one."""
        before = itertools.accumulate([int(t.owner[-1]) + 1 for t in several], initial=0)
        owners = [t.owner + first for t, first in zip(several, before, strict=False)]
        return Targets(torch.cat([t.parts for t in several]), torch.cat(owners))


def place_code(boxes: torch.Tensor, grid: tuple[int, int], width: int) -> torch.Tensor:
    """Where regions lie, as vectors of length 1: sines and cosines of their centres, half of them for each direction.

    A patch of the prompt has its place by its rotary position; a latent has the position of a token of text. What says
    nothing of its place in itself (the ice of one cell is that of another) would stand for any. Like a rotary position
    a centre counts in patches, whatever the size of the picture; waves are 2 to 32 of them long.

    Args:
        boxes: [k, 4] as for `region_averages`.
        grid: (h, w) of the picture.

    Returns:
        [k, width].
    """
    height, across = grid
    count = -(-width // 4)
    waves = torch.pi / 16 ** (torch.arange(count, device=boxes.device) / max(1, count - 1))
    centres = torch.stack([(boxes[:, 0] + boxes[:, 2]) * across, (boxes[:, 1] + boxes[:, 3]) * height], dim=1) / 2
    angles = centres.unsqueeze(2) * waves  # [k, 2, count]
    code = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]
    return F.normalize(code, dim=1)


def with_places(features: torch.Tensor, boxes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[n, D] features of regions and their [n, 4] boxes → [n, D] features that also say where, in equal parts."""
    code = place_code(boxes, grid, features.shape[1]).to(features)
    return features + code * features.detach().norm(dim=1, keepdim=True)


def patch_boxes(grid: tuple[int, int]) -> torch.Tensor:
    """[h · w, 4] the box of each patch of a picture, as for `region_averages`."""
    height, width = grid
    across = torch.arange(width + 1) / width
    down = torch.arange(height + 1) / height
    boxes = torch.empty(height, width, 4)
    boxes[..., 0], boxes[..., 2] = across[:-1], across[1:]
    boxes[..., 1], boxes[..., 3] = down[:-1, None], down[1:, None]
    return boxes.flatten(0, 1)


class Resampler(nn.Module):
    """k learnt queries; the target of each is a mixture of the patches it attends to.

    One layer of the resamplers of vision-language models (arXiv 2204.14198), which leaves features in their own space:
    it begins near the mean of all patches and learns, by cross-entropy on the text, where each latent should look. A
    target has the mean place of its patches in its query's eyes only, as with `average`.

    Args:
        width: D.
        k: the most latents of a span.
    """

    def __init__(self, width: int, k: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(k, width, generator=torch.Generator().manual_seed(0)))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, features: torch.Tensor, grid: tuple[int, int], k: int) -> torch.Tensor:
        """[n, D] merged patch features in raster order → [k, D] targets.

        Raises:
            MirageError: k is larger than the number of queries.
        """
        if k > len(self.queries):
            raise MirageError(
                f"a span wants k = {k} latents, but the resampler has {len(self.queries)} queries; raise latent_size"
            )
        width = features.shape[1]
        places = place_code(patch_boxes(grid), grid, width).to(features) * width**0.5
        keys = self.key(F.rms_norm(features, (width,)) + places)  # [n, D]
        return (self.queries[:k] @ keys.T / width**0.5).softmax(dim=1) @ features


class Fixed(nn.Module):
    """A pooling without weights."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, features: torch.Tensor, grid: tuple[int, int], k: int) -> torch.Tensor:
        return pool(features, grid, k, self.name)


POOLINGS: dict[str, Pooling] = {
    "average": average,
    "grid": grid_average,
    "random": random_patches,
    "full": full,
}
LEARNT: dict[str, type[nn.Module]] = {"resampler": Resampler}  # built with width and latent_size


def build_pooling(name: str, width: int, latent_size: int) -> nn.Module:
    """The pooling of that name, as a module that takes features, grid and k.

    Raises:
        MirageError: there is none of that name.
    """
    check_pooling(name)
    return LEARNT[name](width, latent_size) if name in LEARNT else Fixed(name)


def check_pooling(name: str) -> str:
    """The name itself, if there is such a pooling.

    Raises:
        MirageError: there is none.
    """
    if name not in POOLING_NAMES:
        raise MirageError(f"unknown pooling {name!r}; choose one of {', '.join(POOLING_NAMES)}")
    return name


def span_length(name: str, patches: int, k: int, helper: object = "the helper image") -> int:
    """Number of latents that a helper image of so many patches gives.

    Raises:
        MirageError: k is larger than the number of patches.
    """
    if name == "full":
        return patches
    if k > patches:
        raise MirageError(
            f"k = {k} latents cannot be pooled from the {patches} patches of {helper}: "
            "lower latent_size (or the span's k), or use a larger helper image"
        )
    return k


def pool(features: torch.Tensor, grid: tuple[int, int], k: int, name: str) -> torch.Tensor:
    """Compress one helper image.

    Args:
        features: [n, D] merged patch features in raster order, n = h · w.
        grid: (h, w) merged patches down and across.
        k: number of targets.
        name: key of `POOLINGS`.

    Returns:
        [k, D] the targets.
    """
    return POOLINGS[name](features, grid, span_length(name, features.shape[0], k))

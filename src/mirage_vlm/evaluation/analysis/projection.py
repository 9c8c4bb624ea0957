"""Latents, patches, targets and words in one plane, where they point to in another, and how long they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis.figures import COLOURS, new_figure
from mirage_vlm.evaluation.analysis.material import PATCH, PROMPT, TEXT, Example

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mirage_vlm.modeling import LatentVLM

METHODS = {  # name → module, how to install it
    "pca": None,
    "tsne": ("sklearn", "pip install 'mirage-vlm[analysis]'"),
    "umap": ("umap", "pip install umap-learn"),
}
MOST = 400  # vectors of a kind in the plane


def check_method(name: str) -> None:
    """Whether there is such a projection.

    Raises:
        MirageError: there is none, or what it needs is not installed.
    """
    if name not in METHODS:
        raise MirageError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    if (needed := METHODS[name]) is not None and find_spec(needed[0]) is None:
        raise MirageError(f"the method {name} is not installed: {needed[1]}")


def measure(vlm: LatentVLM, examples: Sequence[Example], method: str = "pca", seed: int = 0) -> dict[str, Any]:
    """Project the kinds of vectors that stand at positions, or that latents were taught to be.

    Kinds are the `latents`, the `patches` of the prompts' pictures, the `targets` where there are helper images, and
    the embeddings of the different `words` (tokens) of prompts and responses. Of a kind with more than `MOST` vectors
    so many are drawn, so that no kind decides the plane by its number.

    Args:
        seed: of that draw, and of t-SNE and UMAP.

    Returns:
        `method`; `norms`, for each kind the `mean` and `std` of the norms of all its vectors and their number `n`;
        `planes`, one of the drawn `vectors` and one of their `directions` (where long ones do not hide the others):
        `points`, for each kind the [n][2] places, and `explained`, the shares of variance of the two axes (None but for
        PCA); and `point_norms`, for each kind the norms of the drawn ones.

    Raises:
        MirageError: as `check_method`, or there are fewer than 4 vectors.
    """
    check_method(method)
    kinds = vectors_of(vlm, examples)
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: found[torch.randperm(len(found), generator=generator)[:MOST]] for name, found in kinds.items()}
    together, sizes = torch.cat(list(drawn.values())), [len(found) for found in drawn.values()]
    planes = {}
    for name, vectors in {"vectors": together, "directions": F.normalize(together, dim=1)}.items():
        points, explained = project(vectors, method, seed)
        split = zip(drawn, points.split(sizes), strict=True)
        planes[name] = {"points": {kind: own.tolist() for kind, own in split}, "explained": explained}
    norms = {name: found.norm(dim=1) for name, found in kinds.items()}
    return {
        "method": method,
        "norms": {
            name: {"n": len(n), "mean": float(n.mean()), "std": float(n.std(correction=0))} for name, n in norms.items()
        },
        "planes": planes,
        "point_norms": {name: found.norm(dim=1).tolist() for name, found in drawn.items()},
    }


@torch.no_grad()
def vectors_of(vlm: LatentVLM, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Each kind's vectors, [n, D] float32 on the CPU; kinds that have none are left out."""
    spoken = torch.cat([e.ids[(e.roles == PROMPT) | (e.roles == TEXT)] for e in examples]).unique()
    found = {
        "patches": torch.cat([e.inputs[e.roles == PATCH] for e in examples]),
        "words": vlm.embed(spoken.to(vlm.device)).float().cpu(),
        "targets": torch.cat([t for e in examples for t in e.targets] or [torch.empty(0, vlm.width)]),
        "latents": torch.cat([e.latents for e in examples]),
    }
    return {name: vectors for name, vectors in found.items() if len(vectors)}


def project(vectors: torch.Tensor, method: str, seed: int = 0) -> tuple[torch.Tensor, list[float] | None]:
    """[n, D] → [n, 2], and with PCA the shares of variance of the two axes.

    Raises:
        MirageError: as `check_method`, or n < 4.
    """
    check_method(method)
    n = len(vectors)
    if n < 4:
        raise MirageError(f"a projection needs at least 4 vectors, not {n}")
    if method == "pca":
        centred = vectors.double() - vectors.double().mean(dim=0)
        left, values, _ = torch.linalg.svd(centred, full_matrices=False)
        shares = values.square() / values.square().sum().clamp(min=1e-300)
        return (left[:, :2] * values[:2]).float(), shares[:2].tolist()
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30, (n - 1) / 3)
        found = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors.numpy())
    else:
        from umap import UMAP

        found = UMAP(n_neighbors=min(15, n - 1), random_state=seed, n_jobs=1).fit_transform(vectors.numpy())
    return torch.as_tensor(found, dtype=torch.float32), None


def table(numbers: Mapping[str, Any]) -> list[list[str]]:
    """Norms of each kind; the first row names the columns."""
    rows = [["", "n", "mean norm", "std"]]
    for name, norm in numbers["norms"].items():
        rows.append([name, str(norm["n"]), f"{norm['mean']:.2f}", f"{norm['std']:.2f}"])
    return rows


def draw(numbers: Mapping[str, Any]) -> Figure:
    """The two planes, and beside them the norms of each kind."""
    figure = new_figure(11, 3.8)
    first, second, lengths = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    for axes, (title, plane) in zip((first, second), numbers["planes"].items(), strict=True):
        for name, points in plane["points"].items():
            xs, ys = zip(*points, strict=True)
            axes.scatter(xs, ys, s=9, color=COLOURS[name], alpha=0.6, linewidths=0, label=name)
        explained = plane["explained"]
        for i, (label, axis) in enumerate(((axes.set_xlabel, "first"), (axes.set_ylabel, "second"))):
            share = "" if explained is None else f", {100 * explained[i]:.0f} % of variance"
            label(f"{axis} axis{share}", fontsize=8)
        axes.set_title(f"{title}, {numbers['method']}", fontsize=9)
        axes.tick_params(labelsize=7)
    first.legend(frameon=False, fontsize=8)
    names = list(numbers["point_norms"])
    boxes = lengths.boxplot(
        [numbers["point_norms"][name] for name in names], tick_labels=names, patch_artist=True, showfliers=False
    )
    for name, box in zip(names, boxes["boxes"], strict=True):
        box.set_facecolor(COLOURS[name])
    lengths.set_ylabel("norm", fontsize=9)
    lengths.tick_params(labelsize=7)
    lengths.set_ylim(bottom=0)
    for each in (first, second, lengths):
        each.spines[["top", "right"]].set_visible(False)
    return figure

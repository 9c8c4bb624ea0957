"""Have the latents collapsed? How alike they are across places, across examples, and to their targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis.figures import COLOURS, new_figure
from mirage_vlm.evaluation.analysis.material import Example, block

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 40  # of histograms, from −1 to 1
SPECTRUM = 64  # singular values that are written down


def measure(examples: Sequence[Example]) -> dict[str, Any]:
    """How alike latents are, the same of their targets, and latents to targets.

    Of each response the first K latents count, K as `block` takes it.

    Returns:
        `examples` N that count and `left_out`; `latents_each` K; `latents` and `targets`, what `alike` says of them
        (`targets` is None where not all of the N have a helper image); `to_target`: mean cosine of a latent to its own
        target (`own`) and to that of another example at the same place (`other`), `matrix` [K][K], latent by target,
        and the histograms `own_histogram`, `other_histogram`.

    Raises:
        MirageError: fewer than two responses have latents.
    """
    latents, chosen = block(examples)
    if len(chosen) < 2:
        raise MirageError("similarity across examples needs at least two responses with latents")
    n, k, _ = latents.shape
    found: dict[str, Any] = {"examples": n, "left_out": len(examples) - n, "latents_each": k, "latents": alike(latents)}
    found |= {"targets": None, "to_target": None}
    if all(examples[i].targets for i in chosen):
        targets = torch.stack([torch.cat(list(examples[i].targets))[:k] for i in chosen])
        found |= {"targets": alike(targets), "to_target": _to_targets(latents, targets)}
    return found


def alike(vectors: torch.Tensor) -> dict[str, Any]:
    """How alike [N, K, D] vectors are, N > 1.

    Returns:
        `within` [K][K], cosine of two places of an example, the mean over examples, and `within_mean` of two different
        places (None with one); `across` [K], mean cosine of two different examples at the same place, `across_mean`,
        the mean of those, and `across_histogram`; `effective_rank` and, with the mean vector taken off,
        `effective_rank_centred`; `variance`, shares of `examples`, `places` and their `rest` (None where nothing
        varies); `singular_values`, the largest.
    """
    n, k, _ = vectors.shape
    vectors = vectors.double()
    unit = F.normalize(vectors, dim=-1)
    within = (unit @ unit.mT).mean(dim=0)  # [K, K]
    pairs = unit.transpose(0, 1) @ unit.permute(1, 2, 0)  # [K, N, N]
    different = ~torch.eye(n, dtype=torch.bool)
    across = pairs[:, different].mean(dim=1)  # [K]
    flat = vectors.flatten(0, 1)
    singular = torch.linalg.svdvals(flat)
    return {
        "within": within.tolist(),
        "within_mean": float(within[~torch.eye(k, dtype=torch.bool)].mean()) if k > 1 else None,
        "across": across.tolist(),
        "across_mean": float(across.mean()),
        "across_histogram": _histogram(pairs[:, different]),
        "effective_rank": effective_rank(flat),
        "effective_rank_centred": effective_rank(flat - flat.mean(dim=0)),
        "variance": variance_shares(vectors),
        "singular_values": singular[:SPECTRUM].tolist(),
    }


def effective_rank(rows: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of [n, D] (Roy and Vetterli 2007); 0 of zeros."""
    singular = torch.linalg.svdvals(rows.double())
    if not singular.sum() > 0:
        return 0.0
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())


def variance_shares(vectors: torch.Tensor) -> dict[str, float] | None:
    """Where [N, K, D] vectors vary: between examples, between places, and the rest; shares that sum to 1.

    `examples` is the variance of the examples' means, `places` that of the places' means. None where nothing varies.
    """
    centred = vectors - vectors.mean(dim=(0, 1))
    total = float(centred.square().sum(dim=-1).mean())
    if total <= 1e-12 * float(vectors.square().sum(dim=-1).mean()):  # rounding
        return None
    between = float(centred.mean(dim=1).square().sum(dim=-1).mean()) / total
    places = float(centred.mean(dim=0).square().sum(dim=-1).mean()) / total
    return {"examples": between, "places": places, "rest": 1 - between - places}


def _to_targets(latents: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """[N, K, D] latents and their targets."""
    x, y = (F.normalize(vectors.double(), dim=-1) for vectors in (latents, targets))
    own = (x * y).sum(dim=-1)  # [N, K]
    pairs = x.transpose(0, 1) @ y.permute(1, 2, 0)  # [K, N, N]
    other = pairs[:, ~torch.eye(len(x), dtype=torch.bool)]
    return {
        "own": float(own.mean()),
        "other": float(other.mean()),
        "matrix": (x @ y.mT).mean(dim=0).tolist(),
        "own_histogram": _histogram(own),
        "other_histogram": _histogram(other),
    }


def _histogram(cosines: torch.Tensor) -> list[float]:
    """Share of cosines in each of `BINS` equal bins from −1 to 1."""
    counts = torch.histc(cosines.clamp(-1, 1).float(), bins=BINS, min=-1, max=1)
    return (counts / counts.sum()).tolist()


def table(numbers: dict[str, Any]) -> list[list[str]]:
    """One row for the latents, one for their targets; the first row names the columns."""
    rows = [
        ["", "n", "across", "within", "own target", "other's", "rank", "centred", "examples %", "places %", "rest %"]
    ]
    for name in ("latents", "targets"):
        if (found := numbers[name]) is None:
            continue
        within = "–" if found["within_mean"] is None else f"{found['within_mean']:.3f}"
        shares = found["variance"]
        parts = ["–"] * 3 if shares is None else [f"{100 * shares[part]:.1f}" for part in shares]
        ranks = [f"{found[rank]:.1f}" for rank in ("effective_rank", "effective_rank_centred")]
        to_target = numbers["to_target"] if name == "latents" else None
        towards = ["–"] * 2 if to_target is None else [f"{to_target[whose]:.3f}" for whose in ("own", "other")]
        each = f"{numbers['examples']} × {numbers['latents_each']}"
        rows.append([name, each, f"{found['across_mean']:.3f}", within, *towards, *ranks, *parts])
    return rows


def draw(numbers: dict[str, Any]) -> Figure:
    """Cosines within a response, across examples, and to the targets; singular values."""
    figure = new_figure(9, 5.4)
    (first, second), (third, fourth) = figure.subplots(2, 2)
    _matrix(first, numbers["latents"]["within"], "latents of a response", "latent", "latent")
    for name in ("latents", "targets"):
        if (found := numbers[name]) is not None:
            _steps(second, found["across_histogram"], f"{name}, mean {found['across_mean']:.3f}", COLOURS[name])
            values = found["singular_values"]
            rank = f"{name}, effective rank {found['effective_rank']:.1f}"
            fourth.plot(range(1, len(values) + 1), values, color=COLOURS[name], label=rank)
    second.set_title("two examples, the same place", fontsize=9)
    fourth.set_title("singular values", fontsize=9)
    fourth.set_yscale("log")
    if (to_target := numbers["to_target"]) is None:
        third.set_axis_off()
    else:
        _steps(third, to_target["own_histogram"], f"its own, mean {to_target['own']:.3f}", COLOURS["latents"])
        _steps(third, to_target["other_histogram"], f"another's, mean {to_target['other']:.3f}", "#8d939c")
        third.set_title("a latent and a target", fontsize=9)
    for axes in (second, third):
        axes.set_xlabel("cosine", fontsize=8)
        axes.set_ylabel("share of pairs", fontsize=8)
    for axes in (second, third, fourth):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _matrix(axes: Any, values: Sequence[Sequence[float]], title: str, down: str, across: str) -> None:
    shown = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.figure.colorbar(shown, ax=axes, label="cosine")
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(down, fontsize=8)
    axes.set_xlabel(across, fontsize=8)
    if len(values) <= 8:
        axes.set_xticks(range(len(values)), range(1, len(values) + 1))
        axes.set_yticks(range(len(values)), range(1, len(values) + 1))
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "white" if abs(value) > 0.7 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)


def _steps(axes: Any, shares: Sequence[float], label: str, colour: str) -> None:
    edges = [-1 + 2 * i / len(shares) for i in range(len(shares) + 1)]
    axes.stairs(shares, edges, label=label, color=colour, fill=True, alpha=0.5)

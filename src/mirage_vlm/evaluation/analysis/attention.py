"""Where the text after a span looks: the share of its attention on latents, patches, prompt and earlier text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis.figures import COLOURS, new_figure
from mirage_vlm.evaluation.analysis.material import (
    LATENT,
    PATCH,
    ROLES,
    TEXT,
    Example,
    language_pass,
    unseen,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mirage_vlm.modeling import LatentVLM

GROUPS = {"text": "text after the first span", "answer": "the answer's tokens"}


def measure(vlm: LatentVLM, examples: Sequence[Example]) -> dict[str, Any]:
    """Attention mass by layer, head and role of what is looked at; the mean over tokens, then over examples.

    Returns:
        `roles`, the R names; and in `groups`, for the text after the first span and for the tokens of the answer (None
        where there is no such token after a span): `examples` and `queries` that were counted; `tokens` [R], how many
        positions of a role such a token sees; `mass` [L][R] and `heads` [L][H][R], shares that sum to 1; `spread`
        [L][R], standard deviation of the mass between examples; `per_token` [L][R], mass / tokens; `against_even`
        [L][R], the same in multiples of what every position would get if attention were spread evenly. The last two
        are None where nothing of the role is seen.

    Raises:
        MirageError: no response has text after a span.
    """
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor, int]]] = {name: [] for name in GROUPS}
    for example in examples:
        after = torch.arange(len(example.ids)) >= example.runs[0][1]
        queries = {"text": after & (example.roles == TEXT), "answer": after & example.answer}
        if not any(bool(chosen.any()) for chosen in queries.values()):
            continue
        inputs = example.inputs.to(vlm.device, next(vlm.language_model.parameters()).dtype)
        blind = None if example.blind is None else example.blind[None]
        mask = unseen(example.roles[None] == PATCH, blind)
        attended = language_pass(
            vlm, inputs[None], example.positions[:, None].to(vlm.device), mask, weights=True
        ).attentions
        weights = [layer[0].float().cpu() for layer in attended]
        for name, chosen in queries.items():
            if bool(chosen.any()):
                mass = torch.stack([masses(layer, example.roles, chosen) for layer in weights])
                found[name].append((mass, visible(example.roles, chosen, example.blind), int(chosen.sum())))
    if not found["text"]:
        raise MirageError("no response has text after a latent span: there is nothing that could look back at it")
    return {"roles": list(ROLES), "groups": {name: _summary(group) for name, group in found.items()}}


def masses(weights: torch.Tensor, roles: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """[H, T, T] attention weights, [T] roles and [T] which rows to take → [H, R] mean mass on each role."""
    return (weights[:, queries] @ F.one_hot(roles, len(ROLES)).to(weights)).mean(dim=1)


def visible(roles: torch.Tensor, queries: torch.Tensor, blind: torch.Tensor | None = None) -> torch.Tensor:
    """[R] how many positions of each role a query sees, itself included, in the mean over [T] queries.

    Args:
        blind: [T] positions that do not see the pictures, or None.
    """
    counts = F.one_hot(roles, len(ROLES)).cumsum(dim=0)
    if blind is not None:
        counts[blind, PATCH] = 0
    return counts[queries].float().mean(dim=0)


def _summary(group: Sequence[tuple[torch.Tensor, torch.Tensor, int]]) -> dict[str, Any] | None:
    if not group:
        return None
    each = torch.stack([mass for mass, _, _ in group])  # [N, L, H, R]
    tokens = torch.stack([count for _, count, _ in group]).mean(dim=0)  # [R]
    heads = each.mean(dim=0)
    mass = heads.mean(dim=1)  # [L, R]
    per_token = [[m / n if n else None for m, n in zip(row, tokens.tolist(), strict=True)] for row in mass.tolist()]
    total = float(tokens.sum())
    return {
        "examples": len(group),
        "queries": sum(count for _, _, count in group),
        "tokens": tokens.tolist(),
        "mass": mass.tolist(),
        "spread": each.mean(dim=2).std(dim=0, correction=0).tolist(),
        "per_token": per_token,
        "against_even": [[None if p is None else p * total for p in row] for row in per_token],
        "heads": heads.tolist(),
    }


def table(numbers: dict[str, Any]) -> list[list[str]]:
    """Mass on each role, in percent, by layer; the first row names the columns."""
    rows = [["from", "layer", "prompt", "patches", "text", "marks", "latents", "a latent, × even"]]
    for name, group in numbers["groups"].items():
        if group is None:
            continue
        for i, (layer, times) in enumerate(zip(group["mass"], group["against_even"], strict=True), start=1):
            rows.append([name, str(i), *(f"{100 * share:.1f}" for share in layer), f"{times[LATENT]:.2f}"])
        rows.append([name, "tokens", *(f"{count:.1f}" for count in group["tokens"]), ""])
    return rows


def draw(numbers: dict[str, Any]) -> Figure:
    """For each group: mass by layer, stacked; and mass per position against an even spread, by layer."""
    from matplotlib.ticker import LogLocator, NullLocator

    groups = {name: group for name, group in numbers["groups"].items() if group is not None}
    figure = new_figure(9, 0.9 + 2.6 * len(groups))
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for (name, group), (left, right) in zip(groups.items(), axes, strict=True):
        layers = list(range(1, len(group["mass"]) + 1))
        bottom = [0.0] * len(layers)
        for r, role in enumerate(numbers["roles"]):
            shares = [100 * layer[r] for layer in group["mass"]]
            left.bar(layers, shares, bottom=bottom, color=COLOURS[role], label=role, width=0.8)
            bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
            times = [layer[r] for layer in group["against_even"]]
            if None not in times:
                right.plot(layers, times, color=COLOURS[role], marker="o", markersize=3)
        right.axhline(1, color="#30343b", linewidth=0.8, linestyle=":")
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_locator(NullLocator())
        left.set_ylabel(f"% of attention\n{GROUPS[name]}", fontsize=9)
        right.set_ylabel("per position, × even", fontsize=9)
        for each in (left, right):
            each.set_xticks(layers if len(layers) <= 12 else layers[:: -(-len(layers) // 12)])
            each.spines[["top", "right"]].set_visible(False)
    for each in axes[-1]:
        each.set_xlabel("layer", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure

"""What latents lie next to: patches of the prompt's picture and of the helper image, and words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis.figures import new_figure
from mirage_vlm.evaluation.analysis.material import Example, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mirage_vlm.modeling import LatentVLM

TOP = 3
SHOWN = 3  # examples in the figure


def measure(vlm: LatentVLM, examples: Sequence[Example], top: int = TOP) -> dict[str, Any]:
    """The nearest patches and words of every latent, by cosine, and what the LM head reads in it.

    Pictures are the first of the prompt and the helper image of the latent's span.

    Returns:
        `latents`: of each example its latents in order, with `span`, `step`, `norm`; `prompt` and `helper`, the nearest
        patches as `row`, `column`, `cosine` (None where there is no such picture); `words`, the nearest rows of the
        embedding table; and `said`, the likeliest tokens with their probability in the place of the latent, as the LM
        head reads the state before it. `steps`: for each place in the order of a response the means over examples:
        cosine to the nearest patch of the own picture (`prompt`), of the picture of the next example (`other`) and of
        the helper image (`helper`), mean cosine to all patches of the own picture (`prompt_mean`), to the nearest word
        (`word`); how many different patches (by row and column) and words are the nearest of some example (`patches`,
        `words`), and the token `said` most often with its `said_share`.

    Raises:
        MirageError: no prompt has a picture.
    """
    if not any(example.pictures for example in examples):
        raise MirageError("no prompt has a picture, so latents have no patch to be near to")
    table = vlm.model.get_input_embeddings().weight.detach()  # [V, D]
    lengths = table.norm(dim=1, dtype=torch.float32).clamp(min=1e-12)  # [V]
    found: list[list[dict[str, Any]]] = []
    others: list[list[float | None]] = []  # of each latent, to the nearest patch of another picture
    for i, example in enumerate(examples):
        latents, places = example.latents, [p for start, end in example.runs for p in range(start, end)]
        words = (latents.to(table) @ table.T).float() / lengths / latents.norm(dim=1, keepdim=True).to(lengths)
        said = vlm.logits(example.hidden[[p - 1 for p in places]].to(table)).detach().float().softmax(dim=-1)
        steps = [(s, j) for s, (start, end) in enumerate(example.runs) for j in range(end - start)]
        own = []
        for latent, (s, j), near, heard in zip(latents, steps, words, said, strict=True):
            entry: dict[str, Any] = {"span": s, "step": j, "norm": float(latent.norm())}
            entry["prompt"] = _nearest(latent, example.pictures[0], top) if example.pictures else None
            entry["helper"] = _nearest(latent, example.helpers[s], top) if example.helpers else None
            if example.pictures:
                entry["prompt_mean"] = float(cosines(latent, example.pictures[0].features).mean())
            entry["words"] = _tokens(vlm, near, top, "cosine")
            entry["said"] = _tokens(vlm, heard, top, "probability")
            own.append(entry)
        found.append(own)
        next_one = examples[(i + 1) % len(examples)]
        if len(examples) > 1 and next_one.pictures:
            others.append([float(cosines(x, next_one.pictures[0].features).max()) for x in latents])
        else:
            others.append([None] * len(latents))
    return {"latents": found, "steps": _steps(found, others)}


def cosines(vector: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """[D] and [n, D] → [n]."""
    return F.cosine_similarity(vector[None], features, dim=1)


def _nearest(latent: torch.Tensor, picture: Picture, top: int) -> list[dict[str, Any]]:
    near = cosines(latent, picture.features)
    values, places = near.topk(min(top, len(near)))
    width = picture.grid[1]
    return [
        {"row": place // width, "column": place % width, "cosine": value}
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]


def _tokens(vlm: LatentVLM, scores: torch.Tensor, top: int, name: str) -> list[dict[str, Any]]:
    values, ids = scores.topk(top)
    return [
        {"token": vlm.tokenizer.decode([token]), "id": token, name: value}
        for value, token in zip(values.tolist(), ids.tolist(), strict=True)
    ]


def _steps(found: Sequence[Sequence[dict[str, Any]]], others: Sequence[Sequence[float | None]]) -> list[dict[str, Any]]:
    steps = []
    for j in range(max(map(len, found))):
        here = [(own[j], other[j]) for own, other in zip(found, others, strict=True) if j < len(own)]
        seen = [entry for entry, _ in here if entry["prompt"]]
        helped = [entry["helper"][0]["cosine"] for entry, _ in here if entry["helper"]]
        elsewhere = [other for _, other in here if other is not None]
        (said, times), *_ = Counter(entry["said"][0]["token"] for entry, _ in here).most_common(1)
        steps.append(
            {
                "n": len(here),
                "prompt": _mean([entry["prompt"][0]["cosine"] for entry in seen]),
                "other": _mean(elsewhere),
                "prompt_mean": _mean([entry["prompt_mean"] for entry in seen]),
                "helper": _mean(helped),
                "word": _mean([entry["words"][0]["cosine"] for entry, _ in here]),
                "patches": len({(e["prompt"][0]["row"], e["prompt"][0]["column"]) for e in seen}),
                "words": len({entry["words"][0]["id"] for entry, _ in here}),
                "said": said,
                "said_share": times / len(here),
            }
        )
    return steps


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def table(numbers: dict[str, Any]) -> list[list[str]]:
    """Mean cosines by place in the response; the first row names the columns."""
    headings = ["latent", "n", "own", "all", "other", "helper", "patches", "word", "words", "said"]
    rows = [headings]
    for j, step in enumerate(numbers["steps"], start=1):
        means = [step[name] for name in ("prompt", "prompt_mean", "other", "helper")]
        shown = ["–" if mean is None else f"{mean:.3f}" for mean in means]
        said = f"{step['said'].strip() or repr(step['said'])} {100 * step['said_share']:.0f} %"
        word = [f"{step['word']:.3f}", str(step["words"])]
        rows.append([str(j), str(step["n"]), *shown, str(step["patches"]), *word, said])
    return rows


def draw(numbers: dict[str, Any], examples: Sequence[Example]) -> Figure:
    """The first examples: prompt's picture and helper image, with the patch nearest to each latent of the first span.

    Args:
        numbers: of `measure` for these examples.
    """
    shown = [i for i, example in enumerate(examples) if example.pictures][:SHOWN]
    figure = new_figure(max(3.6 * len(shown), 6.0), 8.0)  # no narrower than its legend
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, i in enumerate(shown):
        example = examples[i]
        own = [entry for entry in numbers["latents"][i] if entry["span"] == 0]
        _outline(axes[0][column], example.pictures[0], [entry["prompt"][0] for entry in own])
        if example.helpers:
            _outline(axes[1][column], example.helpers[0], [entry["helper"][0] for entry in own])
        else:
            axes[1][column].set_axis_off()
    axes[0][0].set_ylabel("prompt's picture", fontsize=11)
    axes[1][0].set_ylabel("helper image", fontsize=11)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if len(labels) <= 12:
        figure.legend(
            handles,
            labels,
            title="latent, nearest patch",
            ncols=6,
            loc="outside lower center",
            fontsize=10,
            frameon=False,
        )
    return figure


def _outline(axes: Axes, picture: Picture, patches: Sequence[dict[str, Any]]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, Stroke

    pixels = picture.image.load().resize((28 * picture.grid[1], 28 * picture.grid[0]))
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for j, patch in enumerate(patches):
        inset = 1.5 + 12 * j / max(8, len(patches))  # several latents may have the same patch
        corner = (28 * patch["column"] + inset - 0.5, 28 * patch["row"] + inset - 0.5)
        side = 28 - 2 * inset
        colour = colormaps["plasma"](0.15 + 0.85 * j / max(1, len(patches) - 1))
        box = Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=2.0, label=str(j + 1))
        # a dark line in a light one, so that it is seen on any picture
        box.set_path_effects(
            [Stroke(linewidth=4.6, foreground="white"), Stroke(linewidth=3.4, foreground="black"), Normal()]
        )
        axes.add_patch(box)

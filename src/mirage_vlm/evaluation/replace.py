"""Are the latents used? Decode with something else in their place and see whether accuracy falls.

After "Ablate-to-Validate" (arXiv 2605.21642): prompt, pictures, budget and decoding stay as they are, and each latent
that is about to be consumed is exchanged for a vector that holds less (zeros, noise, another example's latent) or more
(the pooled helper image). Latents that are used cannot be exchanged for empty ones without loss.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mirage_vlm.decoding import EngineConfig, GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.evaluate import Scored, evaluate, measures
from mirage_vlm.evaluation.intervals import in_points, paired_bootstrap, sign_test
from mirage_vlm.evaluation.kept import Kept
from mirage_vlm.evaluation.oracle import oracle_targets
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling import LatentVLM

Spans = Sequence[torch.Tensor]  # [k, D] of each span of one response, k > 0


@dataclass(frozen=True)
class Place:
    """A latent of an evaluation: its example, its span there, its step in the span, and how many came before it."""

    example: int
    span: int
    step: int
    before: int


@dataclass(frozen=True)
class Material:
    """What replacements are made of.

    Attributes:
        own: the latents of each example's own decoding, float32 on the CPU; some example has some.
        targets: the same of its helper images; empty where no replacement asks for them.
        seed: of noise and of the shuffle.
        matched: targets of as many latents as each span of `own` has; empty where no replacement asks for them.
    """

    own: Sequence[Spans]
    targets: Sequence[Spans]
    seed: int
    matched: Sequence[Spans] = ()

    @cached_property
    def all_own(self) -> torch.Tensor:
        """[N, D] every latent of every example."""
        return torch.cat([span for spans in self.own for span in spans])

    @cached_property
    def all_targets(self) -> torch.Tensor:
        """[N, D] every target of every example."""
        return torch.cat([span for spans in self.targets for span in spans])

    def noise(self, place: Place) -> torch.Tensor:
        """[D] unit Gaussian, float64: a function of the seed, the example and how many latents came before."""
        key = np.random.SeedSequence((self.seed, place.example, place.before)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(key[0] >> 1))
        return torch.randn(self.all_own.shape[1], dtype=torch.float64, generator=generator)


Vector = Callable[[Place], torch.Tensor]  # → [D]


@dataclass(frozen=True)
class Replacement:
    """Something to put in the place of latents.

    Attributes:
        about: what it is, for tables.
        empty: it says nothing about the example, so a model that uses its latents must do worse with it.
        vector: what stands at a place; None leaves the latents as they are.
        changes: fields of `GenerationConfig` that it sets.
        targets: it is made of the examples' helper images.
        matched: it is made of them too, at the counts of the model's own spans.
    """

    about: str
    empty: bool = True
    vector: Callable[[Material], Vector] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    targets: bool = False
    matched: bool = False


def _always(vector: torch.Tensor) -> Vector:
    return lambda place: vector


def _gaussian(material: Material, like: torch.Tensor) -> Vector:
    """Noise with the mean and covariance of `like` [N, D]."""
    like = like.double()
    mean, centred = like.mean(dim=0), like - like.mean(dim=0)
    values, axes = torch.linalg.eigh(centred.T @ centred / len(like))
    root = axes * values.clamp(min=0).sqrt()  # [D, D], root · rootᵀ = covariance
    return lambda place: mean + root @ material.noise(place)


def _first_repeat(material: Material) -> Vector:
    """A response that has no latents in the model's own decoding borrows of the next example that has."""
    n = len(material.own)
    return lambda place: next(s for i in range(n) if (s := material.own[(place.example + i) % n]))[0][0]


def _shuffle(material: Material) -> Vector:
    found = donors([bool(spans) for spans in material.own], material.seed)
    return lambda place: _at(material.own[found[place.example]], place)


def donors(thinks: Sequence[bool], seed: int) -> list[int]:
    """For each example another one that has latents: the next one such on a random cycle through all.

    Raises:
        MirageError: an example with latents has no other to take from.
    """
    n = len(thinks)
    order = np.random.default_rng(seed).permutation(n).tolist()
    found = [-1] * n
    for at, example in enumerate(order):
        others = (order[(at + ahead) % n] for ahead in range(1, n))
        found[example] = next((other for other in others if thinks[other]), -1)
    if -1 in found:
        raise MirageError("shuffle needs at least two examples in which the model opens a latent span")
    return found


def _at(spans: Spans, place: Place) -> torch.Tensor:
    """[D] the same step of the same span, counted on from the beginning where there are fewer."""
    span = spans[place.span % len(spans)]
    return span[place.step % len(span)]


REPLACEMENTS: dict[str, Replacement] = {
    "self": Replacement("the model's own latents", empty=False),
    "zero": Replacement("zeros", vector=lambda m: _always(torch.zeros(m.all_own.shape[1]))),
    "random": Replacement("unit Gaussian noise", vector=lambda m: m.noise),
    "random-matched": Replacement(
        "noise like the pooled helper images", vector=lambda m: _gaussian(m, m.all_targets), targets=True
    ),
    "random-model": Replacement("noise like the model's latents", vector=lambda m: _gaussian(m, m.all_own)),
    "mean": Replacement("the mean of the model's latents", vector=lambda m: _always(m.all_own.mean(dim=0))),
    "first-repeat": Replacement("the example's first latent, repeated", empty=False, vector=_first_repeat),
    "shuffle": Replacement("the latents of another example", vector=_shuffle),
    "oracle": Replacement(
        "the pooled helper image", empty=False, vector=lambda m: lambda p: _at(m.targets[p.example], p), targets=True
    ),
    "count-matched": Replacement(
        "the pooled helper image, at the model's own number of latents",
        empty=False,
        vector=lambda m: lambda p: _at(m.matched[p.example], p),
        matched=True,
    ),
    "markers": Replacement("start and end, nothing between", changes={"latent_size": 0}),
    "remove": Replacement("no span", changes={"spans": "none", "span_after": None}),
}


class _Hook:
    """A latent hook that puts `vector`'s in the place of all latents. It counts, so each call of `generate` has one."""

    def __init__(self, vector: Vector):
        self.vector = vector
        self.spans: Counter[int] = Counter()
        self.latents: Counter[int] = Counter()

    def __call__(self, latents: torch.Tensor, responses: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        """[m, D] → [m, D]; see `GenerationConfig.latent_hook`."""
        found = []
        for response, step in zip(responses, steps, strict=True):
            self.spans[response] += step == 0
            found.append(self.vector(Place(response, self.spans[response] - 1, step, self.latents[response])))
            self.latents[response] += 1
        return torch.stack(found).to(latents)


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The replacements of these names, `self` first and always; `all` stands for every one.

    Raises:
        MirageError: there is no such replacement.
    """
    for name in names:
        if name not in REPLACEMENTS and name != "all":
            near = difflib.get_close_matches(name, [*REPLACEMENTS, "all"], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(REPLACEMENTS)}, or all"
            raise MirageError(f"unknown replacement {name!r}; {hint}")
    wanted = list(REPLACEMENTS) if "all" in names else names
    return tuple(dict.fromkeys(("self", *wanted)))


def replacement_test(
    vlm: LatentVLM,
    examples: Sequence[Trajectory],
    names: Sequence[str],
    generation: GenerationConfig,
    engine: EngineConfig | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
    kept: Kept | None = None,
    strict: bool = True,
) -> dict[str, list[Scored]]:
    """Decode and score every example once with each replacement.

    A model that opens no span in any example has nothing to replace: all its results are those of `self`.

    Args:
        names: keys of `REPLACEMENTS`, or `all`; `self` is run in any case, and first.
        generation: the same for all but for what a replacement changes; only `self` is sure to return latents.
        progress: called with the number of responses that were finished; there are examples × replacements.
        seed: of noise and of the shuffle.
        kept: as for `evaluate`; its responses of `self` have latents.
        strict: as for `evaluate`. Otherwise an example that is an error with one replacement, or whose targets cannot
            be made, is an error with all, and so wrong with all.

    Returns:
        For each replacement the examples in order.

    Raises:
        MirageError: an unknown name, no examples, more than one response to each, a hook of the caller's, spans of
            length 0, an example without helper image where one is needed, or too few examples to shuffle.
    """
    names = chosen(names)
    if generation.n != 1 or generation.latent_hook is not None or generation.latent_size == 0:
        raise MirageError("the replacement test needs n = 1, latent_size > 0 and no latent_hook")
    if "shuffle" in names and len(examples) == 1:
        raise MirageError("shuffle needs at least two examples")
    kept = kept or (None if strict else Kept())
    bad: dict[int, str] = {}

    def refused(i: int, fault: MirageError) -> None:
        bad[i] = str(fault)

    tolerant = None if strict else refused
    targets: Sequence[Spans] = []
    if any(REPLACEMENTS[name].targets or REPLACEMENTS[name].matched for name in names):
        targets = oracle_targets(vlm, examples, generation.latent_size, refused=tolerant)
    _rule_out(kept, "self", bad)
    own_generation = replace(generation, return_latents=True)
    results = {"self": evaluate(vlm, examples, own_generation, engine, progress, kept, strict=strict)}
    own = [[s.latents.float() for s in each.trajectory.spans if s.latents is not None] for each in results["self"]]
    matched: Sequence[Spans] = []
    if any(REPLACEMENTS[name].matched for name in names):
        lengths = [[len(span) for span in spans] for spans in own]
        matched = oracle_targets(vlm, examples, lengths=lengths, refused=tolerant)
    bad |= {i: each.error for i, each in enumerate(results["self"]) if each.error is not None}
    material = Material(own, targets, seed, matched)
    for name in names[1:]:
        if not any(own):
            results[name] = results["self"]
            if progress is not None:
                progress(len(examples))
            continue
        kind = REPLACEMENTS[name]
        hook = None if kind.vector is None else _Hook(kind.vector(material))
        changed = replace(generation, latent_hook=hook, **kind.changes)
        _rule_out(kept, name, bad)
        results[name] = evaluate(vlm, examples, changed, engine, progress, kept, name, strict)
        bad |= {i: each.error for i, each in enumerate(results[name]) if each.error is not None and i not in bad}
    if not bad:
        return results
    return {
        name: [each.failed(bad[i]) if i in bad else each for i, each in enumerate(scored)]
        for name, scored in results.items()
    }


def _rule_out(kept: Kept | None, name: str, bad: Mapping[int, str]) -> None:
    """Let no example be decoded that is an error already."""
    for i, reason in bad.items():
        if kept is not None and (name, i) not in kept:
            kept.fail(name, i, reason)


def summarise_replacements(results: Mapping[str, Sequence[Scored]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Accuracy with each replacement, and how far it is from the model's own latents.

    Args:
        results: of `replacement_test`.
        seed: of the paired bootstrap.

    Returns:
        For each replacement what `measures` gives, `difference` (its accuracy − that of `self`, example by example)
        with `difference_ci95`, `difference_p` (of `sign_test`, that it is worse), and `correct`, a 1 or 0 for each
        example in order.
    """
    own = [each.score.correct for each in results["self"]]
    summary = {}
    for name, scored in results.items():
        right = [each.score.correct for each in scored]
        difference, low, high = paired_bootstrap(right, own, seed=seed)
        summary[name] = {
            **measures(scored),
            "difference": difference,
            "difference_ci95": [low, high],
            "difference_p": sign_test(right, own),
            "correct": "".join(str(int(hit)) for hit in right),
        }
    return summary


def verdict(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """One line: whether every empty replacement that was run is worse: its interval excludes 0, and p < 0.025.

    The interval is of the bootstrap, which few examples can deceive; p of the exact test (`sign_test`), one-sided. All
    of them must be worse, so no correction for the number of replacements is needed.
    """
    not_shown = "the latents are not shown to be used: "
    if not summary["self"]["latent_rate"]:
        return not_shown + "no response has any"
    tried = [name for name in summary if REPLACEMENTS[name].empty]
    if not tried:
        return not_shown + "no empty replacement was run (zero, shuffle, ...)"
    as_good = [name for name in tried if not _worse(summary[name])]
    shown = [f"{name} {_points(summary[name])}" for name in (as_good or tried)]
    if as_good:
        return f"{not_shown}not clearly worse without them: {', '.join(shown)}"
    return f"the latents are used: worse without them: {', '.join(shown)}"


def _worse(row: Mapping[str, Any]) -> bool:
    return bool(row["difference_ci95"][1] < 0 and row["difference_p"] < 0.025)


def _points(row: Mapping[str, Any]) -> str:
    unsure = "" if _worse(row) or row["difference_ci95"][1] >= 0 else f", p = {row['difference_p']:.2f}"
    return f"{100 * row['difference']:+.1f} ({in_points(row['difference_ci95'])}{unsure})"

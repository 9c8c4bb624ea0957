"""`mirage bench decode`: the engine beside transformers' `generate` and beside one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from mirage_vlm.benchmarks.agreement import TIES, agree
from mirage_vlm.benchmarks.bounds import Memory, Reading
from mirage_vlm.benchmarks.harness import Result, Sheet, Tell, Way, interleave, over
from mirage_vlm.benchmarks.published import decode_one
from mirage_vlm.benchmarks.workload import (
    attention,
    bundled,
    decode,
    engine_for,
    generate,
    planning,
    random_model,
)
from mirage_vlm.decoding import Engine, GenerationConfig
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.modeling.scratch import ScratchConfig
from mirage_vlm.trajectory import Trajectory

COMPILED, HALF = "_compiled", "_half"
ATTENTIONS = ("sdpa", "eager")  # of transformers' own ways; the faster one counts


@dataclass(frozen=True)
class Case:
    """A model, and how much is decoded with it.

    Attributes:
        shape: of random weights; None for the bundled model.
        new_tokens: positions of each response, latents included.
        repetitions, warmups: rounds.
        sequential: so many prompts are decoded one at a time. Its tokens a second do not depend on that.
        calls: batches smaller than this are decoded for several calls, until so many prompts are done.
    """

    name: str
    shape: ScratchConfig | None
    new_tokens: int
    repetitions: int
    warmups: int = 1
    sequential: int = 8
    calls: int = 4


RANDOM = ScratchConfig(width=768, layers=12, heads=12, kv_heads=4, mlp=3072)  # 105 million parameters
SMALL = ScratchConfig(width=64, layers=2, heads=2, kv_heads=1, mlp=128, vision_width=32, vision_layers=1)


@dataclass(frozen=True)
class DecodeSettings:
    """Sizes of the benchmark.

    Attributes:
        batches: prompts decoded together.
        compiled: also measure the engine with a compiled decode step, and with that and a cache in half precision;
            without, the latter is measured with the eager step.
    """

    cases: tuple[Case, ...] = (Case("bundled", None, 256, 3), Case("random", RANDOM, 32, 3, sequential=4, calls=1))
    batches: tuple[int, ...] = (1, 8, 64)
    compiled: bool = False
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def variants(self) -> tuple[str, ...]:
        """How the engine is set up: what is appended to the names of its ways."""
        return ("", COMPILED, COMPILED + HALF) if self.compiled else ("", HALF)

    @classmethod
    def quick(cls) -> DecodeSettings:
        """Enough to see that it works."""
        return cls(
            (Case("bundled", None, 12, 1, 0, sequential=4, calls=1), Case("random", SMALL, 12, 1, 0, 4, calls=1))
        )

    def changed(self, new_tokens: int | None, repetitions: int | None) -> DecodeSettings:
        """With other lengths and numbers of repetitions, where they are given."""
        changes = {"new_tokens": new_tokens, "repetitions": repetitions}
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        return replace(self, cases=tuple(replace(case, **given) for case in self.cases))


def run(settings: DecodeSettings, tell: Tell) -> Result:
    """Measure every case.

    Raises:
        Disagreement: two ways say different things.
    """
    result = Result("decode", asdict(settings))
    heads = ("model", "batch", "way", "tokens/s", "steps alone", "latents/s", "ms/step", "% of bound")
    result.sheets.append(Sheet("decode: tokens and latents a second, prompts included; steps alone", heads))
    for case in settings.cases:
        _Measured(case, settings, tell).into(result)
    return result


@dataclass(frozen=True)
class _Thing:
    """One of the compared things: decodes its prompts, `batch` at a time, up to so many positions each."""

    batch: int
    way: str
    prompts: Sequence[Trajectory]
    decode: Callable[[Sequence[Trajectory], int], list[list[int]]]

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {self.way}"

    @property
    def first(self) -> str:
        """The run for a single token; up to there spans make no difference."""
        return f"{self.name.replace('engine_text', 'engine')}, one token"

    def once(self, new_tokens: int) -> list[list[int]]:
        """All prompts, one call after the other."""
        starts = range(0, len(self.prompts), self.batch)
        return [row for i in starts for row in self.decode(self.prompts[i : i + self.batch], new_tokens)]


def _by_engine(engine: Engine, spans: int | None, prompts: Sequence[Trajectory], new_tokens: int) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=new_tokens, max_spans=spans, return_latents=False)
    return decode(engine, prompts, config)


def _by_generate(vlm: LatentVLM, attn: str, prompts: Sequence[Trajectory], new_tokens: int) -> list[list[int]]:
    with attention(vlm, attn):
        return generate(vlm, prompts, new_tokens)


def _one_by_one(vlm: LatentVLM, attn: str, prompts: Sequence[Trajectory], new_tokens: int) -> list[list[int]]:
    with attention(vlm, attn):
        rows = [decode_one(vlm, prompt, new_tokens) for prompt in prompts]
    vlm.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return rows


class _Measured:
    """All things of one case, timed side by side: the whole call, and a call for one token, which has no step."""

    def __init__(self, case: Case, settings: DecodeSettings, tell: Tell):
        self.case, self.settings = case, settings
        device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        tell(f"{case.name}: loading")
        self.vlm = random_model(case.shape, device, dtype) if case.shape else bundled(device, dtype)
        self.things = {thing.name: thing for thing in self._things()}
        memory = Memory(device)
        ways: dict[str, Way] = {"memory": memory}
        for name, thing in self.things.items():
            ways[name] = partial(thing.once, case.new_tokens)
            ways.setdefault(thing.first, partial(thing.once, 1))
        self.runs = interleave(ways, case.repetitions, case.warmups, device, lambda what: tell(f"{case.name}: {what}"))
        self.bandwidth = memory.size / self.runs["memory"].median  # bytes a second
        self.found = {name: self._measurement(thing) for name, thing in self.things.items()}

    def _things(self) -> list[_Thing]:
        vlm, case, things = self.vlm, self.case, []
        prompts = planning(max(*self.settings.batches, case.sequential, case.calls), "test")
        for batch in self.settings.batches:
            own = prompts[: max(batch, case.calls)]
            for variant in self.settings.variants:
                half = "float16" if HALF in variant else None
                engine = engine_for(
                    vlm, own, case.new_tokens, rows=batch, compiled=COMPILED in variant, cache_dtype=half
                )
                for way, spans in (("engine", None), ("engine_text", 0)):
                    things.append(_Thing(batch, way + variant, own, partial(_by_engine, engine, spans)))
            things += [_Thing(batch, f"generate_{a}", own, partial(_by_generate, vlm, a)) for a in ATTENTIONS]
        few = prompts[: case.sequential]
        return things + [_Thing(1, f"sequential_{a}", few, partial(_one_by_one, vlm, a)) for a in ATTENTIONS]

    # -- what came out -----------------------------------------------------------------------------------------

    def into(self, result: Result) -> None:
        """Check that all say the same, and put the measurements, ratios and rows of the table into the result."""
        result.checks += self._checks()
        for found in self.found.values():
            result.measurements.append(found)
            values = (found[key] for key in ("tokens_per_second", "steps_tokens_per_second", "latents_per_second"))
            step, share = found["seconds_per_step"], found["fraction_of_bound"]
            cells = (*values, step and 1e3 * step, share and 100 * share)
            result.sheets[0].rows.append((found["model"], str(found["batch"]), found["way"], *cells))
        prefix = "" if self.case.shape is None else f"{self.case.name}_"
        for kind, rate in (("", "tokens_per_second"), ("steps_", "steps_tokens_per_second")):
            for batch in self.settings.batches:
                for suffix in self.settings.variants:
                    name = f"decode_{kind}{prefix}b{batch}_over"
                    text = self._rate(rate, batch, f"engine_text{suffix}")
                    ours = self._rate(rate, batch, f"engine{suffix}")
                    theirs = self._fastest(rate, batch, "generate")
                    published = self._fastest(rate, 1, "sequential")
                    result.ratios[f"{name}_generate{suffix}"] = over(text, theirs)
                    result.ratios[f"{name}_sequential{suffix}"] = over(ours, published)

    def _checks(self) -> list[dict[str, Any]]:
        def compare(one: _Thing, other: _Thing) -> dict[str, Any]:
            found, expected = (self.runs[thing.name].output for thing in (one, other))
            n = min(len(found), len(expected))
            what = f"{self.case.name}: {one.name} and {other.name}"
            least = TIES[torch.float16] if HALF in one.way else None
            return agree(self.vlm, what, one.prompts[:n], found[:n], expected[:n], least)

        checks = []
        for batch in self.settings.batches:
            for way, other in (("engine_text", "generate"), ("engine", "sequential")):
                baselines = [self.things[f"batch {batch if way != 'engine' else 1}, {other}_{a}"] for a in ATTENTIONS]
                for suffix in self.settings.variants:
                    checks += [compare(self.things[f"batch {batch}, {way}{suffix}"], b) for b in baselines]
        return checks

    def _measurement(self, thing: _Thing) -> dict[str, Any]:
        whole, first = self.runs[thing.name], self.runs[thing.first]
        rows: list[list[int]] = whole.output
        tokens = sum(map(len, rows))
        latents = sum(row.count(self.vlm.config.pad_id) for row in rows)
        spent = whole.median - first.median  # on all positions but the first of each row
        steps = (self.case.new_tokens - 1) * -(-len(rows) // thing.batch)
        step = spent / steps if steps and spent > 0 else None
        prompt = sum(len(self.vlm.encoder.prompt(p.prompt)[0]) for p in thing.prompts) / len(thing.prompts)
        least = Reading.of(self.vlm).step(thing.batch * (prompt + self.case.new_tokens / 2)) / self.bandwidth
        return {
            "model": self.case.name,
            "batch": thing.batch,
            "way": thing.way,
            "rows": len(rows),
            "tokens": tokens,
            "latents": latents,
            "seconds": whole.seconds,
            "seconds_one_token": first.seconds,
            "median": whole.median,
            "median_one_token": first.median,
            "tokens_per_second": tokens / whole.median,
            "latents_per_second": latents / whole.median,
            "steps_tokens_per_second": (tokens - len(rows)) / spent if step else None,
            "seconds_per_step": step,
            "bound_seconds_per_step": least,
            "fraction_of_bound": least / step if step else None,
            "bandwidth": self.bandwidth,
        }

    def _rate(self, rate: str, batch: int, way: str) -> float | None:
        return self.found[f"batch {batch}, {way}"][rate]

    def _fastest(self, rate: str, batch: int, way: str) -> float | None:
        """The better of a way of transformers with either attention."""
        rates = [self._rate(rate, batch, f"{way}_{name}") for name in ATTENTIONS]
        return max((r for r in rates if r is not None), default=None)

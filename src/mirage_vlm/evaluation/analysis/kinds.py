"""The analyses by name, and a whole one: decode, measure, draw, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_vlm.decoding import EngineConfig, GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis import attention, nearest, probe, projection, similarity
from mirage_vlm.evaluation.analysis.figures import save
from mirage_vlm.evaluation.analysis.material import Example, gather
from mirage_vlm.evaluation.evaluate import write_json
from mirage_vlm.evaluation.hashes import model_sha256
from mirage_vlm.evaluation.plots import check_figure
from mirage_vlm.evaluation.run import Run, Settings, Source, settings_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mirage_vlm.modeling import LatentVLM


@dataclass(frozen=True)
class Wish:
    """What may be chosen of an analysis: the seed of its draws, and the method of a projection."""

    seed: int = 0
    method: str = "pca"


@dataclass(frozen=True)
class Analysis:
    """One kind of analysis.

    Attributes:
        measure: the numbers, as JSON can hold them.
        draw: the picture of those.
        table: the same in short, rows of cells under a row of headings.
        helpers: it looks at helper images.
    """

    measure: Callable[[LatentVLM, Sequence[Example], Wish], dict[str, Any]]
    draw: Callable[[dict[str, Any], Sequence[Example]], Figure]
    table: Callable[[dict[str, Any]], list[list[str]]]
    helpers: bool = True


ANALYSES: dict[str, Analysis] = {
    "attention": Analysis(
        lambda vlm, examples, wish: attention.measure(vlm, examples),
        lambda numbers, examples: attention.draw(numbers),
        attention.table,
        helpers=False,
    ),
    "nearest": Analysis(
        lambda vlm, examples, wish: nearest.measure(vlm, examples),
        nearest.draw,
        nearest.table,
    ),
    "similarity": Analysis(
        lambda vlm, examples, wish: similarity.measure(examples),
        lambda numbers, examples: similarity.draw(numbers),
        similarity.table,
    ),
    "projection": Analysis(
        lambda vlm, examples, wish: projection.measure(vlm, examples, wish.method, wish.seed),
        lambda numbers, examples: projection.draw(numbers),
        projection.table,
    ),
    "probe": Analysis(
        lambda vlm, examples, wish: probe.measure(examples, wish.seed),
        lambda numbers, examples: probe.draw(numbers),
        probe.table,
    ),
}


def check(kind: str, out: Path, wish: Wish) -> Analysis:
    """The analysis of that name, before anything is loaded.

    Raises:
        MirageError: there is none, `out` is a file, or something that it needs is not installed.
    """
    if kind not in ANALYSES:
        raise MirageError(f"unknown analysis {kind!r}; choose one of {', '.join(ANALYSES)}")
    if kind != "projection" and wish.method != "pca":
        raise MirageError(f"only a projection has a method; leave --method out for {kind}")
    projection.check_method(wish.method)
    if out.exists() and not out.is_dir():
        raise MirageError(f"{out} is a file; name a folder for {kind}.png and {kind}.json")
    check_figure(out / f"{kind}.png")
    return ANALYSES[kind]


def analyse(
    kind: str,
    vlm: LatentVLM,
    model: str,
    source: Source,
    generation: GenerationConfig,
    out: Path,
    *,
    wish: Wish | None = None,
    engine: EngineConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Decode, measure, and write `<kind>.json` and `<kind>.png` to a folder.

    Args:
        model: the checkpoint's name, as it was asked for.
        progress: called with the number of responses that were finished.

    Returns:
        What the JSON holds: `kind`; `model`, `data`, `generation`, `engine`, `seed`, `sha256` and `versions`, as
        results of an evaluation have them; `method`; `n` examples and `with_latents`, those whose responses consumed
        latents and were looked at; `date`; and the `numbers` of the analysis.

    Raises:
        MirageError: as `check`, `gather` and the analysis; or a file cannot be written.
    """
    wish, engine = wish or Wish(), engine or EngineConfig()
    analysis = check(kind, out, wish)
    was_training = vlm.training
    vlm.eval()
    try:
        examples = gather(vlm, source.examples, generation, helpers=analysis.helpers, engine=engine, progress=progress)
        numbers = analysis.measure(vlm, examples, wish)
    finally:
        vlm.train(was_training)
    settings = settings_of(Run(model, source), Settings(generation, engine, seed=wish.seed), model_sha256(model))
    settings["generation"]["return_latents"] = True
    results = {
        "kind": kind,
        **settings,
        "method": wish.method if kind == "projection" else None,
        "n": len(source.examples),
        "with_latents": len(examples),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "numbers": numbers,
    }
    save(analysis.draw(numbers, examples), out / f"{kind}.png")
    write_json(out / f"{kind}.json", results)
    return results

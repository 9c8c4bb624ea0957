"""`mirage eval`: accuracy of checkpoints on data files or on freshly made test maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirage_vlm.cli.options import (
    Device,
    MaxPixels,
    MinPixels,
    SpanAfter,
    Spans,
    device_of,
    levels_of,
    load_model,
    new_console,
    new_table,
    open_sources,
    progress_bar,
    show_table,
    untold_note,
)
from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    from rich.table import Table

    from mirage_vlm.evaluation.run import Run


def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A checkpoint folder or hub name, or `bundled` (the default); repeat it for several."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="JSONL file (chat, reference or plain VSP form) or dataset; repeat it for several."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Make held-out examples of this task; repeat it for several. Of --data's rows without a task: theirs."
        ),
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Levels made with --task, such as the sides of maps.")] = None,
    n: Annotated[int, typer.Option(help="Number of examples made with --task.")] = 400,
    style: Annotated[
        str | None, typer.Option(help="Prompt of made examples and of plain VSP maps; cot where the task has it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of made examples, of sampling, of noise and of intervals.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first examples.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most positions of a response, latents included.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option()] = 0,
    spans: Spans = "free",
    span_after: SpanAfter = None,
    batch_size: Annotated[int, typer.Option(help="Most responses decoded together.")] = 64,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Most positions in the key-value cache; half of the free memory by default.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the decode step; pays in long runs.")] = False,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(help="Write results.json here; with several models or data, a folder for them.")
    ] = None,
    trajectories: Annotated[
        Path | None, typer.Option(help="Write every decoded trajectory to this JSONL; with several, a folder.")
    ] = None,
    replace: Annotated[
        str | None,
        typer.Option(
            help="Test whether latents are used: decode with these in their place, as zero,shuffle, or `all`."
        ),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the replacement test to this .png or .svg; with several, a folder.")
    ] = None,
    lmms: Annotated[
        Path | None, typer.Option(help="Write lmms-eval's layout to this folder too; needs --out and --trajectories.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Let the first row that fails end it, instead of counting it as wrong.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over instead of going on where an evaluation was killed.")
    ] = False,
) -> None:
    """Decode, score and count: accuracy by level, optimal plans, latent spans, invalid answers.

    A row that cannot be decoded or scored is an error: shown with its reason, and counted as wrong.

    With --out an evaluation that is killed goes on where it was when the command is repeated.
    """
    from mirage_vlm.decoding import EngineConfig, GenerationConfig
    from mirage_vlm.evaluation.lmms_layout import write_lmms
    from mirage_vlm.evaluation.refusals import count_untold
    from mirage_vlm.evaluation.replace import chosen
    from mirage_vlm.evaluation.run import Settings, plan, run_all
    from mirage_vlm.modeling.config import check_limits

    names = () if replace is None else chosen([name.strip() for name in replace.split(",")])
    check_limits(min_pixels, max_pixels)
    if figure is not None and not names:
        raise MirageError("--figure draws the replacement test: add --replace, such as --replace all")
    if lmms is not None and (out is None or trajectories is None):
        raise MirageError("--lmms is written from the results and the trajectories: add --out and --trajectories")
    settings = Settings(
        GenerationConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            spans=spans,
            span_after=span_after,
        ),
        EngineConfig(max_rows=batch_size, max_batch_tokens=max_batch_tokens, compile=compiled),
        names,
        seed,
        {"min_pixels": min_pixels, "max_pixels": max_pixels},
        strict,
    )
    if not data and not task:
        raise MirageError("say what to evaluate on: give --data or --task")
    place = device_of(device)
    sources = open_sources(data or [], task or [], levels_of(levels), n, style, seed, limit)
    runs = plan(model or ["bundled"], sources, out, trajectories, figure)
    console = new_console(stderr=True)
    with progress_bar(console) as bar:
        total = sum(len(run.source.examples) for run in runs) * max(1, len(names))
        work = bar.add_task("decoding", total=total)
        found = list(
            run_all(
                runs,
                settings,
                lambda name: load_model(name, place, min_pixels, max_pixels),
                restart=restart,
                progress=lambda done: bar.update(work, advance=done),
                tell=lambda line: console.print(line, markup=False, soft_wrap=True),
            )
        )
    shown = new_console()
    for run, results in zip(runs, found, strict=True):
        show_table(_measures(results, "" if len(runs) == 1 else f" on {run.source.label}"), shown)
        if results.get("failed"):
            shown.print(_failed(results, run), markup=False, soft_wrap=True)
        if "replacements" in results:
            show_table(_replacements(results), shown)
            shown.print(results["verdict"], markup=False, soft_wrap=True)
    for source in sources:
        if (untold := count_untold(source.examples)) > 0:
            console.print(f"note: {source.label}: {untold_note(untold)}", markup=False)
    for run in runs if lmms is not None else ():
        assert run.out is not None and run.trajectories is not None and lmms is not None
        write_lmms(run.out, run.trajectories, lmms)
    if len(runs) > 1:
        show_table(_summary(found, [run.source.label for run in runs]), shown)


def _failed(results: dict[str, Any], run: Run) -> str:
    """How many rows were errors, and the first of them."""
    first, n = results["failed"][0], len(results["failed"])
    where = first["where"] if first["where"].startswith(run.source.label) else f"{run.source.label}, {first['where']}"
    found = f"{n} of {results['n']} rows failed and {'counts' if n == 1 else 'count'} as wrong"
    all_of_them = f" (all are listed in {run.out})" if n > 1 and run.out is not None else ""
    return f"{found}; {'the first, ' if n > 1 else ''}{where}: {first['reason']}{all_of_them}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(ends: Sequence[float]) -> str:
    return "–".join(map(_percent, ends))


def _measures(results: dict[str, Any], where: str) -> Table:
    examples = f"{results['n']} {'example' if results['n'] == 1 else 'examples'}"
    table = new_table(f"{results['model']}{where}: {examples} in {results['seconds']:.1f} s")
    for heading in ("level", "n", "right %", "95 %", "optimal %", "latent %", "invalid %", "latents", "tokens"):
        table.add_column(heading, justify="right", no_wrap=heading == "95 %")
    groups = [results["by_level"], results.get("by_task", {}), {"all": results}]
    for rows in filter(None, groups):
        for name, row in rows.items():
            table.add_row(
                name,
                str(row["n"]),
                _percent(row["accuracy"]),
                _interval(row["ci95"]),
                _percent(row["optimal_rate"]),
                _percent(row["latent_rate"]),
                _percent(row["invalid_rate"]),
                f"{row['latents_per_response']:.1f}",
                f"{row['tokens_per_response']:.1f}",
            )
        table.add_section()
    return table


def _replacements(results: dict[str, Any]) -> Table:
    from mirage_vlm.evaluation.intervals import in_points

    table = new_table("with something else for latents")
    for heading in ("latents", "%", "", "95 %", "− self", "95 % of that"):
        table.add_column(heading, justify="left" if heading in ("latents", "") else "right", no_wrap=True)
    for name, row in results["replacements"].items():
        table.add_row(
            name,
            _percent(row["accuracy"]),
            _bar(row["accuracy"]),
            _interval(row["ci95"]),
            "" if name == "self" else f"{100 * row['difference']:+.1f}",
            "" if name == "self" else in_points(row["difference_ci95"]),
        )
    return table


def _summary(found: Sequence[dict[str, Any]], data: Sequence[str]) -> Table:
    table = new_table("all evaluations")
    for heading in ("model", "data", "n", "right %", "95 %", "latent %", "invalid %", "seconds"):
        table.add_column(
            heading, justify="left" if heading in ("model", "data") else "right", no_wrap=heading == "95 %"
        )
    if tested := any("verdict" in results for results in found):
        table.add_column("latents")
    if failing := any(results.get("failed") for results in found):
        table.add_column("failed", justify="right")
    for results, label in zip(found, data, strict=True):
        used = results.get("verdict", "").startswith("the latents are used")
        table.add_row(
            results["model"],
            label,
            str(results["n"]),
            _percent(results["accuracy"]),
            _interval(results["ci95"]),
            _percent(results["latent_rate"]),
            _percent(results["invalid_rate"]),
            f"{results['seconds']:.1f}",
            *(["used" if used else "not shown to be used"] if tested else []),
            *([str(len(results.get("failed", [])))] if failing else []),
        )
    return table


def _bar(share: float, width: int = 12) -> str:
    """A share as a bar of text, to an eighth of a character."""
    eighths = round(8 * width * share)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()

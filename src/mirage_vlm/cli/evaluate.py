"""`mirage eval`: accuracy of a checkpoint on a data file or on freshly made test maps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirage_vlm.cli.data import Style
from mirage_vlm.cli.options import load_model, parse_levels
from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mirage_vlm.trajectory import Trajectory


def evaluate(
    model: Annotated[str, typer.Option(help="A checkpoint folder or hub name, or `bundled`.")] = "bundled",
    data: Annotated[
        Path | None, typer.Option(help="JSONL file (chat, reference or plain VSP form) or dataset.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Make held-out examples of this task instead.")] = None,
    levels: Annotated[str, typer.Option(help="Side lengths of the maps made with --task.")] = "3,4,5,6",
    n: Annotated[int, typer.Option(help="Number of examples made with --task.")] = 400,
    style: Annotated[Style, typer.Option(help="Prompt of made examples and of plain VSP maps.")] = Style.COT,
    seed: Annotated[int, typer.Option(help="Seed of made examples and of sampling.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Take only the first examples.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most positions of a response, latents included.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option()] = 0,
    batch_size: Annotated[int, typer.Option(help="Most responses decoded together.")] = 64,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Most positions in the key-value cache; half of the free memory by default.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the decode step; pays in long runs.")] = False,
    device: Annotated[str | None, typer.Option(help="For example cuda; the CPU by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write results.json here.")] = None,
    trajectories: Annotated[Path | None, typer.Option(help="Write every decoded trajectory to this JSONL.")] = None,
    replace: Annotated[
        str | None,
        typer.Option(
            help="Test whether latents are used: decode with these in their place, as zero,shuffle, or `all`."
        ),
    ] = None,
) -> None:
    """Decode, score and count: accuracy by level, optimal plans, latent spans, invalid answers."""
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

    from mirage_vlm.decoding import EngineConfig, GenerationConfig
    from mirage_vlm.evaluation.evaluate import evaluate as run
    from mirage_vlm.evaluation.evaluate import report, write_json
    from mirage_vlm.evaluation.replace import chosen, replacement_test, summarise_replacements, verdict
    from mirage_vlm.formats import write_jsonl

    names = [] if replace is None else chosen([name.strip() for name in replace.split(",")])
    examples = _examples(data, task, parse_levels(levels), n, style, seed)[:limit]
    vlm = load_model(model, device)
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        return_latents=trajectories is not None,
    )
    engine = EngineConfig(max_rows=batch_size, max_batch_tokens=max_batch_tokens, compile=compiled)
    started = time.perf_counter()
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        work = bar.add_task("decoding", total=len(examples) * max(1, len(names)))

        def progress(done: int) -> None:
            bar.update(work, advance=done)

        if names:
            replaced = replacement_test(vlm, examples, names, generation, engine, progress, seed)
            scored = replaced["self"]
        else:
            replaced, scored = {}, run(vlm, examples, generation, engine, progress)
    origin = {"path": str(data)} if data else {"task": task, "levels": parse_levels(levels), "n": n, "seed": seed}
    results = report(scored, model=model, data={**origin, "style": style.value}, generation=generation, started=started)
    if replaced:
        results["replacements"] = summarise_replacements(replaced, seed)
        results["verdict"] = verdict(results["replacements"])
    if trajectories is not None:
        write_jsonl(trajectories, [s.trajectory for s in scored])
    if out is not None:
        write_json(out, results)
    _print(results)
    if replaced:
        _print_replacements(results)


def _examples(
    data: Path | None, task: str | None, levels: tuple[int, ...], n: int, style: Style, seed: int
) -> Sequence[Trajectory]:
    from mirage_vlm.formats import read_data
    from mirage_vlm.tasks import from_record
    from mirage_vlm.tasks.make import GeneratedDataset

    if (data is None) == (task is None):
        raise MirageError("say what to evaluate on: give one of --data and --task")
    if data is not None:
        plain_style = "direct" if style is Style.DIRECT else "cot"
        return read_data(data, plain=lambda record: from_record(record, style=plain_style))
    assert task is not None
    made = GeneratedDataset(task, levels, n, seed, style.value, "test")
    return [made[i] for i in range(len(made))]


def _print(results: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    title = f"{results['model']}: {results['n']} examples in {results['seconds']:.1f} s"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("level", "n", "right %", "95 %", "optimal %", "latent %", "invalid %", "latents", "tokens"):
        table.add_column(heading, justify="right", no_wrap=heading == "95 %")
    for name, row in [*results["by_level"].items(), ("all", results)]:
        if name == "all":
            table.add_section()
        table.add_row(
            name,
            str(row["n"]),
            percent(row["accuracy"]),
            "–".join(map(percent, row["ci95"])),
            percent(row["optimal_rate"]),
            percent(row["latent_rate"]),
            percent(row["invalid_rate"]),
            f"{row['latents_per_response']:.1f}",
            f"{row['tokens_per_response']:.1f}",
        )
    Console().print(table)


def _print_replacements(results: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from mirage_vlm.evaluation.intervals import in_points

    table = Table(title="with something else for latents", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("latents", "%", "", "95 %", "− self", "95 % of that"):
        table.add_column(heading, justify="left" if heading in ("latents", "") else "right", no_wrap=True)
    for name, row in results["replacements"].items():
        table.add_row(
            name,
            f"{100 * row['accuracy']:.1f}",
            _bar(row["accuracy"]),
            "–".join(f"{100 * end:.1f}" for end in row["ci95"]),
            "" if name == "self" else f"{100 * row['difference']:+.1f}",
            "" if name == "self" else in_points(row["difference_ci95"]),
        )
    console = Console()
    console.print(table)
    console.print(results["verdict"], highlight=False)


def _bar(share: float, width: int = 12) -> str:
    """A share as a bar of text, to an eighth of a character."""
    eighths = round(8 * width * share)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()

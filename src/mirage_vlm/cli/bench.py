"""`mirage bench`: how fast decoding and training are, beside other ways of doing the same."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mirage_vlm.benchmarks.harness import Sheet


class Benchmark(StrEnum):
    DECODE = "decode"
    TRAIN = "train"
    SCALING = "scaling"
    GPU = "gpu"
    ALL = "all"


class DType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Model(StrEnum):
    BUNDLED = "bundled"
    RANDOM = "random"
    SMALLER = "3b"
    LARGER = "7b"


def bench(
    name: Annotated[Benchmark, typer.Argument(help="What to measure; see benchmarks/README.md.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute or two, to see that everything works; the times mean nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write everything that was measured to this JSON.")] = None,
    device: Annotated[
        str | None, typer.Option(help="For example cuda; by default the CPU, and for gpu the CUDA device.")
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of weights and cache; float32 by default, bfloat16 for gpu.")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Positions of each response (decode).")] = None,
    repetitions: Annotated[int | None, typer.Option(help="Rounds that are timed.")] = None,
    model: Annotated[
        Model | None, typer.Option(help="Measure only this model: bundled, random (decode), 3b, 7b (gpu).")
    ] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes, with commas (decode, gpu).")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Measure a compiled decode step too (decode), or it alone (gpu), or the eager one alone; by default "
            "both, where torch can and without --quick.",
        ),
    ] = None,
) -> None:
    """Measure speed beside other ways of doing the same, all in one run."""
    from transformers.utils import logging

    from mirage_vlm.benchmarks.suite import Options, joined, measure, names_of
    from mirage_vlm.cli.options import parse_levels
    from mirage_vlm.evaluation.evaluate import write_json

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    kind, one_model = (None if option is None else option.value for option in (dtype, model))
    sizes = None if batches is None else parse_levels(batches, "--batches")
    options = Options(quick, device, kind, new_tokens, repetitions, compiled, one_model, sizes)
    names = names_of(name.value, options)
    options.check(names)
    command = shlex.join(["mirage", *sys.argv[1:]])
    parts: dict[str, dict[str, Any]] = {}

    def keep(report: dict[str, Any]) -> None:
        parts[report["benchmark"]] = report
        if out is not None:
            write_json(out, joined([*parts.values()]) if name is Benchmark.ALL else report)

    for one in names:
        with _progress(one) as tell:
            result = measure(one, options, command, tell, out, keep)
        for sheet in result.sheets:
            _print(sheet)
        _print_ratios(one, result.ratios)
    if out is not None:
        typer.echo(f"the measurements are in {out}")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[str], None]]:
    """Says on a terminal what is being done."""
    from mirage_vlm.cli.options import new_console

    console = new_console(stderr=True)
    if not console.is_terminal:
        yield lambda what: None
        return
    with console.status(name) as status:
        yield lambda what: status.update(f"{name}: {what}")


def _print(sheet: Sheet) -> None:
    from mirage_vlm.cli.options import new_table, show_table

    table = new_table(sheet.title)
    for i, heading in enumerate(sheet.headings):
        words = any(isinstance(cell := row[i], str) and not cell.isdigit() for row in sheet.rows)
        table.add_column(heading, justify="left" if words else "right", no_wrap=words)
    for row in sheet.rows:
        table.add_row(*map(_cell, row))
    show_table(table)


def _print_ratios(name: str, ratios: dict[str, float | None]) -> None:
    from mirage_vlm.benchmarks.harness import Sheet

    title = f"{name}: ratios, throughput over throughput, more is better"
    _print(Sheet(title, ("ratio", "×"), [(key, value) for key, value in ratios.items()]))


def _cell(value: str | float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"

"""`mirage study`: many recipes with several seeds, trained and tested alike, and the page of what they came to."""

from __future__ import annotations

import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


def study(
    file: Annotated[Path, typer.Argument(help="A study in YAML; see recipes/research/.")],
    rows: Annotated[str | None, typer.Option(help="Only these rows, with commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these seeds, with commas.")] = None,
    report: Annotated[Path | None, typer.Option(help="Run nothing; write the tables of what is done here.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Run nothing; draw what is done, as .png or .svg.")] = None,
    curve: Annotated[
        str | None, typer.Option(help="Of --figure: this metric of the runs over their steps, for example reward.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="To test on; by default CUDA where there is one, else the CPU, as training does."),
    ] = None,
) -> None:
    """Train and test what is not done yet. A study that was stopped goes on where it was.

    Start it several times to work at several runs at once.
    """
    from mirage_vlm.cli.options import device_of, load_model, parse_levels
    from mirage_vlm.errors import MirageError
    from mirage_vlm.evaluation.curves import draw_curves
    from mirage_vlm.evaluation.study import Taken, load_study, run_row
    from mirage_vlm.evaluation.study_report import draw, lines, page
    from mirage_vlm.formats import atomic_writer

    found = load_study(file)
    wanted = found.rows if rows is None else tuple(found.row(name.strip()) for name in rows.split(","))
    numbers = found.seeds if seeds is None else parse_levels(seeds, "--seeds")
    if unknown := set(numbers) - set(found.seeds):
        raise MirageError(f"--seeds: the study has no {', '.join(map(str, sorted(unknown)))}")
    if curve is not None:
        if figure is None or report is not None:
            raise MirageError("--curve says what --figure draws; give it that, and no --report")
        return draw_curves(found, curve, figure)
    if report is not None or figure is not None:
        if not lines(found):
            raise MirageError(f"{found.output}: nothing of the study is done yet")
        if report is not None:
            with atomic_writer(report) as out:
                picture = None if figure is None else os.path.relpath(figure, report.parent)
                out.write(page(found, shlex.join(["mirage", *sys.argv[1:]]), picture).encode())
        if figure is not None:
            draw(found, figure)
        return
    place = device_of(device)
    for seed in numbers:
        for row in (row for row in wanted if seed in found.seeds_of(row)):
            try:
                run_row(found, row, seed, partial(load_model, device=place), typer.echo)
            except Taken as other:
                typer.echo(str(other))

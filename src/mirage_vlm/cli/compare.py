"""`mirage compare`: results of `mirage eval` on the same examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mirage_vlm.errors import MirageError


def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="BASELINE OTHER...", help="results.json of two evaluations or more.")
    ],
    replacement: Annotated[
        str | None, typer.Option(help="Compare the outcomes with this in the place of the latents, such as zero.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the comparison here as JSON.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare evaluations with the first, example by example: differences in accuracy with 95 % intervals."""
    from mirage_vlm.evaluation.compare import compare as run
    from mirage_vlm.evaluation.compare import load_results
    from mirage_vlm.evaluation.evaluate import write_json

    if len(files) < 2:
        raise MirageError(f"{files[0]}: name at least one more results.json to compare it with")
    loaded = [load_results(path, replacement) for path in files]
    found = []
    for path, other in zip(files[1:], loaded[1:], strict=True):
        try:
            found.append(run(loaded[0], other, seed=seed))
        except MirageError as fault:
            raise MirageError(f"{files[0]} and {path}: {fault}") from fault
    for one in found:
        one["replacement"] = replacement or "self"
    if out is not None:
        write_json(out, found[0] if len(found) == 1 else {"comparisons": found})
    for path, one in zip(files[1:], found, strict=True):
        _print(one, files[0], path)


def _print(found: dict[str, Any], first: Path, second: Path) -> None:
    from mirage_vlm.cli.options import new_console, new_table, show_table
    from mirage_vlm.evaluation.intervals import in_points

    a, b = found["models"]
    if a == b:  # the same checkpoint with other settings
        a, b = f"{a} ({first})", f"{b} ({second})"
    title = f"A {a}, B {b}" + ("" if found["replacement"] == "self" else f", with {found['replacement']} for latents")
    table = new_table(title)
    for heading in ("level", "n", "A %", "B %", "B − A", "95 % interval", "p"):
        table.add_column(heading, justify="right")
    for name, row in [*found["by_level"].items(), ("all", found["all"])]:
        if name == "all":
            table.add_section()
        accuracies = (f"{100 * value:.1f}" for value in row["accuracy"])
        ahead = f"{100 * row['difference']:+.1f}"
        table.add_row(name, str(row["n"]), *accuracies, ahead, in_points(row["ci95"]), f"{row['p']:.3f}")
    console = new_console()
    show_table(table, console)
    for label, errors in zip("AB", found["errors"], strict=True):
        if errors:
            console.print(f"{errors} examples failed in {label} and count as wrong.")
    for label, apart in zip("AB", found["apart"], strict=True):
        if apart:
            console.print(f"{apart} examples are in {label} alone and were left out.")

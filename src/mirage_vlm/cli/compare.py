"""`mirage compare`: two results of `mirage eval` on the same examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    first: Annotated[Path, typer.Argument(help="results.json of an evaluation.")],
    second: Annotated[Path, typer.Argument(help="The same of another checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="Write the comparison here as JSON.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare two checkpoints example by example: the difference in accuracy with its 95 % interval."""
    from mirage_vlm.evaluation.compare import compare as run
    from mirage_vlm.evaluation.compare import load_results
    from mirage_vlm.evaluation.evaluate import write_json

    found = run(load_results(first), load_results(second), seed=seed)
    if out is not None:
        write_json(out, found)
    _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from mirage_vlm.evaluation.intervals import in_points

    one, other = found["models"]
    table = Table(title=f"A {one}, B {other}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("level", "n", "A %", "B %", "B − A", "95 % interval"):
        table.add_column(heading, justify="right")
    for name, row in [*found["by_level"].items(), ("all", found["all"])]:
        if name == "all":
            table.add_section()
        accuracies = (f"{100 * value:.1f}" for value in row["accuracy"])
        table.add_row(name, str(row["n"]), *accuracies, f"{100 * row['difference']:+.1f}", in_points(row["ci95"]))
    console = Console()
    console.print(table)
    for label, apart in zip("AB", found["apart"], strict=True):
        if apart:
            console.print(f"{apart} examples are in {label} alone and were left out.")

"""`mirage train`: run a recipe."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file; see recipes/ and docs/training.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as train.max_steps=50.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in output_dir.")] = False,
) -> None:
    """Train a model by a recipe."""
    from mirage_vlm.errors import MirageError
    from mirage_vlm.training.recipe import load_recipe
    from mirage_vlm.training.run import train as run_recipe
    from mirage_vlm.training.shares import SharedFault

    loaded = None
    try:
        loaded = load_recipe(recipe, overrides or ())
        final = run_recipe(loaded, resume=resume)
    except MirageError as fault:  # of several processes on a machine the first speaks for all
        common = loaded is None or isinstance(fault, SharedFault)
        if common and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # a launcher ends all processes when one ends: let the first say why
            raise typer.Exit(2) from fault
        raise
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"the model is in {final}")

"""`mirage train`: run a recipe."""

from __future__ import annotations

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
    from mirage_vlm.training.recipe import load_recipe
    from mirage_vlm.training.run import train as run_recipe

    final = run_recipe(load_recipe(recipe, overrides or ()), resume=resume)
    typer.echo(f"the model is in {final}")

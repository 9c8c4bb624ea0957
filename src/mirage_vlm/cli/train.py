"""`mirage train`: run a recipe."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    from mirage_vlm.training.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file; see recipes/ and docs/training.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as train.max_steps=50.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in output_dir.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --resume: though the recipe has changed.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default a GPU where torch finds one.", show_default=False)
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Say what it takes of a card's memory, and train not.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="With --memory: tokens of a row, its pictures included.")] = 1024,
    labels: Annotated[int, typer.Option(min=1, help="With --memory: tokens of a row that bear a label.")] = 256,
    cards: Annotated[int, typer.Option(min=1, help="With --memory: cards that share the weights (FSDP2).")] = 1,
) -> None:
    """Train a model by a recipe."""
    from mirage_vlm.training.recipe import load_recipe  # without torch, so that its faults are told at once

    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        if force and not resume:
            raise MirageError("--force goes on though the recipe has changed; give it together with --resume")
        loaded = load_recipe(recipe, overrides or (), files=not memory)
    except MirageError as fault:
        if not first:
            _leave_it_to_the_first(fault)
        raise
    if memory:
        return _show_memory(loaded, tokens, labels, cards)
    _check_launch()
    from mirage_vlm.rl.run import run_recipe
    from mirage_vlm.training.shares import SharedFault

    _quiet()
    try:
        final = run_recipe(loaded, resume=resume, force=force, device=device)
    except SharedFault as fault:
        if not first:
            _leave_it_to_the_first(fault)
        raise
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"the model is in {final}")


def _leave_it_to_the_first(fault: MirageError) -> NoReturn:
    """A launcher ends all processes of a machine when one ends: let the first say why."""
    time.sleep(10)
    raise typer.Exit(2) from fault


def _quiet() -> None:
    """No bars and hints of transformers': what a run says is in `mirage_vlm.training.telling`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _show_memory(recipe: Recipe, tokens: int, labels: int, cards: int) -> None:
    from mirage_vlm.training.memory import estimate, model_shape, sizes

    if recipe.model.path is None:
        raise MirageError("--memory plans for a model.path; a model from scratch is small enough to try")
    model = model_shape(recipe.model.path)
    found = sizes(model, recipe)
    rows = f"{recipe.train.batch_size} x {tokens} tokens, {labels} of each with a label"
    typer.echo(f"{found.total / 1e9:.2f} B parameters, {found.trained / 1e9:.3f} B of them trained; {rows}")
    parts = estimate(model, recipe, tokens=tokens, labels=labels, cards=cards)
    for name, size in {**parts, "together": sum(parts.values())}.items():
        typer.echo(f"{name:28}{size / 2**30:8.1f} GiB")


def _check_launch() -> None:
    """`accelerate launch --cpu` sets out for several processes, but starts one; its environment tells."""
    several = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if several and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & os.environ.keys():
        typer.echo(
            "warning: this is one process; accelerate launch --cpu starts no more without mpirun. For two, take "
            "recipes/accelerate/cpu-2.yaml or torchrun --nproc_per_node 2",
            err=True,
        )

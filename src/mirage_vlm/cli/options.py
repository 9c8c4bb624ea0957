"""What several commands share: reading option values, loading a model, opening data, tables and progress bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from mirage_vlm.cli.data import Style
    from mirage_vlm.evaluation.run import Source
    from mirage_vlm.modeling import LatentVLM


MinPixels = Annotated[int | None, typer.Option(help="Enlarge pictures of fewer pixels; the checkpoint's by default.")]
MaxPixels = Annotated[int | None, typer.Option(help="Shrink pictures of more pixels; the checkpoint's by default.")]
Spans = Annotated[str, typer.Option(help="Latent spans: free, forced (the model must think) or none.")]
SpanAfter = Annotated[
    str | None, typer.Option(help="With --spans forced: open the span after this text; at the start without.")
]


def levels_of(text: str | None) -> tuple[int, ...] | None:
    """The levels that an option names; None leaves them to the task."""
    return None if text is None else parse_levels(text)


def parse_levels(text: str, option: str = "--levels") -> tuple[int, ...]:
    """`3,4,5` → (3, 4, 5).

    Raises:
        MirageError: it is not a list of whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as fault:
        raise MirageError(f"{option} must be whole numbers with commas, such as 3,4,5,6; got {text!r}") from fault


def load_model(
    name: str, device: str | None = None, min_pixels: int | None = None, max_pixels: int | None = None
) -> LatentVLM:
    """The checkpoint of a `--model` option, loaded without transformers' own progress bars and warnings.

    Args:
        min_pixels, max_pixels: limits of the image processor; None takes the checkpoint's.

    Raises:
        MirageError: it cannot be loaded.
    """
    from transformers.utils import logging

    from mirage_vlm.modeling import LatentVLM
    from mirage_vlm.modeling.bundled import resolve

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    given: dict[str, Any] = {option: value for option, value in limits.items() if value is not None}
    return LatentVLM.from_pretrained(resolve(name), device=device, **given)


def open_sources(
    data: Sequence[Path],
    tasks: Sequence[str],
    levels: tuple[int, ...] | None,
    n: int,
    style: Style,
    seed: int,
    limit: int | None,
) -> list[Source]:
    """The examples of `--data` and `--task` options.

    Where rows of the data name no task, `--task` is theirs; otherwise its examples are made, beside the data.

    Raises:
        MirageError: a file cannot be read, or there is no such task.
    """
    from mirage_vlm.evaluation.run import Source
    from mirage_vlm.formats import read_data
    from mirage_vlm.tasks import from_record, get_task, with_task
    from mirage_vlm.tasks.make import GeneratedDataset

    common: dict[str, Any] = {"style": style.value, "limit": limit}
    sources = []
    read = [read_data(path, plain=lambda record: from_record(record, style=style.written))[:limit] for path in data]
    named = None
    if tasks and any(example.task is None for examples in read for example in examples):
        if len(tasks) > 1:
            raise MirageError(f"--data has rows without a task; name one --task for them, not {', '.join(tasks)}")
        named = get_task(tasks[0]).name
    for path, examples in zip(data, read, strict=True):
        origin = {"path": str(path), **({} if named is None else {"task": named}), **common}
        sources.append(Source(origin, [with_task(example, named) for example in examples]))
    for task in tasks if named is None else ():
        made = GeneratedDataset(task, levels, n, seed, style.value, "test")
        origin = {"task": task, "levels": list(made.levels), "n": n, "seed": seed, **common}
        sources.append(Source(origin, [made[i] for i in range(len(made))][:limit]))
    return sources


def untold_note(n: int) -> str:
    """What people should know of `n` examples that have an answer but no task."""
    examples = "1 example has" if n == 1 else f"{n:,} examples have"
    return (
        f"{examples} an answer but no task: answers are compared letter for letter, and any text counts as a valid one "
        "(--task names a task)"
    )


def new_table(title: str | None = None) -> Table:
    """An empty table in the style of all commands."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def progress_bar(console: Console) -> Progress:
    """A bar with the time that has passed and is left; seen on a terminal alone, and gone when it ends."""
    from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

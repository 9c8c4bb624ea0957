"""What several commands share: reading option values, loading a model, opening data, tables and progress bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from mirage_vlm.evaluation.run import Source
    from mirage_vlm.modeling import LatentVLM


MIXED = "mixed"  # the style of data sets whose examples have different ones
UNLIMITED = 100_000  # columns of what is not a terminal

Device = Annotated[
    str | None,
    typer.Option("--device", help="For example cuda:1 or cpu; by default CUDA where there is one, else the CPU."),
]
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


def device_of(name: str | None) -> torch.device:
    """The device of a `--device` option.

    Raises:
        MirageError: it is not here.
    """
    from mirage_vlm.modeling.devices import choose_device

    return choose_device(name)


def load_model(
    name: str,
    device: torch.device | str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> LatentVLM:
    """The checkpoint of a `--model` option, loaded without transformers' own progress bars and warnings.

    Args:
        device: of `device_of`, or its name.
        min_pixels, max_pixels: limits of the image processor; None takes the checkpoint's.

    Raises:
        MirageError: it cannot be loaded, or there is no such device.
    """
    from transformers.utils import logging

    from mirage_vlm.modeling import LatentVLM
    from mirage_vlm.modeling.bundled import resolve

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    where = device_of(device) if device is None or isinstance(device, str) else device
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    given: dict[str, Any] = {option: value for option, value in limits.items() if value is not None}
    return LatentVLM.from_pretrained(resolve(name), device=where, **given)


def style_of(task: str, wanted: str | None, usual: str = "cot", mixed: bool = True) -> str:
    """The style of a task's examples that a `--style` option asks for; by default the usual one, or its first.

    Args:
        mixed: examples may be of several styles.

    Raises:
        MirageError: there is no such task, or it has no such style; the message lists those it has.
    """
    from mirage_vlm.tasks import get_task

    found = get_task(task)
    if wanted is None:
        return usual if usual in found.styles else found.styles[0]
    mixed = mixed and set(found.mixture) <= set(found.styles)
    if wanted not in found.styles and not (mixed and wanted == MIXED):
        names = ", ".join((*found.styles, MIXED) if mixed else found.styles)
        raise MirageError(f"--style: {found.name} has no style {wanted!r}; choose from {names}")
    return wanted


def plain_style(wanted: str | None) -> str:
    """The style of plain maps in a data file; `mixed` is `cot`.

    Raises:
        MirageError: neither task of such maps has it; the message lists those they have.
    """
    from mirage_vlm.tasks import get_task

    styles = get_task("vsp-planning").styles  # those of vsp-reasoning are among them
    if wanted is not None and wanted not in (*styles, MIXED):
        raise MirageError(f"--style: maps have no style {wanted!r}; choose from {', '.join((*styles, MIXED))}")
    return "cot" if wanted in (None, MIXED) else str(wanted)


def open_sources(
    data: Sequence[Path],
    tasks: Sequence[str],
    levels: tuple[int, ...] | None,
    n: int,
    style: str | None,
    seed: int,
    limit: int | None,
) -> list[Source]:
    """The examples of `--data` and `--task` options.

    Where rows of the data name no task, `--task` is theirs; otherwise its examples are made, beside the data.

    Args:
        style: of made examples, and of plain maps in a data file; None: `cot`, or the first that a task has.

    Raises:
        MirageError: a file cannot be read, or there is no such task or style.
    """
    from mirage_vlm.evaluation.run import Source
    from mirage_vlm.formats import read_data
    from mirage_vlm.tasks import from_record, get_task, with_task
    from mirage_vlm.tasks.make import GeneratedDataset

    if data and not tasks:
        plain_style(style)
    sources = []
    read = [read_data(p, plain=lambda record: from_record(record, style=plain_style(style)))[:limit] for p in data]
    named = None
    if tasks and any(example.task is None for examples in read for example in examples):
        if len(tasks) > 1:
            raise MirageError(f"--data has rows without a task; name one --task for them, not {', '.join(tasks)}")
        named = get_task(tasks[0]).name
    for path, examples in zip(data, read, strict=True):
        origin: dict[str, Any] = {"path": str(path), **({} if named is None else {"task": named})}
        origin |= {"style": style or "cot", "limit": limit}
        sources.append(Source(origin, [with_task(example, named) for example in examples]))
    for task, written in [(task, style_of(task, style)) for task in tasks] if named is None else []:
        made = GeneratedDataset(task, levels, n, seed, written, "test")
        origin = {"task": task, "levels": list(made.levels), "n": n, "seed": seed, "style": written, "limit": limit}
        sources.append(Source(origin, [made[i] for i in range(len(made))][:limit]))
    return sources


def untold_note(n: int) -> str:
    """What people should know of `n` examples that have an answer but no task."""
    examples = "1 example has" if n == 1 else f"{n:,} examples have"
    return (
        f"{examples} an answer but no task: answers are compared letter for letter, and any text counts as a valid one "
        "(--task names a task)"
    )


def new_console(stderr: bool = False) -> Console:
    """Where commands print: on a terminal as wide as that is; in a file or a pipe nothing is wrapped or cut."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=stderr)
    if not console.file.isatty():
        console.width = UNLIMITED
    return console


def show_table(table: Table, console: Console | None = None) -> None:
    """Print a table of `new_table`, its title above it in a line of its own."""
    console = console or new_console()
    title, table.title = table.title, None
    if title:
        console.print(title, markup=False, style="italic", soft_wrap=True)  # a table folds it to its own width
    console.print(table, markup=False)


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

"""`mirage data`: check data files, make data for a task, convert between formats."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirage_vlm.cli.import_data import import_data
from mirage_vlm.cli.options import Device, device_of, levels_of, parse_levels, style_of, untold_note
from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mirage_vlm.formats import Fault
    from mirage_vlm.trajectory import Trajectory

app = typer.Typer(name="data", help="Check, make, import and convert data.", no_args_is_help=True)
app.command("import")(import_data)


class Target(StrEnum):
    """What `convert` writes."""

    CHAT = "chat"
    REFERENCE = "reference"
    DATASET = "dataset"


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A JSONL file, or a folder written by save_to_disk.")],
    files: Annotated[bool, typer.Option(help="Also open and decode every picture.")] = True,
    model: Annotated[
        str | None, typer.Option(help="Check for this checkpoint: the length of its context, and its patches.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task of examples that name none.")] = None,
) -> None:
    """Name the line and field of every fault of a data file; exit status 2 if there are any.

    Faults are what cannot be read, what the encoder would refuse, and what the scorer of the example's task would.
    """
    from mirage_vlm.formats import Faults, latent_marks, marks_note, scan
    from mirage_vlm.trajectory import Image

    refused = _refuser(model, task, files)
    examples = spans = pictures = untold = silent = 0
    found = Faults()
    marked: list[tuple[str, str]] = []
    for example in scan(path, check_files=files, plain=_read_plain):
        examples += 1
        trajectory = example.trajectory
        for fault in example.faults if trajectory is None else refused(trajectory):
            found.add(example.where, fault)
        if trajectory is not None:
            segments = [part for message in trajectory.messages for part in message.segments]
            spans += len(trajectory.spans)
            pictures += sum(isinstance(segment, Image) for segment in segments)
            marked += latent_marks(trajectory)
            untold += trajectory.task is None and task is None and trajectory.answer is not None
            silent += bool(trajectory.response) and any(turn.role == "assistant" for turn in trajectory.prompt)
    if not examples:
        raise MirageError(f"{path}: holds no examples")
    for line in found.lines():
        typer.echo(line)
    if found:
        typer.echo(f"{_count(examples, 'example')}: {_count(len(found), 'fault')}")
        raise typer.Exit(2)
    if marked:
        typer.echo(marks_note(marked))
    if untold:
        typer.echo(f"note: {untold_note(untold)}")
    if silent:
        several = "1 example has" if silent == 1 else f"{silent:,} examples have"
        typer.echo(f"note: {several} several assistant turns, of which only the last is trained on")
    counts = (_count(examples, "example"), _count(spans, "latent span"), _count(pictures, "picture"))
    typer.echo(f"{', '.join(counts)}: no faults")


@app.command()
def make(
    task: Annotated[str, typer.Argument(help="Name of the task, such as vsp-planning.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be empty or absent.")],
    levels: Annotated[str | None, typer.Option(help="Levels, such as the sides of maps.")] = None,
    n: Annotated[int, typer.Option("--n", min=0, help="Number of training examples.")] = 1000,
    n_test: Annotated[
        int | None, typer.Option(min=0, help="Number of test examples; by default n / 10, at least 100.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same files, byte for byte.")] = 0,
    style: Annotated[
        str | None, typer.Option(help="How the responses are written, a style of the task or mixed; by default direct.")
    ] = None,
    cell: Annotated[int, typer.Option(help="Pixels per side of a cell.")] = 64,
) -> None:
    """Make training and test data for a task: train.jsonl, test.jsonl and their pictures."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mirage_vlm.cli.options import new_console
    from mirage_vlm.tasks.make import write_dataset

    written_as = style_of(task, style, "direct")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = new_console(stderr=True)
    written = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"making {task}", total=None)

        def show(done: int, total: int) -> None:
            nonlocal written
            written = done
            progress.update(bar, completed=done, total=total)

        write_dataset(
            task,
            levels_of(levels),
            n,
            out,
            seed=seed,
            style=written_as,
            n_test=n_test,
            cell=cell,
            progress=show,
        )
    typer.echo(f"{out}: {_count(n, 'training example')}, {_count(written - n, 'test example')}")


@app.command()
def mix(
    task: Annotated[str, typer.Argument(help="Name of the task, such as vsp-planning.")],
    model: Annotated[str, typer.Option(help="The checkpoint whose answers decide.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be empty or absent.")],
    sure: Annotated[str, typer.Option(help="Style of responses where its answer is right.")] = "plain",
    unsure: Annotated[str, typer.Option(help="Style of responses where it is wrong.")] = "cells",
    levels: Annotated[str, typer.Option(help="Side lengths of the maps.")] = "3,4,5,6",
    n: Annotated[int, typer.Option("--n", min=1, help="Number of training examples.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the maps.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Most positions of an answer.")] = 64,
    device: Device = None,
) -> None:
    """Make training data for spans only where a checkpoint needs them: each response by what it answers without."""
    from mirage_vlm.cli.options import load_model, new_console, progress_bar
    from mirage_vlm.evaluation.mix import mix_by_answers
    from mirage_vlm.tasks.make import check_empty, write_splits

    check_empty(out)
    for style in (sure, unsure):
        style_of(task, style, mixed=False)
    vlm = load_model(model, device_of(device))
    with progress_bar(new_console(stderr=True)) as progress:
        bar = progress.add_task("answering", total=n)
        mixed = mix_by_answers(
            vlm,
            task,
            parse_levels(levels),
            n,
            sure=sure,
            unsure=unsure,
            seed=seed,
            max_new_tokens=max_new_tokens,
            progress=lambda count: progress.advance(bar, count),
        )
        writing = progress.add_task("writing", total=n)
        write_splits({"train": mixed}, out, lambda done, total: progress.update(writing, completed=done, total=total))
    right = sum(mixed.right)
    typer.echo(f"{out}: {_count(n, 'training example')}, {right} {sure} and {n - right} {unsure}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A JSONL file or a dataset folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="What to write; it must not exist.")],
    to: Annotated[
        Target | None, typer.Option(help="By default chat where DST ends in .jsonl, otherwise dataset.")
    ] = None,
    embed: Annotated[
        bool, typer.Option("--embed", help="Put all pictures into the JSONL file itself (chat only).")
    ] = False,
) -> None:
    """Convert between chat JSONL, the reference implementation's JSONL and Hugging Face datasets.

    SRC may be any of these, or plain VSP maps.

    Picture files stay where they are; pictures without a file are saved to a folder beside DST.

    A dataset holds its pictures itself.
    """
    from mirage_vlm.formats import read_data

    target = to or (Target.CHAT if destination.suffix == ".jsonl" else Target.DATASET)
    if embed and target is not Target.CHAT:
        raise MirageError(f"--embed is for chat JSONL, not for --to {target.value}")
    if destination.exists():
        raise MirageError(f"{destination}: exists already; remove it or name another")
    count = _write(target, destination, read_data(source, plain=_read_plain), embed)
    typer.echo(f"{destination}: {_count(count, 'example')}")


def _write(target: Target, path: Path, trajectories: list[Trajectory], embedded: bool) -> int:
    from mirage_vlm import formats

    if target is Target.DATASET:
        return formats.save_dataset_dir(path, trajectories)
    if target is Target.REFERENCE:
        return formats.write_reference(path, trajectories)
    folder = formats.ImageFolder(path.with_name(f"{path.stem}-images"), path.parent)
    return formats.write_jsonl(path, trajectories, image_source=formats.embed if embedded else folder)


def _refuser(model: str | None, task: str | None, files: bool) -> Callable[[Trajectory], Iterator[Fault]]:
    """What the encoder and the scorer would refuse of an example.

    Raises:
        MirageError: there is no such model or task.
    """
    from dataclasses import replace

    from mirage_vlm.formats import fitting

    bounds = fitting.ANY_MODEL if files else replace(fitting.ANY_MODEL, patches=None)
    encoder = None
    if model is not None:
        from mirage_vlm.cli.options import load_model

        encoder = load_model(model).encoder
    if task is not None:
        from mirage_vlm.tasks import get_task

        get_task(task)

    def refused(trajectory: Trajectory) -> Iterator[Fault]:
        decoded = trajectory.decoding is not None  # a response that was read, not one to learn
        if encoder is not None:
            yield from encoder.faults(trajectory, response=not decoded)
        else:
            yield from fitting.faults(trajectory, bounds, response=not decoded)
        if trajectory.task is not None or task is not None:
            from mirage_vlm.tasks import faults, with_task

            yield from faults(with_task(trajectory, task), scored=False)

    return refused


def _read_plain(record: dict[str, Any]) -> Trajectory:
    """A plain VSP map; the tasks are imported when the first one is met."""
    from mirage_vlm.tasks import from_record

    return from_record(record)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"

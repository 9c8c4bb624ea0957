"""`mirage data import`: a benchmark, or any data set that a small YAML maps, as a data file of this project."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    from mirage_vlm.trajectory import Trajectory


def import_data(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SRC]", help="A file, a folder, or a dataset of the Hugging Face hub; by default the preset's own."
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option("--as", help="A benchmark that is known; `list` names them.")] = None,
    mapping: Annotated[Path | None, typer.Option("--map", help="A YAML that says which column is what.")] = None,
    split: Annotated[str | None, typer.Option(help="In place of the usual split.")] = None,
    config: Annotated[str | None, typer.Option(help="The subset, such as Jigsaw of blink.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first examples.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The .jsonl file to write; pictures go to a folder beside it.")
    ] = None,
) -> None:
    """Write a real benchmark, or any data set with questions and answers, as JSONL for `mirage eval --data`."""
    from mirage_vlm.cli.options import new_console, progress_bar
    from mirage_vlm.formats import write_jsonl
    from mirage_vlm.sources import preset_names
    from mirage_vlm.sources.files import PictureFiles

    if preset == "list":
        typer.echo("\n".join(preset_names()))
        return
    if out is None or out.suffix != ".jsonl":
        raise MirageError("name the file to write: --out FILE.jsonl")
    if out.exists():
        raise MirageError(f"{out}: exists already; remove it or name another")
    examples = islice(_examples(source, preset, mapping, split, config), limit)
    with progress_bar(new_console(stderr=True)) as progress:
        bar = progress.add_task("importing", total=limit)

        def counted() -> Iterator[Trajectory]:
            for example in examples:
                yield example
                progress.advance(bar)

        count = write_jsonl(out, counted(), image_source=PictureFiles(out.with_name(f"{out.stem}-images"), out.parent))
    typer.echo(f"{out}: {count:,} {'example' if count == 1 else 'examples'}")


def _examples(
    source: str | None, preset: str | None, mapping: Path | None, split: str | None, config: str | None
) -> Iterator[Trajectory]:
    from mirage_vlm.sources import load, load_preset, read_mapping

    if (preset is None) == (mapping is None):
        raise MirageError("say what the data is: give --as PRESET (--as list names them) or --map FILE.yaml")
    if preset is not None:
        return load_preset(preset, source, split, config)
    assert mapping is not None
    return load(read_mapping(mapping, split, config), source)

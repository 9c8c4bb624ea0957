"""`mirage analyse`: what the latents of a checkpoint are, in numbers and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mirage_vlm.cli.options import (
    Device,
    device_of,
    levels_of,
    load_model,
    new_console,
    new_table,
    open_sources,
    progress_bar,
    show_table,
)
from mirage_vlm.errors import MirageError


def analyse(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="attention, nearest, similarity, projection or probe.")],
    model: Annotated[str, typer.Option(help="A checkpoint folder or hub name, or `bundled`.")] = "bundled",
    data: Annotated[
        Path | None, typer.Option(help="JSONL file (chat, reference or plain VSP form) or dataset.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Make held-out examples of this task.")] = None,
    levels: Annotated[str | None, typer.Option(help="Levels made with --task, such as the sides of maps.")] = None,
    n: Annotated[int, typer.Option(help="Number of examples made with --task.")] = 100,
    style: Annotated[
        str | None, typer.Option(help="Prompt of made examples and of plain VSP maps; cot where the task has it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of made examples, of draws and of halves.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first examples.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most positions of a response, latents included.")] = 256,
    method: Annotated[str, typer.Option(help="Of a projection: pca, tsne or umap.")] = "pca",
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for KIND.png and KIND.json.")] = Path("analysis"),
) -> None:
    """Decode greedily, look at the latents, and write a picture and the numbers behind it."""
    from mirage_vlm.decoding import GenerationConfig
    from mirage_vlm.evaluation.analysis.kinds import ANALYSES, Wish, check
    from mirage_vlm.evaluation.analysis.kinds import analyse as run

    wish = Wish(seed, method)
    check(kind, out, wish)
    if (data is None) == (task is None):
        raise MirageError("say what to look at: give either --data or --task")
    place = device_of(device)
    files, tasks = [] if data is None else [data], [] if task is None else [task]
    (source,) = open_sources(files, tasks, levels_of(levels), n, style, seed, limit)
    vlm = load_model(model, place)
    console = new_console(stderr=True)
    with progress_bar(console) as bar:
        work = bar.add_task("decoding", total=len(source.examples))
        generation = GenerationConfig(max_new_tokens=max_new_tokens)
        results = run(
            kind, vlm, model, source, generation, out, wish=wish, progress=lambda done: bar.update(work, advance=done)
        )
    _print(results["kind"], ANALYSES[kind].table(results["numbers"]), results, out)


def _print(kind: str, rows: list[list[str]], results: dict, out: Path) -> None:
    title = f"{kind}: {results['model']}, {results['with_latents']} of {results['n']} responses have latents"
    shown = new_table(title)
    for heading in rows[0]:
        shown.add_column(heading, justify="right")
    for row in rows[1:]:
        shown.add_row(*row)
    console = new_console()
    show_table(shown, console)
    console.print(f"{out / kind}.png and {kind}.json", highlight=False, soft_wrap=True)

"""`mirage solve` and `mirage demo`: one prompt, one decoded trajectory, shown."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirage_vlm.cli.options import (
    Device,
    MaxPixels,
    MinPixels,
    SpanAfter,
    Spans,
    device_of,
    load_model,
    new_console,
    style_of,
)
from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    import PIL.Image

    from mirage_vlm.tasks import Task
    from mirage_vlm.trajectory import Message, Trajectory

HALF_BLOCK = "▀"  # two pixels a character: the upper in the text colour, the lower in the background's
DRAWN = 60  # columns of a drawn picture
DEMO_LEVEL = 5  # of maps
BUNDLED_TASKS = "bundled-tasks"
SEES = ("geometry", "jigsaw", "sat")  # what it was trained on; all else is left to `bundled`


def solve(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]...", help="Picture files or their URLs, in order; with --question any number, or none."
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="Whose question to ask.")] = "vsp-planning",
    plan: Annotated[str | None, typer.Option(help="For vsp-reasoning: the moves to judge, such as LUUR.")] = None,
    question: Annotated[
        str | None, typer.Option(help="Ask this instead; the pictures are then taken as they are.")
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="Prompt style of the task; cot where it has that, else its first.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A checkpoint folder or hub name; by default the bundled one for the task.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most positions of the response, latents included.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    spans: Spans = "free",
    span_after: SpanAfter = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a question about pictures, or one in words alone."""
    from mirage_vlm.tasks import get_task
    from mirage_vlm.tasks.base import boxed
    from mirage_vlm.trajectory import Image, Trajectory, user_turn

    chosen = get_task(task)
    if plan is not None and (question is not None or "plan" not in chosen.needs):
        asked = "--question" if question is not None else chosen.name
        raise MirageError(f"--plan: {asked} takes no plan; leave it out, or ask --task vsp-reasoning")
    name = model or _bundled(task if question is None else "")
    written = style_of(task, style, _usual(name), mixed=False)
    if question is not None:
        pictures = [Image(path) for path in images or ()]
        for picture in pictures:
            picture.load()  # so that one that is none is told at once
        prompt: tuple[Message, ...] = (user_turn(*pictures, question),)
    else:
        prompt = _prompt(chosen, images or (), written, plan)
    from mirage_vlm.decoding import GenerationConfig  # which takes seconds: the picture has been looked at before

    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        spans=spans,
        span_after=span_after,
        return_latents=False,
    )
    vlm = load_model(name, device_of(device), min_pixels, max_pixels)
    found = vlm.generate([Trajectory(prompt)], generation)[0]
    answer = boxed(found.text)
    meaning = None if answer is None or question is not None else chosen.meaning(answer)
    if as_json:
        typer.echo(json.dumps(_summary(found, answer, meaning, name)))
        return
    console = new_console()
    console.print(_in_place(found), soft_wrap=True)
    if meaning is not None:
        console.print(f"{answer}: {meaning}", markup=False, soft_wrap=True)


def _prompt(task: Task, files: Sequence[str], style: str, plan: str | None) -> tuple[Message, ...]:
    """The task's own question about pictures.

    Raises:
        MirageError: there are too few or too many, one is not what the task asks about, or it cannot ask by itself.
    """
    from mirage_vlm.tasks.render import resize_cells
    from mirage_vlm.trajectory import Image

    if "question" in task.needs:
        raise MirageError(f"{task.name} has a question of its own for each picture: give it with --question")
    if style == "shown":
        raise MirageError("--style: shown has the helper image in its prompt, which only a made example has")
    wanted = 3 if "candidates" in task.needs else 1
    if len(files) != wanted:
        number = "one picture" if wanted == 1 else f"{wanted} pictures (the photo, and two candidates)"
        raise MirageError(
            f"{task.name} asks about {number}, not {len(files)}; to ask something else, of any number of pictures or "
            "none, use --question"
        )
    pictures = [Image(path).load() for path in files]
    if task.mazes:
        try:
            pictures = [resize_cells(picture) for picture in pictures]
        except MirageError as fault:
            raise MirageError(f"{files[0]}: {fault}; to ask something else about it, use --question") from fault
    first, *others = map(Image, pictures)
    details: dict[str, Any] = {"candidates": others} if others else {}
    if plan is not None:
        details["plan"] = plan
    elif "plan" in task.needs:
        raise MirageError(f"{task.name} needs a plan to judge: add --plan, such as --plan LUUR")
    return task.prompt(first, style, **details)


def _bundled(task: str) -> str:
    """The bundled model that knows a task."""
    return BUNDLED_TASKS if task.removesuffix("-seen") in SEES else "bundled"


def _usual(model: str) -> str:
    """The style that a model was trained for."""
    return "words" if model == BUNDLED_TASKS else "cot"


def demo(
    task: Annotated[str, typer.Option(help="Any task that makes examples; `mirage list` names them.")] = "vsp-planning",
    level: Annotated[
        int | None, typer.Option(help="Side length of the map, or the task's level; by default 5, or its first.")
    ] = None,
    style: Annotated[str | None, typer.Option(help="Prompt style; cot where the task has it, else its first.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draw this example again; a fresh one by default.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A checkpoint folder or hub name; by default the bundled one for the task.")
    ] = None,
    device: Device = None,
    save: Annotated[
        Path | None, typer.Option(help="Save the picture here, for `mirage solve`; further ones as NAME-2 and so on.")
    ] = None,
) -> None:
    """Make a fresh held-out example, let the model think about it, and let the task's checker judge."""
    from mirage_vlm.tasks import get_task
    from mirage_vlm.tasks.make import GeneratedDataset

    chosen = get_task(task)
    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    if level is None:
        usual = DEMO_LEVEL if chosen.mazes else chosen.usual[0]
        level = usual if usual in chosen.sizes else chosen.sizes[0]
    name = model or _bundled(task)
    written = style_of(task, style, _usual(name), mixed=False)
    example = GeneratedDataset(task, (level,), 1, seed, written, "test")[0]
    pictures = [image.load() for image in example.images()]
    saved = [] if save is None else _save(pictures, save)
    found = load_model(name, device_of(device)).generate([example], return_latents=False)[0]
    _show(example, pictures, found, chosen, seed)
    for path in saved:
        typer.echo(f"the picture is in {path}")


def _show(example: Trajectory, pictures: Sequence[PIL.Image.Image], found: Trajectory, task: Task, seed: int) -> None:
    """Question, response and verdict."""
    from rich.panel import Panel

    from mirage_vlm.trajectory import Text

    verdict = task.score(found)
    question = "".join(s.text for m in example.prompt for s in m.segments if isinstance(s, Text))
    console = new_console()
    for line in _drawn(pictures, example, console.color_system is not None):
        console.print(line)
    for title, text in (("question", _plain(question)), ("response", _in_place(found))):
        if console.file.isatty():
            console.print(Panel(text, title=title, title_align="left"))
        else:
            console.print(_plain(f"{title}: ").append_text(text))
    colour = "green" if verdict.correct else "red"
    console.print(f"[bold {colour}]{'right' if verdict.correct else 'wrong'}[/]: ", end="")
    console.print(verdict.verdict, markup=False, soft_wrap=True)
    spans = len(found.spans)
    latents = sum(span.k or 0 for span in found.spans)
    console.print(f"{spans} latent span{'s' if spans != 1 else ''}, {latents} latent tokens; again with --seed {seed}")


def _plain(text: str) -> Any:
    import rich.text

    return rich.text.Text(text)


def _save(pictures: Sequence[PIL.Image.Image], path: Path) -> list[Path]:
    files = [path if i == 1 else path.with_stem(f"{path.stem}-{i}") for i in range(1, len(pictures) + 1)]
    for file, picture in zip(files, pictures, strict=True):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
        except (OSError, ValueError) as fault:
            raise MirageError(f"cannot save the picture to {file}: {fault}") from fault
    return files


def _summary(found: Trajectory, answer: str | None, meaning: str | None, model: str) -> dict[str, Any]:
    assert found.decoding is not None
    return {
        "answer": answer,
        **({} if meaning is None else {"meaning": meaning}),
        "text": found.text,
        "latent_spans": len(found.spans),
        "latent_tokens": sum(span.k or 0 for span in found.spans),
        "finish_reason": found.decoding.finish_reason,
        "model": model,
    }


def _in_place(found: Trajectory) -> Any:
    """The response with its latent spans where they stood, and a mark where it was cut."""
    import rich.text

    from mirage_vlm.trajectory import LatentSpan, Text

    shown = rich.text.Text()
    for segment in found.response:
        if isinstance(segment, Text):
            shown.append(segment.text)
        elif isinstance(segment, LatentSpan):
            shown.append(f"⟦{'·' * (segment.k or 0)} {segment.k} latent tokens⟧", style="bold magenta")
    if found.decoding is not None and found.decoding.finish_reason == "length":
        n = len(found.decoding.token_ids)
        shown.append(f"⟦cut after {n} positions, --max-new-tokens⟧", style="bold red")
    return shown


def _drawn(pictures: Sequence[PIL.Image.Image], example: Trajectory, colour: bool) -> list[Any]:
    """Pictures in half blocks; without colour a map's letters, and of other pictures their sizes."""
    import rich.text

    rows = example.meta.get("map")
    if not colour and rows:
        return [rich.text.Text("\n".join(" ".join(row) for row in rows))]
    if not colour:
        sizes = ", ".join(f"{picture.width} x {picture.height}" for picture in pictures)
        noun = "pictures" if len(pictures) > 1 else "picture"
        return [rich.text.Text(f"{len(pictures)} {noun} of {sizes} pixels; --save FILE.png keeps them")]
    return [_half_blocks(picture, 12 * len(rows) if rows else None) for picture in pictures]


def _half_blocks(picture: PIL.Image.Image, columns: int | None) -> Any:
    """A picture of so many columns, by default a half-block for each few pixels, at most `DRAWN` wide."""
    import numpy as np
    import rich.text

    width = columns or min(DRAWN, picture.width)
    height = max(2, 2 * round(width * picture.height / picture.width / 2))
    pixels = np.asarray(picture.convert("RGB").resize((width, height)))  # [height, width, 3]
    shown = rich.text.Text(no_wrap=True)
    for y in range(0, height, 2):
        for x in range(width):
            above, below = (",".join(map(str, pixels[y + d, x])) for d in (0, 1))
            shown.append(HALF_BLOCK, style=f"rgb({above}) on rgb({below})")
        shown.append("\n")
    return shown

"""`mirage solve` and `mirage demo`: one picture, one decoded trajectory, shown."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirage_vlm.cli.data import Style
from mirage_vlm.cli.options import MaxPixels, MinPixels, SpanAfter, Spans, load_model
from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    import PIL.Image

    from mirage_vlm.trajectory import Message, Trajectory

HALF_BLOCK = "▀"  # two pixels a character: the upper in the text colour, the lower in the background's


def solve(
    image: Annotated[str, typer.Argument(help="Any picture file, or its URL.")],
    task: Annotated[str, typer.Option(help="Whose question to ask.")] = "vsp-planning",
    plan: Annotated[str | None, typer.Option(help="For vsp-reasoning: the moves to judge, such as LUUR.")] = None,
    question: Annotated[str | None, typer.Option(help="Ask this instead; the picture is then taken as it is.")] = None,
    style: Annotated[Style, typer.Option(help="Prompt style of the task.")] = Style.COT,
    model: Annotated[str, typer.Option(help="A checkpoint folder or hub name, or `bundled`.")] = "bundled",
    max_new_tokens: Annotated[int, typer.Option(help="Most positions of the response, latents included.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    spans: Spans = "free",
    span_after: SpanAfter = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a question about a picture."""
    from mirage_vlm.tasks import get_task
    from mirage_vlm.tasks.base import boxed
    from mirage_vlm.tasks.render import resize_cells
    from mirage_vlm.trajectory import Image, Trajectory, user_turn

    picture = Image(image).load()
    if question is not None:
        prompt: tuple[Message, ...] = (user_turn(Image(picture), question),)
    else:
        chosen = get_task(task)
        try:
            scaled = resize_cells(picture)
        except MirageError as fault:
            raise MirageError(f"{image}: {fault}; to ask something else about it, use --question") from fault
        details = {} if plan is None else {"plan": plan}
        prompt = chosen.prompt(Image(scaled), style.written, **details)
    from mirage_vlm.decoding import GenerationConfig  # which takes seconds: the picture has been looked at before

    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        spans=spans,
        span_after=span_after,
        return_latents=False,
    )
    vlm = load_model(model, min_pixels=min_pixels, max_pixels=max_pixels)
    found = vlm.generate([Trajectory(prompt)], generation)[0]
    if as_json:
        typer.echo(json.dumps(_summary(found, boxed(found.text), model)))
        return
    _console().print(_in_place(found))


def demo(
    task: Annotated[str, typer.Option(help="vsp-planning or vsp-reasoning.")] = "vsp-planning",
    level: Annotated[int, typer.Option(help="Side length of the map.")] = 5,
    style: Annotated[Style, typer.Option(help="Prompt style.")] = Style.COT,
    seed: Annotated[int | None, typer.Option(help="Draw this map again; a fresh one by default.")] = None,
    model: Annotated[str, typer.Option(help="A checkpoint folder or hub name, or `bundled`.")] = "bundled",
    save: Annotated[Path | None, typer.Option(help="Save the picture here.")] = None,
) -> None:
    """Draw a fresh held-out map, let the model think about it, and let the simulator judge."""
    from rich.panel import Panel

    from mirage_vlm.tasks import get_task
    from mirage_vlm.tasks.make import GeneratedDataset
    from mirage_vlm.trajectory import Text

    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    example = GeneratedDataset(task, (level,), 1, seed, style.written, "test")[0]
    picture = next(example.images()).load()
    if save is not None:
        _save(picture, save)
    vlm = load_model(model)
    found = vlm.generate([example], return_latents=False)[0]
    verdict = get_task(task).score(found)
    question = "".join(s.text for m in example.prompt for s in m.segments if isinstance(s, Text))
    console = _console()
    console.print(_drawn(picture, example, console.color_system is not None))
    console.print(Panel(question, title="question", title_align="left"))
    console.print(Panel(_in_place(found), title="response", title_align="left"))
    colour = "green" if verdict.correct else "red"
    console.print(f"[bold {colour}]{'right' if verdict.correct else 'wrong'}[/]: {verdict.verdict}")
    spans = len(found.spans)
    latents = sum(span.k or 0 for span in found.spans)
    console.print(f"{spans} latent span{'s' if spans != 1 else ''}, {latents} latent tokens; again with --seed {seed}")


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _save(picture: PIL.Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError) as fault:
        raise MirageError(f"cannot save the picture to {path}: {fault}") from fault


def _summary(found: Trajectory, answer: str | None, model: str) -> dict[str, Any]:
    assert found.decoding is not None
    return {
        "answer": answer,
        "text": found.text,
        "latent_spans": len(found.spans),
        "latent_tokens": sum(span.k or 0 for span in found.spans),
        "finish_reason": found.decoding.finish_reason,
        "model": model,
    }


def _in_place(found: Trajectory) -> Any:
    """The response with its latent spans where they stood."""
    import rich.text

    from mirage_vlm.trajectory import LatentSpan, Text

    shown = rich.text.Text()
    for segment in found.response:
        if isinstance(segment, Text):
            shown.append(segment.text)
        elif isinstance(segment, LatentSpan):
            shown.append(f"⟦{'·' * (segment.k or 0)} {segment.k} latent tokens⟧", style="bold magenta")
    return shown


def _drawn(picture: PIL.Image.Image, example: Trajectory, colour: bool) -> Any:
    """The picture in half blocks, 12 characters a cell; the map's letters where there is no colour."""
    import numpy as np
    import rich.text

    rows = example.meta["map"]
    if not colour:
        return rich.text.Text("\n".join(" ".join(row) for row in rows))
    side = 12 * len(rows)
    pixels = np.asarray(picture.resize((side, side)))  # [side, side, 3]
    shown = rich.text.Text()
    for y in range(0, side, 2):
        for x in range(side):
            above, below = (",".join(map(str, pixels[y + d, x])) for d in (0, 1))
            shown.append(HALF_BLOCK, style=f"rgb({above}) on rgb({below})")
        shown.append("\n")
    return shown

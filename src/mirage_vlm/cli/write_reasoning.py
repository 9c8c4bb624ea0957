"""`mirage write-reasoning`: reasoning texts for a data file, written by a stronger model at an endpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirage_vlm.cli.options import new_console, progress_bar
from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    from rich.console import Console

    from mirage_vlm.reasoning.write import Report


def write_reasoning(
    data: Annotated[
        Path, typer.Argument(help="JSONL with an answer and a latent span with its helper image in each line.")
    ],
    endpoint: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible API, as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="Name of the model there; it must see pictures.")],
    out: Annotated[Path, typer.Option(help="JSONL to write.")],
    key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the API key; by default OPENAI_API_KEY.")
    ] = None,
    mark: Annotated[str, typer.Option(help="Stands in the text where the helper image belongs.")] = "<helper/>",
    attempts: Annotated[int, typer.Option(min=1, help="Most texts to ask for, for each line.")] = 3,
    max_words: Annotated[int, typer.Option(min=1, help="Most words of a text.")] = 300,
    forbid: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Reject texts in which this occurs; repeat it for several."),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Field of the request, such as temperature=0.7; repeat it for several."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests at a time.")] = 4,
    per_minute: Annotated[float | None, typer.Option(help="Most requests a minute; no limit by default.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 120.0,
    tries: Annotated[
        int, typer.Option(min=1, help="Most requests for one text, where the endpoint is busy or fails.")
    ] = 8,
    price_in: Annotated[float | None, typer.Option(min=0, help="Price of a million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0, help="Price of a million completion tokens.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Try only the first lines, to see what comes.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what was written to OUT before, and start over.")
    ] = False,
) -> None:
    """Let a stronger model write the reasoning, with a mark where the helper image belongs, and check every text.

    Killed or repeated, it goes on where it was: lines that have a text keep it, the others are tried again.

    Exit status 1 says that some lines have no text; they are listed in OUT.rejected.jsonl.
    """
    from mirage_vlm.reasoning.accept import Rules
    from mirage_vlm.reasoning.endpoint import Connection
    from mirage_vlm.reasoning.write import rejected_path
    from mirage_vlm.reasoning.write import write_reasoning as run

    if (price_in is None) != (price_out is None):
        raise MirageError("give both --price-in and --price-out, or neither")
    prices = None if price_in is None or price_out is None else (price_in, price_out)
    rules = Rules(mark, max_words, forbid=tuple(forbid or ()))
    connection = Connection(endpoint, model, _key(key_env), timeout, tries, per_minute, _params(param or ()))
    console = new_console(stderr=True)
    with _progress(console, prices) as show:
        report = run(
            data,
            out,
            connection,
            rules,
            attempts=attempts,
            concurrency=concurrency,
            limit=limit,
            restart=restart,
            progress=show,
            tell=lambda line: console.print(line, highlight=False, markup=False),
        )
    typer.echo(f"{out if out.exists() else 'nothing written'}: {_summary(report, prices)}")
    if report.rejected:
        typer.echo(f"{report.rejected} without a text, see {rejected_path(out)}; the same command tries them again")
        raise typer.Exit(1)


def _key(name: str | None) -> str | None:
    """The API key; an endpoint on one's own machine needs none."""
    key = os.environ.get(name or "OPENAI_API_KEY", "").strip()
    if name is not None and not key:
        raise MirageError(f"--key-env: the environment has no {name}")
    return key or None


def _params(given: Sequence[str]) -> dict[str, Any]:
    """`temperature=0.7` → {"temperature": 0.7}; what is not JSON is text."""
    found: dict[str, Any] = {}
    for pair in given:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise MirageError(f"--param must be NAME=VALUE, such as temperature=0.7, not {pair!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _summary(report: Report, prices: tuple[float, float] | None) -> str:
    """How far it is, in one line."""
    parts = [f"{report.written:,} of {report.lines:,} texts"]
    if report.rejected:
        parts.append(f"{report.rejected:,} rejected")
    parts.append(_replies(report.replies))
    parts.append(f"{report.prompt_tokens:,} + {report.completion_tokens:,} tokens")
    if prices is not None:
        parts.append(f"cost {report.cost(*prices):.2f}")
    if report.untold:
        parts.append(f"{_replies(report.untold)} without usage, not counted")
    return ", ".join(parts)


def _replies(n: int) -> str:
    return f"{n:,} {'reply' if n == 1 else 'replies'}"


@contextmanager
def _progress(console: Console, prices: tuple[float, float] | None) -> Iterator[Callable[[Report], None]]:
    """A bar on a terminal; elsewhere a line at the start and for each twentieth of the work."""
    with progress_bar(console) as bar:
        work = bar.add_task("writing", total=None)
        shown = -1

        def show(report: Report) -> None:
            nonlocal shown
            done = report.written + report.rejected
            bar.update(work, total=report.lines, completed=done, description=_summary(report, prices))
            part = 20 * done // report.lines
            if not console.is_terminal and part != shown:
                shown = part
                console.print(_summary(report, prices), highlight=False, markup=False)

        yield show

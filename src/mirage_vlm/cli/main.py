"""The `mirage` command: registers the sub-commands and turns errors into one line.

Modules of `mirage_vlm.cli` import heavy things (torch, transformers, datasets) inside their functions only,
so that `mirage --help` answers at once. A new command is one line here: `app.command()(module.function)`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mirage_vlm import __version__
from mirage_vlm.cli import analyse, bench, compare, data, evaluate, shelf, solve, study, train, write_reasoning
from mirage_vlm.errors import MirageError

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # by which a user says how to wait

app = typer.Typer(
    name="mirage",
    help="Vision-language models that think in latent visual tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(solve.demo)
app.command()(solve.solve)
app.command("eval")(evaluate.evaluate)
app.command()(compare.compare)
app.command()(analyse.analyse)
app.command("list")(shelf.list_all)
app.command()(shelf.info)
app.command()(train.train)
app.command()(bench.bench)
app.command()(study.study)
app.command()(write_reasoning.write_reasoning)
app.add_typer(data.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mirage {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, here and in all processes that are started from here.

    By default they spin, and where another process has the core of one of them, all others spin until it is their
    turn again: decoding then takes many times as long. OpenMP reads this once, when torch is loaded.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def run(arguments: Sequence[str] | None = None) -> None:
    """The entry point: run a command line, by default the process's own, and exit.

    Bad input prints one line, `error: …`, and exits with status 2. Typer sees to the rest: wrong usage exits
    with 2, Ctrl-C with 130.
    """
    wait_passively()
    try:
        app(args=arguments)
    except MirageError as fault:
        print("error:", " ".join(str(fault).split("\n")), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()

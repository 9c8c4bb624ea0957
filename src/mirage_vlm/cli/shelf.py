"""`mirage list` and `mirage info`: what there is, and what a checkpoint is. Neither waits for torch."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mirage_vlm.cli.options import new_console, new_table, show_table
from mirage_vlm.errors import MirageError

PACKAGE = Path(__file__).parents[1]
# what recipes choose from, by the file and the name of the table that holds it
PARTS = {
    "feedbacks": ("modeling/feedback.py", ("FEEDBACKS",)),
    "poolings": ("modeling/pooling.py", ("POOLINGS", "LEARNT")),
    "alignments": ("training/align.py", ("ALIGNMENTS",)),
    "rewards": ("rl/rewards.py", ("REWARDS",)),
    "replacements": ("evaluation/replace.py", ("REPLACEMENTS",)),
}
KINDS = ("tasks", "models", "recipes", "benchmarks", *PARTS)


def list_all(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[WHAT]...", help=f"Only {', '.join(KINDS)}; by default all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Name what there is: tasks, bundled models, recipes, benchmarks, and what recipes choose from."""
    for kind in what or ():
        if kind not in KINDS:
            raise MirageError(f"there is no list of {kind!r}; choose from {', '.join(KINDS)}")
    found = {kind: _rows(kind) for kind in KINDS if not what or kind in what}
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    console = new_console()
    for kind, rows in found.items():
        table = new_table(kind)
        headings = list(rows[0]) if rows else ["name"]
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(", ".join(v) if isinstance(v, list) else str(v) for v in row.values()))
        if not rows:
            table.add_row("none here; those of the repository are in its folder recipes/")
        show_table(table, console)


def _rows(kind: str) -> list[dict[str, Any]]:
    if kind in PARTS:
        file, tables = PARTS[kind]
        return [row for table in tables for row in named_in(PACKAGE / file, table)]
    return {"tasks": _tasks, "models": _models, "recipes": _recipes, "benchmarks": _benchmarks}[kind]()


def _tasks() -> list[dict[str, Any]]:
    from mirage_vlm.tasks import get_task, task_names

    found = []
    for task in map(get_task, task_names()):
        levels = f"{task.sizes[0]}–{task.sizes[-1]}" if len(task.sizes) > 1 else str(task.sizes[0])
        found.append({"name": task.name, "levels": levels, "styles": list(task.styles)})
    return found


def _models() -> list[dict[str, Any]]:
    from mirage_vlm.modeling.bundled import ABOUT, FOLDERS
    from mirage_vlm.modeling.describe import describe

    found = []
    for name in FOLDERS:
        card = describe(name)
        k = card["latent"] and card["latent"]["latent_size"]
        found.append(
            {
                "name": name,
                "family": card["family"],
                "parameters": f"{card['parameters']:,}",
                "latents": k or 0,
                "about": ABOUT[name],
            }
        )
    return found


def _recipes() -> list[dict[str, Any]]:
    """Recipes and studies below ./recipes, or of the repository that the package lies in."""
    folders = [Path("recipes"), PACKAGE.parents[1] / "recipes"]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    found = []
    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        if folder is not None and "accelerate" in path.relative_to(folder).parts:
            continue  # settings of a launcher
        head = re.match(r"(?:# ?[^\n]+\n)+", path.read_text(encoding="utf-8"))  # the first paragraph of comments
        words = " ".join(line.lstrip("# ") for line in head[0].splitlines()) if head else ""
        found.append({"name": str(path), "about": re.split(r"[.:;](?:\s|$)", words)[0]})
    return found


def _benchmarks() -> list[dict[str, Any]]:
    from mirage_vlm.sources import preset_names

    return [{"name": name, "read by": f"mirage data import --as {name}"} for name in preset_names()]


def named_in(file: Path, table: str) -> list[dict[str, Any]]:
    """The keys of a dictionary in a source file, each with the first line of what its value is described by.

    Read, not imported: the modules of these tables need torch, which takes seconds.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    told = {
        node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    (found,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and _name(node.target) == table)
    if not isinstance(found, ast.Dict):
        raise TypeError(f"{table} in {file} is not a dictionary")
    rows = []
    for key, value in zip(found.keys, found.values, strict=True):
        assert isinstance(key, ast.Constant)
        if isinstance(value, ast.Call) and value.args and isinstance(value.args[0], ast.Constant):
            about = str(value.args[0].value)
        else:
            about = (told.get(_name(value)) or "").split("\n")[0]
        rows.append({"name": key.value, "about": about.rstrip(".")})
    return rows


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def info(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a bundled model, or a hub name in the local cache.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a checkpoint is, from its files alone: sizes, latent settings, limits of pictures."""
    from mirage_vlm.modeling.describe import describe

    card = describe(checkpoint)
    if as_json:
        typer.echo(json.dumps(card, indent=2, ensure_ascii=False))
        return
    console = new_console()
    for name, value in _lines(card):
        console.print(f"{name:12}{value}", markup=False, soft_wrap=True)


def _lines(card: dict[str, Any]) -> Sequence[tuple[str, str]]:
    parameters = "not known (no .safetensors file)" if card["parameters"] is None else f"{card['parameters']:,}"
    latent = card["latent"]
    dtype = card["dtype"] or "dtype not named"
    dtype += f" (stored as {card['stored']})" if card["stored"] not in (None, card["dtype"]) else ""
    lines = [
        ("model", card["model"]),
        ("path", card["path"]),
        ("family", f"{card['family']} ({card['architecture'] or 'no architecture named'})"),
        ("parameters", f"{parameters}, {dtype}"),
        ("context", f"{card['context']} tokens"),
        ("text", _pairs(card["text"])),
        ("vision", _pairs(card["vision"])),
        ("pictures", _pairs(card["pictures"])),
    ]
    if latent is None:
        lines.append(("latents", "none: a base; `mirage train` or LatentVLM.from_base gives it latent tokens"))
    else:
        lines.append(("latents", _pairs(latent)))
    return [
        *lines,
        *(
            ("file" if i == 0 else "", f"{name}  {size:,} bytes")
            for i, (name, size) in enumerate(card["files"].items())
        ),
    ]


def _pairs(values: dict[str, Any]) -> str:
    """`layers 6, width 128`, with a dash for what is not known."""
    return ", ".join(f"{name.replace('_', ' ')} {'–' if value is None else value}" for name, value in values.items())

"""The folders of MentisOculi (Jana-Z/mentis-oculi): the two tasks of five whose answers need no simulator.

Each puzzle is `output/level_XX/puzzle_XXXX/` with `metadata.json`, one combined picture, and the steps of its solution.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.sources.examples import make, with_right_gold
from mirage_vlm.sources.mapping import IN_BOX
from mirage_vlm.trajectory import Image, Trajectory

FOLDED = (
    "The upper row shows a square paper that is folded, step by step, and then punched through all its layers. The "
    "lower row shows five unfolded papers, A to E. Which of them is it, unfolded? "
) + IN_BOX
BOARD = (
    "The picture shows a shape in black outline and five pieces, A to E. Which of the pieces make up the shape, "
    "without gaps and overlaps, and without being turned? Answer with their letters, such as A C E, in \\boxed{}."
)
TASKS = ("paper-fold", "form-board")


def load(source: str | Path, task: str) -> Iterator[Trajectory]:
    """The examples of a task.

    Args:
        source: the repository, its `datasets`, or the folder of the task itself.
        task: one of `TASKS`.

    Raises:
        MirageError: the folder is not there, or a file of it is missing or malformed.
    """
    return (_example(puzzle, task) for puzzle in _puzzles(_find(Path(source), task)))


def _find(source: Path, task: str) -> Path:
    own = [source] if source.resolve().name == task else []  # the folder of the other task is like this one's
    for folder in (source / "datasets" / task, source / task, *own):
        if (folder / "output").is_dir():
            return folder / "output"
    raise MirageError(f"{source}: has no {task}/output; name a copy of Jana-Z/mentis-oculi")


def _puzzles(folder: Path) -> list[Path]:
    found = sorted(path.parent for path in folder.glob("level_*/puzzle_*/metadata.json"))
    if not found:
        raise MirageError(f"{folder}: has no level_*/puzzle_*/metadata.json")
    return found


def _example(puzzle: Path, task: str) -> Trajectory:
    path = puzzle / "metadata.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise MirageError(f"{path}: cannot be read: {fault}") from fault
    level = puzzle.parent.name.removeprefix("level_")
    if not level.isdecimal():
        raise MirageError(f"{puzzle.parent}: must end in the number of the level, not {level!r}")
    meta: dict[str, Any] = {"id": f"{task}/{puzzle.parent.name}/{puzzle.name}", "level": int(level)}
    pictures = [_picture(puzzle, _field(known, "combined_image", str, path))]
    steps = [_picture(puzzle, name) for name in _field(known, "cot_images", list, path)]
    if task == "paper-fold":
        letters, letter = _field(known, "choices", list, path), _field(known, "correct_choice", str, path)
        if letter not in letters:
            raise MirageError(f"{path}: correct_choice: {letter!r} is none of {letters}")
        return make(pictures, FOLDED, steps, letter, meta | {"choices": dict.fromkeys(letters, ""), "letter": letter})
    answer = _field(known, "solution_pieces", list, path)
    return with_right_gold(make(pictures, BOARD, steps, " ".join(answer), meta | {"answer": answer}), str(path))


def _field(known: Any, name: str, kind: type, path: Path) -> Any:
    if not isinstance(known, dict) or name not in known:
        there = f"; there are: {', '.join(known)}" if isinstance(known, dict) else ""
        raise MirageError(f"{path}: has no {name!r}{there}")
    value: Any = known[name]
    parts = value if kind is list else [value]
    if not isinstance(value, kind) or not value or not all(isinstance(part, str) for part in parts):
        raise MirageError(f"{path}: {name}: must be a {'list of strings' if kind is list else 'string'}, not {value!r}")
    return value


def _picture(puzzle: Path, name: str) -> Image:
    """A picture of a puzzle; some of the metadata put the puzzle's number before the name (`1_cot_00.png`)."""
    last = Path(name).name
    for path in (puzzle / last, puzzle / re.sub(r"^\d+_", "", last)):
        if path.is_file():
            return Image(path)
    raise MirageError(f"{puzzle / last}: no such file")

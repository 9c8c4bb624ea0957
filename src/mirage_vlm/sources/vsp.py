"""The folders of the VSP repository (UCSB-NLP-Chang/Visual-Spatial-Planning): its maze and blocks tasks.

Each has `maps/<level>/`: pictures under a number, and beside them the texts and answers of the same number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.sources.blocks import BLOCKS, COLOURS, parse_plan, worded
from mirage_vlm.sources.examples import make
from mirage_vlm.sources.mapping import IN_BOX
from mirage_vlm.tasks.frozenlake import Maze
from mirage_vlm.tasks.vsp import PLANNING, parse_moves
from mirage_vlm.trajectory import Image, Text, Trajectory, assistant_turn

YES_NO = {"A": "Yes", "B": "No"}
TILES = {"@": "S", "*": "G", "#": "H", "_": "F"}  # of the repository's tables → ours
SIDES = "Where is the elf, seen from the gift? Say all that hold of above, below, left and right. Answer in \\boxed{}."
SAME_MAZE = (
    "Which of these is the maze of the picture? The elf is written @, the gift *, a hole # and a safe cell _.\n"
    "{choices}\n" + IN_BOX
)
SAFE = "The elf moves {plan}. Moves off the board do nothing. Does it stay out of the holes?"
COLOUR = (
    "Stacks are counted from the left, levels from the bottom. "
    f"Answer with one of {', '.join(COLOURS.values())} in \\boxed{{}}."
)
SAME_STACKS = "Which of these are the stacks of the picture, in whatever order?\n{choices}\n" + IN_BOX
POSSIBLE = (
    "A move takes the top block of a stack and puts it on top of another stack or on the table. Can all of these moves "
    "be made, one after the other?\n{plan}"
)

_LETTERED = re.compile(r"^\(([A-Z])\)[ \t]*\n?(.*?)(?=^\([A-Z]\)|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Place:
    """One number of one level.

    Attributes:
        folder: of the level.
        picture: the first picture.
        number: as the files have it.
        level: as the folder has it.
    """

    folder: Path
    picture: Path
    number: int
    level: int

    def read(self, name: str) -> str:
        """The text of a file beside the picture, or of the level where the name has a suffix.

        Raises:
            MirageError: it cannot be read.
        """
        path = self.folder / name if name.endswith(".txt") else self.folder / name / f"{self.number}.txt"
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise MirageError(f"{path}: cannot be read: {fault}") from fault

    def line(self, name: str) -> str:
        """The line of a level's file that has this number.

        Raises:
            MirageError: it has fewer.
        """
        lines = self.read(name).splitlines()
        if self.number >= len(lines):
            raise MirageError(f"{self.folder / name}: has {len(lines)} lines, none for number {self.number}")
        return lines[self.number]

    @property
    def meta(self) -> dict[str, Any]:
        """What every example keeps."""
        return {"id": f"{self.folder.name}/{self.number}", "level": self.level}

    def fail(self, name: str, problem: str) -> MirageError:
        """An error about one of the texts."""
        return MirageError(f"{self.folder / name} ({self.number}): {problem}")


def load(source: str | Path, task: str) -> Iterator[Trajectory]:
    """The examples of a task.

    Args:
        source: the repository, its `VSP-main`, or the folder of the task itself.
        task: such as `maze/task-main` or `blocks/task2`.

    Raises:
        MirageError: the folder is not there, or a file of it is missing or malformed.
    """
    folder = _find(Path(source), task)
    scenario, _, name = task.partition("/")
    pictures, build = TASKS[scenario, name]
    return (build(place) for place in _places(folder, pictures))


def _find(source: Path, task: str) -> Path:
    # the folder of another task is like this one's, so it must have the name
    own = [source] if source.resolve().name == task.rpartition("/")[2] else []
    for folder in (source / "VSP-main" / task, source / task, *own):
        if (folder / "maps").is_dir():
            return folder
    raise MirageError(f"{source}: has no {task}/maps; name a copy of UCSB-NLP-Chang/Visual-Spatial-Planning")


def _places(folder: Path, pictures: str) -> Iterator[Place]:
    found = False
    levels = [path for path in (folder / "maps").iterdir() if re.fullmatch(r"level(_step)?\d+", path.name)]
    for level in sorted(levels, key=lambda path: _number(path.name)):
        files = [path for path in (level / pictures).glob("*.*") if path.stem.isdigit()]
        for picture in sorted(files, key=lambda path: int(path.stem)):
            found = True
            yield Place(level, picture, int(picture.stem), _number(level.name))
    if not found:
        raise MirageError(f"{folder / 'maps'}: has no pictures at level*/{pictures}/*")


def _number(name: str) -> int:
    return int(re.findall(r"\d+", name)[-1])


def _maze(place: Place) -> Maze:
    rows = [line.split("|")[2:-1] for line in place.read("table").splitlines() if line.startswith("| Row")]
    try:
        return Maze.from_rows(["".join(TILES[tile.strip()] for tile in row) for row in rows])
    except KeyError as fault:
        raise place.fail("table", f"{fault.args[0]!r} is no tile; there are {', '.join(TILES)}") from fault
    except MirageError as fault:
        raise place.fail("table", str(fault)) from fault


def _yes_no(place: Place, question: str, yes: bool) -> Trajectory:
    letter = "A" if yes else "B"
    text = "\n".join([question, *(f"({name}) {words}" for name, words in YES_NO.items()), IN_BOX])
    return make([Image(place.picture)], text, [], letter, place.meta | {"choices": dict(YES_NO), "letter": letter})


def _answer(place: Place) -> bool:
    answer = place.read("answer").strip()
    if answer not in ("Y", "N"):
        raise place.fail("answer", f"must be Y or N, not {answer[:40]!r}")
    return answer == "Y"


def _lettered(place: Place, name: str, template: str, index: str) -> Trajectory:
    """A question whose choices are in its text, a line or more each."""
    question = place.read(name)
    choices = {match[1]: match[2].strip() for match in _LETTERED.finditer(question)}
    if not index.strip().isdigit() or int(index) >= len(choices):
        raise place.fail(name, f"the answer is {index.strip()!r}, but it has {len(choices)} choices")
    letter = list(choices)[int(index)]
    text = template.replace("{choices}", question.strip())
    return make([Image(place.picture)], text, [], letter, place.meta | {"choices": choices, "letter": letter})


def _plan(place: Place) -> Trajectory:
    maze = _maze(place)
    try:
        # for the helper image; the question's is the benchmark's own
        drawn = PLANNING.example(maze, "direct", **place.meta)
    except MirageError as fault:
        raise place.fail("table", str(fault)) from fault
    prompt = PLANNING.prompt(Image(place.picture), "direct")
    return replace(drawn, messages=(*prompt, drawn.messages[-1]), meta=drawn.meta | place.meta)


def _hole(place: Place) -> Trajectory:
    return _yes_no(place, place.read("question").strip(), _answer(place))


def _sides(place: Place) -> Trajectory:
    maze = _maze(place)
    (row, column), (goal_row, goal_column) = maze.start, maze.goal
    found = {
        "above": row < goal_row,
        "below": row > goal_row,
        "left": column < goal_column,
        "right": column > goal_column,
    }
    answer = [side for side, holds in found.items() if holds]
    return make([Image(place.picture)], SIDES, [], ", ".join(answer), place.meta | {"answer": answer})


def _same_maze(place: Place) -> Trajectory:
    return _lettered(place, "question", SAME_MAZE, (place.read("answer").splitlines() or [""])[-1])


def _safe(place: Place) -> Trajectory:
    plan = parse_moves(place.read("question"))
    if plan is None:
        raise place.fail("question", "is not a plan of the moves L, R, U, D")
    return _yes_no(place, SAFE.format(plan=",".join(plan)), _answer(place))


def _stacking(place: Place) -> Trajectory:
    cells = place.line("info.txt").split("\t")
    if len(cells) < 6:
        raise place.fail("info.txt", f"must have 6 columns, with tabs between, not {len(cells)}")
    start, end = (_stacks(place, cells[i]) for i in (0, 2))
    plan = parse_plan(re.sub(r",\d+\)", ")", cells[5]))  # each move has its number as a third value
    if plan is None:
        raise place.fail("info.txt", f"{cells[5][:40]!r} is not a plan")
    other = place.folder / "output_img" / place.picture.name
    if not other.is_file():
        raise MirageError(f"{other}: no such file")
    answer = worded(plan)
    return Trajectory(
        messages=(
            *BLOCKS.prompt(Image(place.picture), end=Image(other)),
            assistant_turn(Text(rf"\boxed{{{answer}}}")),
        ),
        task=BLOCKS.name,
        answer=answer,
        meta=place.meta | {"start": start, "end": end},
    )


def _stacks(place: Place, text: str) -> list[list[str]]:
    """`B00000-OR0000` → [["B"], ["O", "R"]]."""
    found = [list(stack.replace("0", "")) for stack in text.split("-")]
    if strange := {block for stack in found for block in stack} - set(COLOURS):
        raise place.fail("info.txt", f"{min(strange)!r} in {text!r} is no block; there are {', '.join(COLOURS)}")
    return [stack for stack in found if stack]


def _colour(place: Place) -> Trajectory:
    answer, question = place.line("annotation.txt").strip(), place.read("text_input").strip()
    if answer not in COLOURS.values():
        raise place.fail("annotation.txt", f"{answer!r} is none of {', '.join(COLOURS.values())}")
    return make([Image(place.picture)], f"{question} {COLOUR}", [], answer, place.meta | {"answer": answer})


def _relation(place: Place) -> Trajectory:
    return _lettered(place, "text_input", "{choices}\n" + IN_BOX, place.line("annotation.txt"))


def _same_stacks(place: Place) -> Trajectory:
    return _lettered(place, "text_input", SAME_STACKS, place.line("annotation.txt"))


def _possible(place: Place) -> Trajectory:
    yes = str(place.number) in place.read("annotation.txt").split()  # which lists the numbers of those that can be made
    return _yes_no(place, POSSIBLE.format(plan=place.read("text_input").strip()), yes)


TASKS: dict[tuple[str, str], tuple[str, Callable[[Place], Trajectory]]] = {
    ("maze", "task-main"): ("img", _plan),
    ("maze", "task1"): ("img", _hole),
    ("maze", "task2"): ("img", _sides),
    ("maze", "task3"): ("img", _same_maze),
    ("maze", "task4"): ("img", _safe),
    ("blocks", "task-main"): ("input_img", _stacking),
    ("blocks", "task1"): ("image_input", _colour),
    ("blocks", "task2"): ("image_input", _relation),
    ("blocks", "task3"): ("image_input", _same_stacks),
    ("blocks", "task4"): ("image_input", _possible),
}

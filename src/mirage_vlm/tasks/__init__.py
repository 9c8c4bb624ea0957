"""Tasks: each makes examples, words prompts and scores answers. `get_task("vsp-planning")` is the way in."""

from collections.abc import Iterator
from dataclasses import replace

from mirage_vlm.dotted import load_named
from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import Fault
from mirage_vlm.tasks.base import Score, Task, boxed
from mirage_vlm.tasks.choices import CHOICE
from mirage_vlm.tasks.geometry import GEOMETRY
from mirage_vlm.tasks.jigsaw import FOLDER_JIGSAW, JIGSAW, PHOTO_JIGSAW
from mirage_vlm.tasks.perception import PERCEPTION
from mirage_vlm.tasks.sat import SAT
from mirage_vlm.tasks.seen import SEEN
from mirage_vlm.tasks.vsp import PLANNING, REASONING, from_record
from mirage_vlm.trajectory import Trajectory

__all__ = ["Score", "Task", "faults", "from_record", "get_task", "score", "task_names", "with_task"]

_ALL: tuple[Task, ...] = (
    PLANNING,
    REASONING,
    PERCEPTION,
    GEOMETRY,
    JIGSAW,
    PHOTO_JIGSAW,
    FOLDER_JIGSAW,
    SAT,
    *SEEN,
    CHOICE,
)
_UNKNOWN = "an example has neither a task nor an answer, so it cannot be scored"
_TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def task_names() -> tuple[str, ...]:
    """The names that `get_task` knows."""
    return tuple(_TASKS)


def get_task(name: str) -> Task:
    """The task of that name, or a user's own as `module:NAME`.

    Raises:
        MirageError: there is none; the message lists those there are.
    """
    if ":" in name:
        return _users_own(name)
    if name not in _TASKS:
        raise MirageError(f"there is no task {name!r}; choose from {', '.join(_TASKS)}")
    return _TASKS[name]


def _users_own(name: str) -> Task:
    found = load_named(name, "task")
    if not isinstance(found, Task) or found.name != name:
        raise MirageError(f"{name!r} must be a task, an instance of mirage_vlm.tasks.Task whose name is {name!r}")
    return found


def score(trajectory: Trajectory) -> Score:
    r"""The task's checker, or without a task the answer compared with the last `\boxed{}` (else the whole text).

    Without a task any text counts as a valid answer.

    Raises:
        MirageError: the task is unknown, or there is neither task nor answer.
    """
    if trajectory.task is not None:
        return get_task(trajectory.task).score(trajectory)
    if trajectory.answer is None:
        raise MirageError(_UNKNOWN)
    found = boxed(trajectory.text)
    given = trajectory.text.strip() if found is None else found.strip()
    correct = given in {answer.strip() for answer in trajectory.answers}
    known = " or ".join(map(repr, trajectory.answers))
    return Score(correct, bool(given), None, f"{given!r} {'is' if correct else 'is not'} {known}")


def faults(trajectory: Trajectory, *, scored: bool = True) -> Iterator[Fault]:
    """What `score` would refuse of an example, whatever is answered.

    Args:
        scored: it is to be scored; otherwise it may have neither a task nor an answer.
    """
    if trajectory.task is None:
        if scored and trajectory.answer is None:
            yield Fault("", _UNKNOWN)
        return
    try:
        task = get_task(trajectory.task)
    except MirageError as fault:
        yield Fault("task", str(fault))
        return
    yield from task.faults(trajectory)


def with_task(trajectory: Trajectory, name: str | None) -> Trajectory:
    r"""The example with that task, where it has none of its own.

    Where it then has no reference answer, but a response with one in `\boxed{}` or `<answer>`, that is the answer:
    files of conversations know no other.
    """
    if name is None or trajectory.task is not None:
        return trajectory
    answer = trajectory.answer if trajectory.answer is not None else boxed(trajectory.text)
    return replace(trajectory, task=name, answer=answer)

"""Tasks: each makes examples, words prompts and scores answers. `get_task("vsp-planning")` is the way in."""

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.base import Score, Task
from mirage_vlm.tasks.perception import PERCEPTION
from mirage_vlm.tasks.vsp import PLANNING, REASONING, from_record

__all__ = ["Score", "Task", "from_record", "get_task", "task_names"]

_TASKS: dict[str, Task] = {task.name: task for task in (PLANNING, REASONING, PERCEPTION)}


def task_names() -> tuple[str, ...]:
    """The names that `get_task` knows."""
    return tuple(_TASKS)


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        MirageError: there is none; the message lists those there are.
    """
    if name not in _TASKS:
        raise MirageError(f"there is no task {name!r}; choose from {', '.join(_TASKS)}")
    return _TASKS[name]

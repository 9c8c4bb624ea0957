"""Tasks: each makes examples, words prompts and scores answers. `get_task("vsp-planning")` is the way in."""

import importlib

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.base import Score, Task
from mirage_vlm.tasks.geometry import GEOMETRY
from mirage_vlm.tasks.perception import PERCEPTION
from mirage_vlm.tasks.vsp import PLANNING, REASONING, from_record

__all__ = ["Score", "Task", "from_record", "get_task", "task_names"]

_TASKS: dict[str, Task] = {task.name: task for task in (PLANNING, REASONING, PERCEPTION, GEOMETRY)}


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
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as fault:
        raise MirageError(f"the task {name!r} cannot be had: {fault}") from fault
    if not isinstance(found, Task) or found.name != name:
        raise MirageError(f"{name!r} must be a task, an instance of mirage_vlm.tasks.Task whose name is {name!r}")
    return found

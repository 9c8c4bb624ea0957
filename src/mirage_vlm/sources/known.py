"""Benchmarks by name: a mapping of this package, or a reader of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mirage_vlm.errors import MirageError
from mirage_vlm.sources import examples, mentis, vsp
from mirage_vlm.sources.mapping import read_mapping
from mirage_vlm.trajectory import Trajectory

FOLDER = Path(__file__).parent / "presets"

_READERS: dict[str, Callable[[str | Path], Iterator[Trajectory]]] = {
    **{
        f"vsp-{scenario}-{task.removeprefix('task').strip('-')}": partial(vsp.load, task=f"{scenario}/{task}")
        for scenario, task in vsp.TASKS
    },
    **{f"mentisoculi-{task}": partial(mentis.load, task=task) for task in mentis.TASKS},
}


def preset_names() -> tuple[str, ...]:
    """The names that `load_preset` knows."""
    return tuple(sorted([*(path.stem for path in FOLDER.glob("*.yaml")), *_READERS]))


def load_preset(
    name: str, source: str | Path | None = None, split: str | None = None, config: str | None = None
) -> Iterator[Trajectory]:
    """The examples of a benchmark, one after the other.

    Args:
        name: one of `preset_names`.
        source: where it lies: a file, a folder, or the name of a dataset of the Hugging Face hub; None for its own.
        split: in place of the usual one.
        config: the subset.

    Raises:
        MirageError: there is no such benchmark, or as `load`.
    """
    if name in _READERS:
        if source is None:
            raise MirageError(f"{name}: name the folder where its repository lies")
        if split is not None or config is not None:
            raise MirageError(f"{name}: has no splits and no subsets")
        return _READERS[name](source)
    if name not in preset_names():
        raise MirageError(f"there is no preset {name!r}; choose from {', '.join(preset_names())}")
    return examples.load(read_mapping(FOLDER / f"{name}.yaml", split, config), source)

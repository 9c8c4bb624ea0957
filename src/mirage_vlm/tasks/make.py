"""Data sets of made examples: an endless supply indexed by number, and the same written to a folder."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import to_record
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.base import Split
from mirage_vlm.trajectory import Image, Trajectory

DRAWN_AS = "plain"  # the style whose maps are those of all styles that are to be compared


class GeneratedDataset(Sequence[Trajectory]):
    """`n` made examples; number i depends on nothing but the arguments and i, and is made when asked for.

    Args:
        task: a task's name.
        levels: of the task's `sizes` (side lengths of maps), taken in turn, None = those that
            are usual: example i has `levels[i % len(levels)]`.
        n: number of examples.
        seed: another seed gives other examples; train and test stay disjoint by the task's `key` across all seeds.
        style: one of the task's styles, or `mixed` (those of its `mixture`, by chance).
        split: `train` or `test`.
        cell: pixels per side of a cell.
        drawn_as: the style whose draws of maps are taken, so that styles can be compared on the same ones. By default
            `direct`, `cot` and `mixed` have their own, and all others those of `plain`.

    Raises:
        MirageError: an argument is out of range.
    """

    def __init__(
        self,
        task: str,
        levels: Sequence[int] | None,
        n: int,
        seed: int = 0,
        style: str = "direct",
        split: Split = "train",
        cell: int = 64,
        drawn_as: str | None = None,
    ) -> None:
        self.task = get_task(task)
        if style != "mixed":
            self.task.check_style(style)
        sizes, levels = self.task.sizes, self.task.usual if levels is None else levels
        if not levels or not all(level in sizes for level in levels):
            raise MirageError(f"levels of {task} are from {sizes[0]} to {sizes[-1]}, not {list(levels)}")
        if n < 0:
            raise MirageError(f"the number of examples cannot be {n}")
        if split not in ("train", "test"):
            raise MirageError(f"there is no split {split!r}; choose train or test")
        if not 8 <= cell <= 256:
            raise MirageError(f"a cell must have from 8 to 256 pixels a side, not {cell}")
        self.levels, self.n, self.seed = tuple(levels), n, seed
        self.style, self.split, self.cell = style, split, cell
        self.drawn_as = drawn_as or (style if style in ("direct", "cot", "mixed") else DRAWN_AS)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Trajectory:  # type: ignore[override]  # no slices
        if not -self.n <= i < self.n:
            raise IndexError(i)
        i %= self.n
        level = self.levels[i % len(self.levels)]
        rng = random.Random(f"{self.task.name}/{level}/{self.drawn_as}/{self.split}/{self.seed}/{i}")
        style = rng.choice(self.task.mixture) if self.style == "mixed" else self.style
        return self.task.make_in(self.split, rng, level, style, self.cell)


def write_dataset(
    task: str,
    levels: Sequence[int] | None,
    n: int,
    out: str | Path,
    *,
    seed: int = 0,
    style: str = "direct",
    n_test: int | None = None,
    cell: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `train.jsonl`, `test.jsonl` and `images/*.png` to the folder `out`.

    The same arguments give the same bytes. All is written beside `out` first and moved there at the end, so
    `out` is complete or absent.

    Args:
        task, levels, seed, style, cell: as for `GeneratedDataset`.
        n: number of training examples.
        n_test: number of test examples, by default n / 10 and at least 100; with 0 there is no `test.jsonl`.
        progress: called with (examples written, examples in all) after each.

    Raises:
        MirageError: an argument is out of range, `out` is not empty or cannot be written.
    """
    n_test = max(100, n // 10) if n_test is None else n_test
    splits = {"train": GeneratedDataset(task, levels, n, seed, style, "train", cell)}
    if n_test:
        splits["test"] = GeneratedDataset(task, levels, n_test, seed, style, "test", cell)
    return write_splits(splits, out, progress)


def write_splits(
    splits: Mapping[str, Sequence[Trajectory]], out: str | Path, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write each split to `<name>.jsonl` and all pictures to `images/`, in the folder `out`, which is whole or absent.

    Args:
        progress: called with (examples written, examples in all) after each.

    Raises:
        MirageError: `out` is not empty or cannot be written.
    """
    out = Path(out)
    check_empty(out)
    total = sum(map(len, splits.values()))
    try:
        with _unfinished(out.absolute()) as partial:
            (partial / "images").mkdir(parents=True)
            done = 0
            for name, examples in splits.items():
                for _ in _write_split(name, examples, partial):
                    done += 1
                    if progress:
                        progress(done, total)
            if out.is_dir():
                out.rmdir()
            partial.rename(out)
    except OSError as fault:
        raise MirageError(f"cannot write {out}: {fault.strerror or fault}") from fault
    return out


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """The folder beside `out` to write to, for this process alone: what one that was killed left there is removed.

    Raises:
        MirageError: another process is writing it.
    """
    partial, lock = out.with_name(f".{out.name}.partial"), FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise MirageError(f"{out}: another process is writing it right now; wait, or name another folder") from None
    try:
        if partial.exists():
            shutil.rmtree(partial)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_empty(out: Path) -> None:
    """Whether a folder can be written anew.

    Raises:
        MirageError: there is a file, or something in it.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise MirageError(f"{out} is not an empty folder; name another one or remove it first")


def _write_split(split: str, examples: Sequence[Trajectory], folder: Path) -> Iterator[None]:
    """Write one JSONL file and its pictures; yields after each example."""
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
        for i, trajectory in enumerate(examples):
            names = (f"images/{split}-{i:06d}-{number}.png" for number in range(1_000))

            def save(image: Image, names: Iterator[str] = names) -> str:
                name = next(names)
                image.load().save(folder / name, format="PNG", optimize=False, compress_level=6)
                return name

            record = to_record(trajectory, image_source=save)
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            yield

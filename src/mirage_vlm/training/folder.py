"""A run's folder: one training at a time, the checkpoint that it goes on from, and writes that tell of a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from mirage_vlm.differences import differing, in_short, told
from mirage_vlm.errors import MirageError
from mirage_vlm.formats import atomic_writer
from mirage_vlm.training.recipe import Recipe, load_recipe

METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.json"
TRAINABLE_FILE = "trainable.safetensors"
FINAL = "final"
LOCK_FILE, OWNER_FILE = ".lock", ".running"
STATE_FILE = "trainer_state.json"  # the last that is written of a checkpoint

WORKERS_LEAVE = 15.0
"""Seconds in which the processes that prepare batches notice that the one they work for was killed; until then they
hold its lock."""

FAILED_WRITES = ("os error", "I/O error", "PytorchStreamWriter", "inline_container", "iostream error", "write failed")
"""What Rust's and torch's errors of a failed write have in them."""

# what may change from one part of a run to the next: it changes no number, or none but to rounding
FREE = {"output_dir", "model.attn"} | {
    f"train.{name}"
    for name in (
        *("log_every", "save_every", "keep", "report_to", "workers", "keep_examples", "feature_cache"),
        *("gradient_checkpointing", "non_finite"),
    )
}


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Within, no other process trains into the folder. The system takes the lock back from a process that dies.

    A folder that did not exist and into which nothing was written is gone again afterwards.

    Raises:
        MirageError: one does, or the folder cannot be made or written.
    """
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK_FILE)
        _take(lock, output)
    except (OSError, NotImplementedError) as fault:
        raise MirageError(f"{output}: cannot be written: {getattr(fault, 'strerror', None) or fault}") from fault
    owner = output / OWNER_FILE
    try:
        with suppress(OSError):  # it only makes a message better
            owner.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
            if made and os.listdir(output) == [LOCK_FILE]:
                (output / LOCK_FILE).unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()


def _take(lock: FileLock, output: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid, host = _owner(output)
        gone = host == socket.gethostname() and pid is not None and not _lives(pid)
        try:
            lock.acquire(timeout=WORKERS_LEAVE if gone else 0)
        except Timeout:
            by = "" if pid is None else f" (process {pid} on {host})"
            raise MirageError(
                f"{output}: another training is writing there{by}; wait for its end, or choose another output_dir"
            ) from None


def _owner(output: Path) -> tuple[int | None, str]:
    try:
        pid, host = (output / OWNER_FILE).read_text(encoding="utf-8").split()
        return int(pid), host
    except (OSError, ValueError):
        return None, ""


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def writing(what: object, output: Path, full: bool = False) -> Iterator[None]:
    """Within, a disk that is full or cannot be written ends the run in one line.

    Args:
        what: is written, such as `checkpoint-6`.
        output: the run's folder.
        full: only a disk that is full or cannot be written is looked for, since more than writing is done within.

    Raises:
        MirageError: it cannot be written.
    """
    cause: Exception
    try:
        yield
    except OSError as fault:
        if full and fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        reason, cause = fault.strerror or str(fault), fault
    except (SafetensorError, RuntimeError) as fault:  # of Rust and of torch, which have lost the number of the error
        reason = " ".join(str(fault).split())
        if not any(word in reason for word in FAILED_WRITES):
            raise
        reason, cause = reason.partition(" (os error")[0] if "os error" in reason else "is the disk full?", fault
    else:
        return
    last = newest_whole(output)
    kept = f"; {last.name} is whole, and --resume goes on from it" if last is not None else ""
    raise MirageError(f"{output}: cannot write {what}: {reason}{kept}") from cause


def write_recipe(recipe: Recipe) -> None:
    """Say in a run's folder what it is.

    Raises:
        MirageError: it cannot be written.
    """
    with atomic_writer(Path(recipe.output_dir) / RECIPE_FILE) as file:
        file.write((json.dumps(recipe.to_dict(), indent=2) + "\n").encode())


def checkpoints_of(output: Path) -> list[Path]:
    """The folders of checkpoints, oldest first, whole or not."""
    numbered = [(path.name.partition("-")[2], path) for path in output.glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted((int(step), path) for step, path in numbered if step.isdecimal())]


def newest_whole(output: Path) -> Path | None:
    """The newest checkpoint that lacks nothing."""
    return next((path for path in reversed(checkpoints_of(output)) if lacking(path) is None), None)


def newest_checkpoint(recipe: Recipe, resume: bool, force: bool = False) -> str | None:
    """The checkpoint that a run goes on from: the newest that is whole, and of this recipe.

    Raises:
        MirageError: there are checkpoints and the run is not to go on; none is whole; or the newest is of a recipe that
            would not have made what it did, and it is not to be forced.
    """
    output = Path(recipe.output_dir)
    found = checkpoints_of(output) if output.is_dir() else []
    if not found:
        return None
    if not resume:
        raise MirageError(f"{output}: holds checkpoints of an earlier run; add --resume, or choose another output_dir")
    last = newest_whole(output)
    if last is None:
        raise MirageError(f"{found[-1]}: is not whole ({lacking(found[-1])}); remove it to start afresh")
    _check_same(last, recipe, force)
    return str(last)


def lacking(checkpoint: Path) -> str | None:
    """What a checkpoint lacks that a kill, a full disk or a copy has cut short; None where it is whole."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{STATE_FILE} is missing or cut short"
    for start in ("optimizer", "scheduler"):
        if not any(path.name.startswith(start) and _holds(path) for path in checkpoint.iterdir()):
            return f"the {start}'s state is missing or empty"
    weights = [path for path in checkpoint.glob("*.safetensors")]
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return f"{index.name} is cut short"
        if missing := named - {path.name for path in weights}:
            return f"{min(missing)} is missing"
    elif not {TRAINABLE_FILE, "model.safetensors"} & {path.name for path in weights}:
        return "the weights are missing"
    for path in weights:
        try:
            with safe_open(path, "pt"):  # reads the head of the file, and whether the rest is there
                pass
        except (OSError, SafetensorError):
            return f"{path.name} is cut short"
    return None


def _holds(path: Path) -> bool:
    return path.is_dir() or path.stat().st_size > 0


def _check_same(checkpoint: Path, recipe: Recipe, force: bool) -> None:
    """Whether a recipe may go on from what another part of the run has made.

    Raises:
        MirageError: it may not.
    """
    try:
        before = load_recipe(checkpoint / RECIPE_FILE)
    except MirageError as fault:
        if force:
            return
        raise MirageError(f"{fault}; add --force to go on without comparing recipes") from fault
    if (before.model.lora is None) != (recipe.model.lora is None):
        has, wants = ("LoRA", "none") if recipe.model.lora is None else ("no LoRA", "it")
        raise MirageError(
            f"{checkpoint}: was trained with {has} and the recipe has {wants} (model.lora), so it cannot go on from "
            "it; take the recipe back, or choose another output_dir"
        )
    changed = changes(before, recipe)
    if changed and not force:
        raise MirageError(
            f"{checkpoint}: the recipe has changed ({in_short(changed)}); take that back, choose another output_dir, "
            "or add --force to go on by the new one all the same"
        )
    if changed:
        step = checkpoint.name.rpartition("-")[2]
        with suppress(OSError):
            shutil.copy(checkpoint / RECIPE_FILE, Path(recipe.output_dir) / f"recipe-until-{step}.json")


def changes(before: Recipe, now: Recipe) -> list[str]:
    """What of a recipe has changed that a run must not change on its way, a line each.

    Longer (`max_steps` or `epochs`) is no change, nor is another way to make the same batch where the order of the data
    does not depend on it.
    """
    found: list[tuple[str, Any, Any]] = list(differing(_plain(before), _plain(now)))
    free = set(FREE)
    one, other = before.train, now.train
    if 0 < one.max_steps < other.max_steps:
        free.add("train.max_steps")
    if (one.max_steps > 0 and other.max_steps > 0) or one.epochs < other.epochs:
        free.add("train.epochs")
    same = one.batch_size * one.accumulate == other.batch_size * other.accumulate
    if same and not one.bucket and not other.bucket and now.stage != "grpo":
        free |= {"train.batch_size", "train.accumulate"}
    return [told(*each) for each in found if each[0] not in free]


def _plain(recipe: Recipe) -> Any:
    return json.loads(json.dumps(recipe.to_dict()))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; a kill in the middle of it leaves nothing under its name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def clear(output: Path) -> None:
    """Remove what a kill in the middle of `remove` has left."""
    for hidden in output.glob(".checkpoint-*.old"):
        shutil.rmtree(hidden, ignore_errors=True)

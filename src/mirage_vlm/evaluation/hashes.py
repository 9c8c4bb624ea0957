"""SHA-256 of what was evaluated: the files of a checkpoint, a data file, and examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mirage_vlm.evaluation.compare import name_of, prompt_texts
from mirage_vlm.modeling.bundled import resolve
from mirage_vlm.trajectory import Trajectory

# the files of a checkpoint that decide what it answers, where they are there
_MODEL_FILES = (
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def model_sha256(model: str) -> dict[str, str] | None:
    """The hash of each file of a checkpoint that decides what it answers: weights, configuration, tokenizer.

    Args:
        model: a folder, `bundled`, or a name on the Hugging Face hub, which is looked for in the local cache.

    Returns:
        File name → hash, by name; None where no files are found on this machine.
    """
    folder = Path(resolve(model))
    if not folder.is_dir():
        cached = _cached(model)
        if cached is None:
            return None
        folder = cached
    files = {path for pattern in _MODEL_FILES for path in folder.glob(pattern)}
    return {path.name: file_sha256(path) for path in sorted(files)} or None


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # not the name of a model on the hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_sha256(path: Path) -> str:
    """The hash of a data file's bytes, or of the names and bytes of all files of a dataset folder.

    Pictures that a data file refers to are not part of it.
    """
    if path.is_file():
        return file_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    parts = [f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def examples_sha256(examples: Sequence[Trajectory]) -> str:
    """The hash of what is asked and known of examples, in order: names, tasks, answers, meta, and the prompts' text."""
    found = hashlib.sha256()
    for example in examples:
        known = [name_of(example), example.task, example.answer, example.meta, prompt_texts(example)]
        found.update(json.dumps(known, sort_keys=True).encode() + b"\n")
    return found.hexdigest()

"""What a checkpoint is, read from its files alone: no weights are loaded, and torch is not needed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.bundled import located
from mirage_vlm.modeling.config import LatentConfig

LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
LATENT_KEYS = ("latent_token_id", "latent_start_id", "latent_end_id", "latent_size")


def describe(model: str) -> dict[str, Any]:
    """A checkpoint by its folder, its name on the hub (if it is in the local cache), or a bundled one.

    Returns:
        `model`, `path`, `family`, `architecture`, `parameters` (None where no .safetensors file tells), `dtype` (as
        it is loaded) and `stored` (in its files), `context`, `text` and `vision` (sizes), `latent` (fields of
        `LatentConfig`; None where it has no latent tokens), `pictures` (limits in pixels and sizes of patches), and
        `files` with their bytes.

    Raises:
        MirageError: there is no checkpoint, or one of its files cannot be read; the message names it.
    """
    folder = _folder(model)
    config = _json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise MirageError(f"{folder / 'config.json'}: model_type is missing")
    text, vision = _part(config, "text_config") or config, _part(config, "vision_config")
    parameters, kinds = _weights(folder)
    return {
        "model": model,
        "path": str(folder),
        "family": config["model_type"],
        "architecture": next(iter(config.get("architectures") or ()), None),
        "parameters": parameters,
        "dtype": config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or ", ".join(kinds) or None,
        "stored": ", ".join(kinds) or None,
        "context": text.get("max_position_embeddings"),
        "text": {
            "layers": text.get("num_hidden_layers"),
            "width": text.get("hidden_size"),
            "heads": text.get("num_attention_heads"),
            "key_value_heads": text.get("num_key_value_heads"),
            "vocabulary": text.get("vocab_size"),
        },
        "vision": {
            "layers": vision.get("depth"),
            "width": vision.get("hidden_size"),
            "patch": vision.get("patch_size"),
            "merge": vision.get("spatial_merge_size"),
        },
        "latent": _latent(config, folder),
        "pictures": _pictures(folder),
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()},
    }


def _folder(model: str) -> Path:
    folder = Path(located(model))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as fault:
        raise MirageError(f"{model}: there is no such folder, nor such a model in the hub's local cache") from fault


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise MirageError(f"{path}: cannot be read: {fault}") from fault
    if not isinstance(found, dict):
        raise MirageError(f"{path}: must hold an object")
    return found


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object in an object; empty where there is none."""
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def _weights(folder: Path) -> tuple[int | None, list[str]]:
    """The number of parameters in all .safetensors files of the model, and their dtypes, the most frequent first."""
    sizes: dict[str, tuple[int, str]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for name, entry in _header(file).items():
            if name != "__metadata__":
                sizes[name] = (math.prod(entry["shape"]), DTYPES.get(entry["dtype"], entry["dtype"].lower()))
    kinds: Counter[str] = Counter()
    for size, kind in sizes.values():
        kinds[kind] += size
    return (sum(kinds.values()) if sizes else None), [kind for kind, _ in kinds.most_common()]


def _header(file: Path) -> dict[str, Any]:
    """The names, shapes and dtypes of a .safetensors file, which stand before its numbers."""
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if not 0 < length <= LONGEST_HEADER:
                raise ValueError("its header is damaged")
            header = json.loads(content.read(length))
            return {name: dict(entry) for name, entry in header.items()}
    except (OSError, ValueError, TypeError, AttributeError) as fault:
        raise MirageError(f"{file}: is not a whole .safetensors file: {fault}") from fault


def _latent(config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    if not any(key in config for key in LATENT_KEYS):
        return None
    return asdict(LatentConfig.read(SimpleNamespace(**config), str(folder)))


def _pictures(folder: Path) -> dict[str, Any]:
    """Limits of pictures in pixels, in either of the spellings that transformers has had."""
    path = folder / "preprocessor_config.json"
    found = _json(path) if path.is_file() else {}
    size = _part(found, "size")
    return {
        "min_pixels": found.get("min_pixels", size.get("shortest_edge")),
        "max_pixels": found.get("max_pixels", size.get("longest_edge")),
        "patch": found.get("patch_size"),
        "merge": found.get("merge_size"),
    }

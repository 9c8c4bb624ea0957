"""Features of a frozen vision tower, kept on disk: each picture goes through the tower once.

    <folder>/<fingerprint of the tower>/<precision>/<first two digits>/<key of the picture>.safetensors

A file is named after the content of what it was computed from, so that any number of runs and processes can share a
folder: whoever needs a picture first computes it, and two that compute the same write the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import save
from torch import nn

from mirage_vlm.errors import MirageError

log = logging.getLogger(__name__)

Compute = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]  # pixel_values, grid_thw → features of each


def picture_keys(pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> tuple[str, ...]:
    """A name for each picture by its content: SHA-256 of its processed pixels and grid.

    Args:
        pixel_values: [patches of all pictures, C · t · p · p].
        grid_thw: [pictures, 3].
    """
    keys = []
    sizes = grid_thw.prod(dim=1).tolist()
    for grid, pixels in zip(grid_thw.tolist(), pixel_values.cpu().split(sizes), strict=True):
        digest = hashlib.sha256(f"{pixels.dtype} {tuple(pixels.shape)} {grid}".encode())
        digest.update(_bytes(pixels))
        keys.append(digest.hexdigest())
    return tuple(keys)


def fingerprint(tower: nn.Module) -> str:
    """A name for a vision tower by what its features depend on: weights, their dtype, configuration, transformers.

    Raises:
        MirageError: its weights are not in this process.
    """
    own: Any = tower.config
    config = {k: v for k, v in own.to_dict().items() if k not in ("dtype", "torch_dtype", "_name_or_path")}
    digest = hashlib.sha256(f"{transformers.__version__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(tower.state_dict().items()):
        if tensor.is_meta:
            raise MirageError(
                "a feature cache needs the vision tower's weights in every process: "
                "turn off fsdp_cpu_ram_efficient_loading, or leave train.feature_cache out"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor.detach().cpu()))
    return digest.hexdigest()[:32]


class FeatureStore:
    """The kept features of one vision tower.

    Args:
        folder: where to keep them; made if it is not there.
        tower: the vision tower, which must not be trained.

    Raises:
        MirageError: the tower takes gradients, or the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, tower: nn.Module):
        if any(parameter.requires_grad for parameter in tower.parameters()):
            raise MirageError("features of a vision tower that is trained cannot be kept; set model.freeze_vision")
        self.root, self.tower = Path(folder), tower
        self.full = False  # a write has failed
        self.look_again()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise MirageError(f"{folder}: cannot keep features there: {fault.strerror or fault}") from fault

    def look_again(self) -> None:
        """Take the tower for what it is now; to be called when it was given other weights."""
        self.folder = self.root / fingerprint(self.tower)

    def features(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, keys: Sequence[str] | None, compute: Compute
    ) -> list[torch.Tensor]:
        """Features of each picture, [n_i, D] without a graph, on the device of `pixel_values`.

        What is on disk is read; what is not goes through the tower in one pass, each picture once, and is written.

        Args:
            pixel_values: [patches of all pictures, C · t · p · p].
            grid_thw: [pictures, 3].
            keys: `picture_keys` of these pictures; None works them out here.
            compute: the tower.
        """
        keys = picture_keys(pixel_values, grid_thw) if keys is None else keys
        device = pixel_values.device
        found = {}
        for key in dict.fromkeys(keys):
            if (kept := self._read(self._path(key, device))) is not None:
                found[key] = kept.to(device)
        missing = {key: i for i, key in enumerate(keys) if key not in found}
        if missing:
            pieces = pixel_values.split(grid_thw.prod(dim=1).tolist())
            chosen = list(missing.values())
            with torch.no_grad():
                made = compute(torch.cat([pieces[i] for i in chosen]), grid_thw[chosen])
            for key, features in zip(missing, made, strict=True):
                self._write(self._path(key, device), features)
                found[key] = features
        return [found[key] for key in keys]

    def _path(self, key: str, device: torch.device) -> Path:
        """Where a picture's features are: by what the tower computes in, too, which need not be its weights' dtype."""
        autocast = torch.is_autocast_enabled(device.type)
        precision = torch.get_autocast_dtype(device.type) if autocast else next(self.tower.parameters()).dtype
        return self.folder / str(precision).removeprefix("torch.") / key[:2] / f"{key}.safetensors"

    def _read(self, path: Path) -> torch.Tensor | None:
        """What a file holds; None where there is none or it is damaged."""
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                features = file.get_tensor("features")
                whole = file.metadata()["crc32"] == _checksum(features)
        except (safetensors.SafetensorError, KeyError, TypeError) as fault:
            log.warning("%s: damaged (%s); computed anew", path, " ".join(str(fault).split()))
            return None
        if not whole:
            log.warning("%s: damaged (its checksum is another); computed anew", path)
            return None
        return features

    def _write(self, path: Path, features: torch.Tensor) -> None:
        """Write beside the file and rename, so that a reader finds a whole file or none.

        Not forced to the disk as checkpoints are: what a power cut leaves half written is computed anew.
        """
        if self.full:
            return
        kept = features.detach().cpu().contiguous()
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(save({"features": kept}, metadata={"crc32": _checksum(kept)}))
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as fault:
            self.full = True
            log.warning("%s: cannot be written (%s); no more features are kept", path, fault.strerror or fault)


def _bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor in main memory, of any dtype, as an array."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _checksum(tensor: torch.Tensor) -> str:
    return f"{zlib.crc32(_bytes(tensor)):08x}"

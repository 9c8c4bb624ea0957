"""What a training run writes: whole checkpoints, and a line of metrics for each log."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import distribute_tensor
from transformers import TrainerCallback

from mirage_vlm.formats import atomic_writer
from mirage_vlm.modeling.latent_vlm import LatentVLM

if TYPE_CHECKING:
    import torch

    from mirage_vlm.training.recipe import Recipe

METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.json"
TRAINABLE_FILE = "trainable.safetensors"


class Checkpoints(transformers.Trainer):
    """The part of a trainer that writes checkpoints atomically and reads them back.

    Attributes:
        vlm: the model that is trained.
        recipe: of the run.
    """

    vlm: LatentVLM
    recipe: Recipe

    def take(self, vlm: LatentVLM, recipe: Recipe) -> None:
        """Say what is trained, and by which recipe."""
        self.vlm, self.recipe = vlm, recipe
        self._staging: str | None = None
        self._dtype = vlm.model.dtype  # accelerate may train a float32 copy

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint into a staging folder and rename it when it is whole; then drop old ones."""
        run_dir = Path(super()._get_output_dir(trial))
        staging = run_dir / "incomplete"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(run_dir / name, ignore_errors=True)
            os.replace(staging / name, run_dir / name)
            staging.rmdir()
            steps = sorted(int(p.name.split("-")[1]) for p in run_dir.glob("checkpoint-*"))
            for step in steps[: -self.recipe.train.keep]:
                shutil.rmtree(run_dir / f"checkpoint-{step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights. A process that holds only a share of them sends it to the first one."""
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            self._save(output_dir, state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Trained weights only where adapters are trained, else a checkpoint that `from_pretrained` loads."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = self.vlm.state_dict() if state_dict is None else self._own(state_dict)
        if self.recipe.model.lora is not None:
            trained = [name for name, parameter in self.vlm.named_parameters() if parameter.requires_grad]
            trained += [f"feedback.{name}" for name, _ in self.vlm.feedback.named_buffers()]  # made of this run's data
            save_file({name: state[name].contiguous() for name in trained}, folder / TRAINABLE_FILE)
        else:
            self.vlm.write_files(folder, self._rounded(state))
        (folder / RECIPE_FILE).write_text(json.dumps(self.recipe.to_dict(), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def _own(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state of the wrapped module under the names of `vlm`."""
        return {name.removeprefix("vlm."): tensor for name, tensor in state.items()}

    def _rounded(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights in the dtype that they had before training."""
        return {name: t.to(self._dtype) if t.is_floating_point() else t for name, t in state.items()}

    def collect(self) -> None:
        """After training: whole weights in `vlm`, of the first process only where they were shared out."""
        if not self.is_fsdp_enabled:
            return
        state = self._rounded(self._own(self.accelerator.get_state_dict(self.model)))
        if self.is_world_process_zero():
            whole: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
            for name, share in list(self.vlm.named_parameters(remove_duplicate=False)):
                parent, _, child = name.rpartition(".")
                whole.setdefault(share, nn.Parameter(state[name], share.requires_grad))
                setattr(self.vlm.get_submodule(parent), child, whole[share])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            self.load_weights(resume_from_checkpoint)
        elif self.recipe.model.lora is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = load_file(Path(resume_from_checkpoint) / TRAINABLE_FILE)
            shares: dict[str, Any] = dict(self.vlm.named_parameters())
            buffers = dict(self.vlm.named_buffers())
            for name, whole in saved.items():
                if name in buffers:  # whole in every process
                    buffers[name].copy_(whole)
                    continue
                mesh, placements = shares[name].device_mesh, shares[name].placements
                share = distribute_tensor(whole.to(shares[name].device), mesh, placements, src_data_rank=None)
                shares[name].data.copy_(share)

    def load_weights(self, checkpoint: str) -> None:
        """Take the weights of one of this run's checkpoints, before they are shared out."""
        folder = Path(checkpoint)
        if self.recipe.model.lora is not None:
            self.vlm.load_state_dict(load_file(folder / TRAINABLE_FILE), strict=False)
            return
        saved = LatentVLM.from_pretrained(folder, dtype=self.vlm.model.dtype)
        self.vlm.load_state_dict(saved.state_dict())
        if self.vlm.feature_store is not None:
            self.vlm.feature_store.look_again()


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`; on resume, lines after the checkpoint's step are dropped.

    Each line has `seconds`, of training so far, those of interrupted processes up to their last checkpoint with them.

    Args:
        path: the file.
        examples: different ones that are trained on, which the last line says.
    """

    def __init__(self, path: Path, examples: int):
        self.path, self.examples = path, examples
        self.before, self.began = 0.0, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()
        if not state.is_world_process_zero or not self.path.exists():
            return
        *whole, _cut_short = self.path.read_text().split("\n")  # what follows the last line break is half a line
        kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
        with atomic_writer(self.path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self.before = json.loads(kept[-1]).get("seconds", 0.0) if kept else 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, **logs, "seconds": self.before + time.monotonic() - self.began}
            if "train_runtime" in logs:
                line["examples"] = self.examples
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

"""What a training run writes: whole checkpoints, and a line of metrics for each log."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import distribute_tensor
from transformers import TrainerCallback

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import atomic_writer
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.training.finite import Watch
from mirage_vlm.training.folder import METRICS_FILE as METRICS_FILE
from mirage_vlm.training.folder import RECIPE_FILE as RECIPE_FILE
from mirage_vlm.training.folder import TRAINABLE_FILE as TRAINABLE_FILE
from mirage_vlm.training.folder import checkpoints_of, remove, writing
from mirage_vlm.training.shares import together

if TYPE_CHECKING:
    import torch

    from mirage_vlm.training.recipe import Recipe


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
        self._old_to_go = False  # there may be more checkpoints than are to be kept
        self.watch = Watch(self, recipe.train.non_finite == "skip", Path(recipe.output_dir))
        self._dtype = vlm.model.dtype  # accelerate may train a float32 copy

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint into a staging folder and rename it when it is whole; old ones go when a step is done.

        Raises:
            MirageError: weights are not finite, or the disk is full or cannot be written.
        """
        self.watch.check_weights()
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = str(run_dir / "incomplete")
        # sharing out weights, processes wait for each other within; then the first ends the others by its own end
        with nullcontext() if self.is_fsdp_enabled else together(self.args.device):
            try:
                with writing(name, run_dir):
                    self._write_checkpoint(run_dir, name, model, trial)
            except MirageError:
                shutil.rmtree(self._staging, ignore_errors=True)
                raise
            finally:
                self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with writing(name, run_dir):
                if (run_dir / name).exists():
                    remove(run_dir / name)
                os.replace(run_dir / "incomplete" / name, run_dir / name)
                (run_dir / "incomplete").rmdir()
        self._old_to_go = True

    def _write_checkpoint(self, run_dir: Path, name: str, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            shutil.rmtree(run_dir / "incomplete", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def drop_old(self) -> None:
        """Keep as many checkpoints as the recipe says; called when a step after the newest has been finite, or none is
        to come, so that there is always one from which a run can go on."""
        if self._old_to_go and self.args.should_save:
            output = Path(self.recipe.output_dir)
            for old in checkpoints_of(output)[: -self.recipe.train.keep]:
                with writing("over old checkpoints", output):
                    remove(old)
        self._old_to_go = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.at_work():
            found = super().train(*args, **kwargs)
        self.drop_old()
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.watch.loss(super().training_step(*args, **kwargs))

    def terms(self) -> dict[str, torch.Tensor]:
        """The parts of the step's loss, each a scalar of this process, to name the one that is not finite."""
        return {}

    def step_ends(self, taken: bool) -> None:
        """Called in each step when it is known whether it is taken."""
        if taken:
            self.drop_old()

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
        with fitting(resume_from_checkpoint, "weights"):
            self._load_weights(resume_from_checkpoint, model)

    def _load_weights(self, resume_from_checkpoint: str, model: nn.Module | None) -> None:
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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with fitting(checkpoint, "optimiser's state"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with fitting(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)

    def load_weights(self, checkpoint: str) -> None:
        """Take the weights of one of this run's checkpoints, before they are shared out.

        Raises:
            MirageError: they are of another model.
        """
        folder = Path(checkpoint)
        with fitting(checkpoint, "weights"):
            if self.recipe.model.lora is not None:
                saved = load_file(folder / TRAINABLE_FILE)
                trained = {name for name, parameter in self.vlm.named_parameters() if parameter.requires_grad}
                if other := trained - saved.keys() | {name for name in saved if "lora_" in name} - trained:
                    raise ValueError(f"{min(other)} is in one of them alone")
                self.vlm.load_state_dict(saved, strict=False)
                return
            whole = LatentVLM.from_pretrained(folder, dtype=self.vlm.model.dtype)
            self.vlm.load_state_dict(whole.state_dict())
        if self.vlm.feature_store is not None:
            self.vlm.feature_store.look_again()


@contextmanager
def fitting(checkpoint: str | None, what: str) -> Iterator[None]:
    """Within, a checkpoint that is of another model or is damaged ends the run in one line.

    Raises:
        MirageError: it is.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, pickle.UnpicklingError, SafetensorError) as fault:
        said = " ".join(str(fault).split())
        said = said if len(said) <= 200 else said[:197] + "..."
        raise MirageError(
            f"{checkpoint}: its {what} cannot be taken: it is damaged, or of another model than the recipe's ({said}); "
            "take the recipe back, or choose another output_dir"
        ) from fault


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
        try:
            *whole, _cut_short = self.path.read_text().split("\n")  # what follows the last line break is half a line
            kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise MirageError(f"{self.path}: cannot be read or is damaged ({fault}); move it away to go on") from fault
        with atomic_writer(self.path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self.before = json.loads(kept[-1]).get("seconds", 0.0) if kept else 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, **logs, "seconds": self.before + time.monotonic() - self.began}
            if "train_runtime" in logs:
                line["examples"] = self.examples
            with writing("the metrics", self.path.parent), self.path.open("a") as file:
                file.write(json.dumps(finite_or_null(line), allow_nan=False) + "\n")


def finite_or_null(value: Any) -> Any:
    """A value as JSON has it, which knows neither infinite numbers nor those that are none: null in their place."""
    if isinstance(value, dict):
        return {key: finite_or_null(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Training on `transformers.Trainer`: the stages' losses, exact accumulation, atomic checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from mirage_vlm.formats import atomic_writer
from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.training.data import BucketSampler
from mirage_vlm.training.losses import StageLoss, stage1, stage2
from mirage_vlm.training.recipe import Recipe
from mirage_vlm.training.rollout import Batch

STAGE_LOSSES = {"sft": stage1, "stage1": stage1, "stage2": stage2}
METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.json"
TRAINABLE_FILE = "trainable.safetensors"


class StageModule(nn.Module):
    """The forward pass of a stage as a module, so that accelerate can wrap it (DDP, FSDP, autocast)."""

    def __init__(self, vlm: LatentVLM, stage: str):
        super().__init__()
        self.vlm = vlm
        self.stage = stage

    def forward(self, **tensors: torch.Tensor) -> dict[str, Any]:
        found: StageLoss = STAGE_LOSSES[self.stage](self.vlm, Batch(**tensors))
        return {
            "ce_sum": found.ce_sum,
            "align_sum": found.align_sum,
            "tokens": found.tokens,
            "latents": found.latents,
            "correct": found.correct,
        }


class LatentTrainer(transformers.Trainer):
    """`transformers.Trainer` with the losses of a stage.

    Each loss term is divided by its own count over the whole optimisation step (all micro-batches and all
    processes), so that accumulation and data parallelism give the loss of one big batch.
    """

    def __init__(self, vlm: LatentVLM, recipe: Recipe, args: TrainingArguments, **options: Any):
        super().__init__(model=StageModule(vlm, recipe.stage), args=args, **options)
        self.vlm = vlm
        self.recipe = recipe
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, over the whole step
        self._sums: dict[str, float] = {}
        self._staging: str | None = None

    # -- loss --------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """[2] labelled tokens and latent tokens of the whole step."""
        if not batch_samples:
            return None
        pad_id = self.vlm.config.pad_id
        counts = torch.tensor(
            [
                sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batch_samples),
                sum(int((batch["input_ids"] == pad_id).sum()) for batch in batch_samples),
            ],
            device=device,
        )
        return self.accelerator.reduce(counts, reduction="sum") if self.args.world_size > 1 else counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        found = model(**inputs)
        if isinstance(num_items_in_batch, torch.Tensor):
            tokens, latents = num_items_in_batch.clamp(min=1)
        else:
            tokens, latents = max(found["tokens"], 1), max(found["latents"], 1)
        weights = self.recipe.loss
        ce_weight = weights.ce if self.recipe.stage == "stage1" else 1.0
        loss = ce_weight * found["ce_sum"] / tokens + weights.align * found["align_sum"] / latents
        loss = loss * self.args.world_size  # gradients are averaged over processes
        for key in ("ce_sum", "align_sum", "tokens", "latents", "correct"):
            self._sums[key] = self._sums.get(key, 0.0) + float(torch.as_tensor(found[key]).detach())
        return (loss, found) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms since the last log: nats a token, 1 − cosine, share of tokens right, latents."""
        if "loss" in logs and self._sums:
            sums, self._sums = self._sums, {}
            logs["ce"] = sums["ce_sum"] / max(sums["tokens"], 1)
            if self.recipe.stage == "stage1":
                logs["align"] = sums["align_sum"] / max(sums["latents"], 1)
            logs["token_accuracy"] = sums["correct"] / max(sums["tokens"], 1)
            logs["tokens"] = sums["tokens"]
            logs["latents"] = sums["latents"]
        super().log(logs, start_time)

    # -- order of the data -------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> BucketSampler:
        train = self.recipe.train
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        sizes = dataset.sizes if train.bucket else [0] * len(dataset)
        return BucketSampler(sizes, self.args.train_batch_size, train.seed, train.bucket)

    # -- checkpoints -------------------------------------------------------------------------------------------

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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Trained weights only where adapters are trained, else a checkpoint that `from_pretrained` loads."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self.recipe.model.lora is not None:
            trainable = {n: p.detach().contiguous() for n, p in self.vlm.named_parameters() if p.requires_grad}
            save_file(trainable, folder / TRAINABLE_FILE)
        else:
            self.vlm.write_files(folder)
        (folder / RECIPE_FILE).write_text(json.dumps(self.recipe.to_dict(), indent=2) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights(resume_from_checkpoint)

    def load_weights(self, checkpoint: str) -> None:
        """Take the weights of one of this run's checkpoints."""
        folder = Path(checkpoint)
        if self.recipe.model.lora is not None:
            self.vlm.load_state_dict(load_file(folder / TRAINABLE_FILE), strict=False)
            return
        saved = LatentVLM.from_pretrained(folder, dtype=self.vlm.model.dtype)
        self.vlm.load_state_dict(saved.state_dict())


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`; on resume, lines after the checkpoint's step are dropped."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        *whole, _cut_short = self.path.read_text().split("\n")  # what follows the last line break is half a line
        kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
        with atomic_writer(self.path) as file:
            file.write("".join(line + "\n" for line in kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

"""Training on `transformers.Trainer`: the stages' losses, exact accumulation, atomic checkpoints."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import distribute_tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from mirage_vlm.formats import atomic_writer
from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.training.align import Alignment, Cosine
from mirage_vlm.training.data import BucketSampler, in_one_line
from mirage_vlm.training.in_step import Needs, counted, make_up, needs_of
from mirage_vlm.training.losses import StageLoss, stage1, stage2
from mirage_vlm.training.recipe import Recipe
from mirage_vlm.training.rollout import Batch
from mirage_vlm.training.shares import ShareCollator, Shares, together

STAGE_LOSSES: dict[str, Callable[..., StageLoss]] = {"sft": stage1, "stage1": stage1, "stage2": stage2}
SUMS = ("ce_sum", "align_sum", "tokens", "latents", "correct")  # of a micro-batch; what is logged comes from them
METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.json"
TRAINABLE_FILE = "trainable.safetensors"


class StageModule(nn.Module):
    """The forward pass of a stage as a module, so that accelerate can wrap it (DDP, FSDP, autocast)."""

    def __init__(
        self,
        vlm: LatentVLM,
        stage: str,
        latent_iterations: int = 0,
        alignment: Alignment | None = None,
        **options: Any,
    ):
        super().__init__()
        self.vlm = vlm
        self.stage = stage
        self.alignment = Cosine() if alignment is None else alignment
        self.options = options  # of the stage's loss
        if stage == "stage2":
            self.options["latent_iterations"] = latent_iterations

    def forward(self, in_step: tuple[Needs, Needs] | None = None, **batch: Any) -> dict[str, Any]:
        """The sums of a batch. `in_step`, where weights are shared out: what it and what any other batch takes."""
        with counted(self.vlm.language_model) as calls:
            loss = STAGE_LOSSES[self.stage]
            found: StageLoss = loss(self.vlm, Batch(**batch), alignment=self.alignment, **self.options)
        ce_sum = found.ce_sum
        if in_step is not None:
            ce_sum = ce_sum + make_up(self.vlm, calls[0], *in_step)
        sums = [torch.as_tensor(getattr(found, name), device=ce_sum.device).detach().double() for name in SUMS]
        # as integers: the mixed precision of FSDP rounds all floating-point outputs of a module
        return {"ce_sum": ce_sum, "align_sum": found.align_sum, "bits": torch.stack(sums).view(torch.int64)}

    def tie_weights(self) -> None:
        """Asked for by accelerate where it loads weights in the first process only and sends them round."""
        self.vlm.model.tie_weights()


class LatentTrainer(transformers.Trainer):
    """`transformers.Trainer` with the losses of a stage.

    Each loss term is divided by its own count over the whole optimisation step (all micro-batches and all
    processes), so that accumulation and data parallelism give the loss of one big batch.
    """

    def __init__(
        self,
        vlm: LatentVLM,
        recipe: Recipe,
        args: TrainingArguments,
        alignment: Alignment | None = None,
        **options: Any,
    ):
        self.stage_module = StageModule(
            vlm,
            recipe.stage,
            recipe.train.latent_iterations,
            alignment,
            detach_targets=not recipe.loss.through_targets,
            visibility=recipe.train.visibility,
        )
        super().__init__(model=self.stage_module, args=args, **options)
        self.vlm = vlm
        self.recipe = recipe
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, over the whole step
        self._sums: torch.Tensor | None = None  # of SUMS since the last log, of this process
        self._staging: str | None = None
        self._dtype = vlm.model.dtype  # accelerate may train a float32 copy

    # -- loss --------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of a step. A batch that cannot be made ends all processes, with its one line."""
        batches: list[dict[str, Any]] = []
        with together(device), in_one_line():
            batches += itertools.islice(epoch_iterator, num_batches)
        if self.is_fsdp_enabled:
            own = [needs_of(batch, self.recipe, self.vlm.config.pad_id) for batch in batches]
            largest = torch.tensor([astuple(needs) for needs in own], device=device)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            for batch, needs, most in zip(batches, own, largest.tolist(), strict=True):
                batch["in_step"] = (needs, Needs(*most))
        return batches, self._get_num_items_in_batch(batches, device)

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
        if self.recipe.mixes:
            self.stage_module.options["own_share"] = self._own_share()
        found = model(**inputs)
        sums = found["bits"].view(torch.float64)
        counts = num_items_in_batch if isinstance(num_items_in_batch, torch.Tensor) else sums[2:4]
        tokens, latents = counts.clamp(min=1)
        weights = self.recipe.loss
        first = self.recipe.stage == "stage1"
        ce_weight, align_weight = (weights.ce, weights.align) if first else (1.0, weights.align_stage2)
        scale = self.args.world_size  # gradients are averaged over processes

        def weighted(ce_sum: torch.Tensor, align_sum: torch.Tensor) -> torch.Tensor:
            return (ce_weight * ce_sum / tokens + align_weight * align_sum / latents) * scale

        loss = weighted(found["ce_sum"], found["align_sum"]).float()
        if found["ce_sum"].dtype != torch.float32:
            loss = loss + (weighted(*sums[:2]) - loss).detach().float()  # the value before it was rounded
        self._sums = sums if self._sums is None else self._sums + sums
        return (loss, found) if return_outputs else loss

    def _own_share(self) -> float:
        """The chance of a latent to be the model's own, at the current step."""
        first, last = self.recipe.train.own_share
        return first + (last - first) * self.state.global_step / max(1, self.state.max_steps - 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms since the last log, of all processes: nats a token, alignment, share right, latents."""
        if "loss" in logs and self._sums is not None:
            total = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            sums, self._sums = dict(zip(SUMS, total, strict=True)), None
            logs["ce"] = sums["ce_sum"] / max(sums["tokens"], 1)
            if self.recipe.needs_targets:
                logs["align"] = sums["align_sum"] / max(sums["latents"], 1)
            logs["token_accuracy"] = sums["correct"] / max(sums["tokens"], 1)
            logs["tokens"] = sums["tokens"]
            logs["latents"] = sums["latents"]
        super().log(logs, start_time)

    # -- order of the data -------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this process. accelerate is not asked to split them: see `Shares`."""
        args = self.args
        batches = Shares(
            self._get_train_sampler(), args.train_batch_size, args.process_index, args.world_size, self._epoch
        )
        self._rounds = len(batches)
        return DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=ShareCollator(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            generator=torch.Generator(),  # seeds its workers; they must not take from what training draws from
        )

    def _epoch(self) -> int:
        """Whole passes over the data behind the current step."""
        return self.state.global_step // -(-self._rounds // self.args.gradient_accumulation_steps)

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
            for name, whole in saved.items():
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

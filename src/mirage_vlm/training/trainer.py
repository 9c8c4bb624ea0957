"""Training on `transformers.Trainer`: the stages' losses, exact accumulation, atomic checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.training.align import Alignment, Cosine
from mirage_vlm.training.checkpoints import Checkpoints
from mirage_vlm.training.data import BucketSampler
from mirage_vlm.training.in_step import Needs, counted, make_up, needs_of
from mirage_vlm.training.losses import StageLoss, stage1, stage2
from mirage_vlm.training.recipe import Recipe
from mirage_vlm.training.rollout import Batch
from mirage_vlm.training.shares import ShareCollator, SharedFault, Shares, together
from mirage_vlm.training.workers import in_one_line

STAGE_LOSSES: dict[str, Callable[..., StageLoss]] = {"sft": stage1, "stage1": stage1, "stage2": stage2}
SUMS = ("ce_sum", "align_sum", "tokens", "latents", "correct")  # of a micro-batch; what is logged comes from them


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


class LatentTrainer(Checkpoints):
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
        self.take(vlm, recipe)
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, over the whole step
        self._sums: torch.Tensor | None = None  # of SUMS since the last log, of this process
        self._begun = False  # a first step has been looked at
        self._step_sums: torch.Tensor | None = None  # the same of the step that is under way

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
        several = self.args.world_size > 1
        counts = self.accelerator.reduce(counts, reduction="sum") if several else counts
        if not self._begun:
            self._begun = True
            if not bool(counts.any()):
                message = "the first step has neither a token with a label nor a latent, so nothing is learnt of it"
                raise (SharedFault if several else MirageError)(f"data: {message}; look at the responses")
        return counts

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
        self._step_sums = sums if self._step_sums is None else self._step_sums + sums
        return (loss, found) if return_outputs else loss

    def terms(self) -> dict[str, torch.Tensor]:
        if self._step_sums is None:
            return {}
        ce, align = self._step_sums[:2]
        return {"the cross-entropy (ce)": ce} | ({"the alignment (align)": align} if self.recipe.needs_targets else {})

    def step_ends(self, taken: bool) -> None:
        super().step_ends(taken)
        if taken and self._step_sums is not None:
            self._sums = self._step_sums if self._sums is None else self._sums + self._step_sums
        self._step_sums = None

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
        self.watch.without_skipped(logs)
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

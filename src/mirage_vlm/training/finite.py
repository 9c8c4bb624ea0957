"""Steps whose loss or gradient is not finite: they end the run, or are left out, before they reach the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from mirage_vlm.errors import MirageError
from mirage_vlm.training.folder import newest_whole
from mirage_vlm.training.shares import SharedFault

if TYPE_CHECKING:
    from pathlib import Path

MOST_SKIPPED = 20
"""Steps in a row that may be left out; more of them are no accident."""


class Watched(transformers.Trainer):
    """The part of a trainer that looks whether a step is finite before the optimiser takes it.

    All processes come to the same answer: gradients are the same in all of them by then, and what each found of its own
    loss is put together. That is the one time in a step in which the host waits for the device; the Trainer's own, its
    `logging_nan_inf_filter`, is off.

    Attributes:
        skipped: steps of this process's run that were left out.
    """

    skipped = 0

    def watch(self, skip: bool, output: Path) -> None:
        """Say what becomes of a step that is not finite, and where the checkpoints are."""
        self._skip, self._output = skip, output
        self._in_a_row = 0
        self._window = [0, 0]  # steps since the last log: taken, left out
        self._finite: torch.Tensor | None = None  # whether all losses of the step so far are
        self._norm: Any = None  # of the step's gradient, before clipping
        self._loss_sums: list[torch.Tensor | None] = [None, None]  # of the step, and since the last log

    def train(self, *args: Any, **kwargs: Any) -> Any:
        clip: Callable[..., Any] = self.accelerator.clip_grad_norm_

        def clipped(*values: Any, **options: Any) -> Any:
            self._norm = clip(*values, **options)
            return self._norm

        self.accelerator.clip_grad_norm_ = clipped  # type: ignore[method-assign]
        self.add_callback(_Look(self))
        try:
            return super().train(*args, **kwargs)
        finally:
            self.accelerator.clip_grad_norm_ = clip  # type: ignore[method-assign]
            self.remove_callback(_Look)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        if not self._skip:
            return loss
        self._loss_sums[0] = loss.detach() if self._loss_sums[0] is None else self._loss_sums[0] + loss.detach()
        return torch.where(finite, loss, torch.zeros_like(loss))  # the Trainer would add it to its mean

    # -- of trainers that know more ----------------------------------------------------------------------------

    def terms(self) -> dict[str, torch.Tensor]:
        """The parts of the step's loss, each a scalar of this process, to name the one that is not finite."""
        return {}

    def step_ends(self, taken: bool) -> None:
        """Called in each step when it is known whether it counts."""

    # -- the look ----------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Whether the step that is about to be taken is finite.

        Raises:
            MirageError: it is not, and steps are not to be skipped, or too many were.
        """
        finite = self._agreed(self._of_step())
        self.step_ends(finite)
        self._window[0 if finite else 1] += 1
        if finite:
            self._in_a_row = 0
            if (step := self._loss_sums[0]) is not None:
                before = self._loss_sums[1]
                self._loss_sums[1] = step if before is None else before + step
        else:
            self._left_out()
        self._finite, self._loss_sums[0] = None, None

    def _of_step(self) -> torch.Tensor:
        """Scalar, whether loss and gradient of this process are finite."""
        norm = self._norm
        if norm is None:  # a trainer that measures it in another way
            norms = [p.grad.detach().float().norm() for p in self.model.parameters() if p.grad is not None]
            norm = torch.stack([_whole(each) for each in norms]).sum() if norms else 0.0
        self._norm = None
        seen = torch.as_tensor(_whole(norm), device=self.args.device).isfinite()
        return seen if self._finite is None else seen & self._finite.to(seen.device)

    def _agreed(self, holds: torch.Tensor) -> bool:
        """Whether something holds in all processes."""
        flag = holds.to(torch.int32)
        if self.args.world_size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def _left_out(self) -> None:
        """The optimiser passes over parameters without a gradient: no weight, moment or count of theirs changes."""
        if not self._skip:
            self._end(f"{self._cause()} is not finite", "; or set train.non_finite to skip such steps")
        self.skipped += 1
        self._in_a_row += 1
        if not self._weights_finite():
            self._end("weights are not finite any more", "")
        if self._in_a_row > MOST_SKIPPED:
            self._end(f"{self._cause()} is not finite, for {self._in_a_row} steps in a row", "")
        self.model.zero_grad(set_to_none=True)

    def _cause(self) -> str:
        """What of the step is not finite, in any process: a term of the loss, else the gradient."""
        names, parts = list(self.terms()), list(self.terms().values())
        for name, part in zip(names, parts, strict=True):
            if not self._agreed(part.isfinite()):
                return name
        if self._finite is not None and not self._agreed(self._finite):
            return "the loss"
        return "the gradient"

    def _end(self, what: str, more: str) -> NoReturn:
        step, rate = self.state.global_step + 1, self.lr_scheduler.get_last_lr()[0]
        last = newest_whole(self._output)
        kept = f"the newest checkpoint is {last}" if last is not None else "no checkpoint was saved before"
        message = (
            f"step {step}: {what}, at a learning rate of {rate:.3g}; the run has ended and {kept}. Lower "
            f"train.learning_rate (it is {self.args.learning_rate:g}) or look at the data of that step{more}"
        )
        raise (SharedFault if self.args.world_size > 1 else MirageError)(message)

    # -- weights -----------------------------------------------------------------------------------------------

    def check_weights(self) -> None:
        """Before they are saved.

        Raises:
            MirageError: one of them is not finite, in any process.
        """
        if not self._weights_finite():
            last = newest_whole(self._output)
            kept = f"the newest checkpoint is {last}" if last is not None else "there is no checkpoint before it"
            raise (SharedFault if self.args.world_size > 1 else MirageError)(
                f"step {self.state.global_step}: weights are not finite any more, so nothing is saved; {kept}. Lower "
                f"train.learning_rate (it is {self.args.learning_rate:g})"
            )

    def _weights_finite(self) -> bool:
        trained = (_local(p.detach()) for p in self.model.parameters() if p.requires_grad)
        return self._agreed(_all_finite(trained, self.args.device))

    # -- logs --------------------------------------------------------------------------------------------------

    def without_skipped(self, logs: dict[str, Any]) -> None:
        """Make the mean loss since the last log one of the steps that were taken, and say how many were not."""
        if "loss" in logs:
            taken, left_out = self._window
            if left_out:
                sums = self._loss_sums[1]
                total = torch.zeros((), device=self.args.device) if sums is None else sums.double()
                mean = self.accelerator.reduce(total, reduction="mean") if self.args.world_size > 1 else total
                logs["loss"] = float(mean) / taken if taken else None
            self._window, self._loss_sums[1] = [0, 0], None
        if self.skipped:
            logs["skipped"] = self.skipped


class _Look(TrainerCallback):
    def __init__(self, trainer: Watched):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.look()


def _all_finite(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Scalar, whether all numbers of all tensors are finite."""
    flags = [tensor.isfinite().all().to(device) for tensor in tensors]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(value: Any) -> Any:
    """A number that is shared out among processes, put together."""
    return value.full_tensor() if isinstance(value, DTensor) else value

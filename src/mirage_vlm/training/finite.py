"""Steps whose loss or gradient is not finite: they end the run, or are left out, before they reach the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from mirage_vlm.errors import MirageError
from mirage_vlm.training.folder import newest_whole
from mirage_vlm.training.shares import SharedFault

if TYPE_CHECKING:
    from pathlib import Path

    from mirage_vlm.training.checkpoints import Checkpoints

MOST_SKIPPED = 20
"""Steps in a row that may be left out; more of them are no accident."""


class Watch(TrainerCallback):
    """Looks whether a step is finite before the optimiser takes it.

    All processes come to the same answer: gradients are the same in all of them by then, and what each found of its own
    loss is put together. That is the one time in a step in which the host waits for the device; the Trainer's own, its
    `logging_nan_inf_filter`, is off.

    Args:
        trainer: whose steps they are. It knows the `terms` of a step's loss, and is told when a step ends.
        skip: leave such steps out instead of ending the run.
        output: where the checkpoints are.

    Attributes:
        skipped: steps that were left out.
    """

    def __init__(self, trainer: Checkpoints, skip: bool, output: Path):
        self.trainer, self.skip, self.output = trainer, skip, output
        self.skipped = self.in_a_row = 0
        self.window = [0, 0]  # steps since the last log: taken, left out
        self.finite: torch.Tensor | None = None  # whether all losses of the step so far are
        self.norm: Any = None  # of the step's gradient, before clipping
        self.losses: list[torch.Tensor | None] = [None, None]  # summed up, of the step and since the last log

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, the trainer's steps are looked at."""
        accelerator = self.trainer.accelerator
        clip: Callable[..., Any] = accelerator.clip_grad_norm_

        def clipped(*values: Any, **options: Any) -> Any:
            self.norm = clip(*values, **options)
            return self.norm

        accelerator.clip_grad_norm_ = clipped
        self.trainer.add_callback(self)
        try:
            yield
        finally:
            del accelerator.clip_grad_norm_  # the method is seen again
            self.trainer.remove_callback(self)

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Take note of the loss of a micro-batch; returns what the Trainer is to add to its mean."""
        finite = loss.detach().isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        if not self.skip:
            return loss
        self.losses[0] = loss.detach() if self.losses[0] is None else self.losses[0] + loss.detach()
        return torch.where(finite, loss, torch.zeros_like(loss))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whether the step that is about to be taken is finite.

        Raises:
            MirageError: it is not, and steps are not to be skipped, or too many were.
        """
        finite = self._agreed(self._of_step())
        self.window[0 if finite else 1] += 1
        if finite:
            self.in_a_row = 0
            if (step := self.losses[0]) is not None:
                before = self.losses[1]
                self.losses[1] = step if before is None else before + step
        else:
            self._left_out()
        self.trainer.step_ends(finite)
        self.finite, self.losses[0] = None, None

    def _of_step(self) -> torch.Tensor:
        """Scalar, whether loss and gradient of this process are finite."""
        norm = self.norm
        if norm is None:  # a trainer that measures it in another way
            norms = [p.grad.detach().float().norm() for p in self.trainer.model.parameters() if p.grad is not None]
            norm = torch.stack([_whole(each) for each in norms]).sum() if norms else 0.0
        self.norm = None
        seen = torch.as_tensor(_whole(norm), device=self.trainer.args.device).isfinite()
        return seen if self.finite is None else seen & self.finite.to(seen.device)

    def _agreed(self, holds: torch.Tensor) -> bool:
        """Whether something holds in all processes."""
        flag = holds.to(torch.int32)
        if self.trainer.args.world_size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def _left_out(self) -> None:
        """The optimiser passes over parameters without a gradient: no weight, moment or count of theirs changes."""
        if not self.skip:
            self._end(f"{self._cause()} is not finite", "; or set train.non_finite to skip such steps")
        self.skipped += 1
        self.in_a_row += 1
        if not self._weights_finite():
            self._end("weights are not finite any more", "")
        if self.in_a_row > MOST_SKIPPED:
            self._end(f"{self._cause()} is not finite, for {self.in_a_row} steps in a row", "")
        self.trainer.model.zero_grad(set_to_none=True)

    def _cause(self) -> str:
        """What of the step is not finite, in any process: a term of the loss, else the gradient."""
        names, parts = list(self.trainer.terms()), list(self.trainer.terms().values())
        for name, part in zip(names, parts, strict=True):
            if not self._agreed(part.isfinite()):
                return name
        if self.finite is not None and not self._agreed(self.finite):
            return "the loss"
        return "the gradient"

    def _end(self, what: str, more: str) -> NoReturn:
        step, rate = self.trainer.state.global_step + 1, self.trainer.lr_scheduler.get_last_lr()[0]
        last = newest_whole(self.output)
        kept = f"the newest checkpoint is {last}" if last is not None else "no checkpoint was saved before"
        message = (
            f"step {step}: {what}, at a learning rate of {rate:.3g}; the run has ended and {kept}. Lower "
            f"train.learning_rate (it is {self.trainer.args.learning_rate:g}) or look at the data of that step{more}"
        )
        raise self._fault(message)

    def _fault(self, message: str) -> MirageError:
        """Of all processes at once, so that the first speaks for all."""
        return (SharedFault if self.trainer.args.world_size > 1 else MirageError)(message)

    # -- weights -----------------------------------------------------------------------------------------------

    def check_weights(self) -> None:
        """Before they are saved.

        Raises:
            MirageError: one of them is not finite, in any process.
        """
        if not self._weights_finite():
            last = newest_whole(self.output)
            kept = f"the newest checkpoint is {last}" if last is not None else "there is no checkpoint before it"
            raise self._fault(
                f"step {self.trainer.state.global_step}: weights are not finite any more, so nothing is saved; {kept}. "
                f"Lower train.learning_rate (it is {self.trainer.args.learning_rate:g})"
            )

    def _weights_finite(self) -> bool:
        trained = (_local(p.detach()) for p in self.trainer.model.parameters() if p.requires_grad)
        return self._agreed(_all_finite(trained, self.trainer.args.device))

    # -- logs --------------------------------------------------------------------------------------------------

    def without_skipped(self, logs: dict[str, Any]) -> None:
        """Make the mean loss since the last log one of the steps that were taken, and say how many were not."""
        if "loss" in logs:
            taken, left_out = self.window
            if left_out:
                sums = self.losses[1]
                total = torch.zeros((), device=self.trainer.args.device) if sums is None else sums.double()
                mean = self.trainer.accelerator.reduce(total, reduction="mean")
                logs["loss"] = float(mean) / taken if taken else None
            self.window, self.losses[1] = [0, 0], None
        if self.skipped:
            logs["skipped"] = self.skipped


def _all_finite(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Scalar, whether all numbers of all tensors are finite."""
    flags = [tensor.isfinite().all().to(device) for tensor in tensors]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(value: Any) -> Any:
    """A number that is shared out among processes, put together."""
    return value.full_tensor() if isinstance(value, DTensor) else value

"""Runs recipes one after the other in every process of a launch; started by test_processes.py.

    processes.py RECIPE JOBS [--shared]

JOBS is a JSON list of `Job`s. With --shared, accelerate is told that the CPU is a card: it does not share weights out
(FSDP) on a CPU by itself, though torch does.
"""

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from accelerate.state import DistributedType, PartialState

from mirage_vlm.cli.main import run as command
from mirage_vlm.errors import MirageError
from mirage_vlm.training import run
from mirage_vlm.training.recipe import load_recipe
from mirage_vlm.training.trainer import LatentTrainer


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        overrides: of the recipe.
        after: a checkpoint to go on from; it is copied into the output folder first.
        killed_in: the last process dies in this step, by a signal that no one hears.
        none_in: in the last process the loss of this step is no number; what every process says of it is written into
            the output folder.
        by_command: run it as `mirage train`, which ends the process.
    """

    overrides: list[str]
    after: str = ""
    killed_in: int = 0
    none_in: int = 0
    by_command: bool = False


def share_out() -> None:
    dist.init_process_group("gloo")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def die_in(step: int) -> None:
    own = LatentTrainer.compute_loss

    def deadly(self, *args, **kwargs):
        found = own(self, *args, **kwargs)
        if self.state.global_step == step - 1 and self.args.process_index == self.args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    LatentTrainer.compute_loss = deadly


def lose_in(step: int) -> None:
    own = LatentTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = own(self, *args, **kwargs)
        here = self.state.global_step == step - 1 and self.args.process_index == self.args.world_size - 1
        return loss * float("nan") if here else loss

    LatentTrainer.compute_loss = poisoned


def do(path: str, job: Job) -> None:
    recipe = load_recipe(path, job.overrides)
    if job.after:
        if dist.get_rank() == 0:
            shutil.copytree(job.after, Path(recipe.output_dir) / Path(job.after).name)
        dist.barrier()
    if job.killed_in:
        die_in(job.killed_in)
    if job.by_command:
        command(["train", path, *job.overrides])
    if not job.none_in:
        run.train(recipe, resume=bool(job.after))
        return
    own = LatentTrainer.compute_loss
    lose_in(job.none_in)
    try:
        run.train(recipe)
    except MirageError as fault:
        Path(recipe.output_dir, f"fault-{dist.get_rank()}").write_text(f"{type(fault).__name__}: {fault}")
    finally:
        LatentTrainer.compute_loss = own


if __name__ == "__main__":
    if "--shared" in sys.argv:
        share_out()
    for values in json.loads(Path(sys.argv[2]).read_text()):
        do(sys.argv[1], Job(**values))

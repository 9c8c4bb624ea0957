"""Collation in worker processes: really there, kept over the epochs, in the same order, and with faults in one line."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import SCRATCH
from torch.utils.data import DataLoader, Dataset

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training import data, run, workers
from mirage_vlm.training.recipe import load_recipe

RECIPE = """\
stage: stage1
output_dir: {folder}/run
model:
  scratch: {scratch}
  latent_size: 3
  pooling: random
  image_scale: 0.4375
  attn: eager
data: [{{task: vsp-planning, levels: [3, 4], n: 16, style: mixed}}]
train: {{epochs: 3, batch_size: 4, learning_rate: 1.0e-3, log_every: 1, save_every: 2, keep: 9}}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, scratch=SCRATCH))
    return lambda *overrides: load_recipe(path, overrides)


def largest_difference(a: Path, b: Path) -> float:
    one, other = (load_file(final / "model.safetensors") for final in (a, b))
    return max((one[name] - other[name]).abs().max().item() for name in one)


class Watched(GeneratedDataset):
    """A source that notes which process made which example; elsewhere than in its own process it may kill that one."""

    def __init__(self, log: Path, deadly: int | None = None):
        super().__init__("vsp-planning", [3, 4], 16, style="mixed")
        self.log, self.deadly, self.home = log, deadly, os.getpid()

    def __getitem__(self, i):
        with self.log.open("a") as file:  # a line this short is written in one piece
            file.write(f"{os.getpid()} {i}\n")
        if i == self.deadly and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_workers_make_the_batches_and_last_for_the_run(recipe, tmp_path, monkeypatch):
    plain = run.train(recipe())
    log = tmp_path / "log"
    monkeypatch.setattr(data, "open_source", lambda *_: Watched(log))
    elsewhere = run.train(recipe("train.workers=2", f"output_dir={tmp_path}/workers"))
    assert largest_difference(plain, elsewhere) == 0, "the same order, whoever prepares it"
    lines = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    made = [line for line in lines if line[0] != os.getpid()]
    assert len({process for process, _ in made}) == 2, "two processes for all three epochs"
    assert sorted(i for _, i in made) == sorted(3 * list(range(16)))
    gone = {process for process, _ in made if Path(f"/proc/{process}").exists()}
    assert not gone, "and they end with the run"


def test_a_resumed_run_with_workers_sees_the_same_order(recipe, tmp_path):
    """It resumes in the middle of the second epoch; targets pooled by chance tell if random numbers went elsewhere."""
    options = ("train.workers=2",)
    whole = run.train(recipe(*options))
    shutil.copytree(tmp_path / "run" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    resumed = run.train(recipe(*options, f"output_dir={tmp_path}/again"), resume=True)
    assert largest_difference(whole, resumed) == 0


def test_a_killed_worker_is_told_in_one_line(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "open_source", lambda *_: Watched(tmp_path / "log", deadly=7))
    with pytest.raises(
        MirageError, match=r"^a process that prepares batches ended: DataLoader worker .* lower"
    ) as caught:
        run.train(recipe("train.workers=1"))
    assert "\n" not in str(caught.value)


class DiesAfterOne(Dataset):
    """A tensor, then the end of the process that is to make the next."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        if i:
            time.sleep(1)  # the tensor before is on its way by then
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3)


@pytest.mark.parametrize("named", [True, False])
def test_a_worker_that_dies_before_its_batch_is_read_is_told_in_one_line(monkeypatch, named):
    """Its connection breaks before torch knows of its death; torch names it later, or never."""
    batches = iter(DataLoader(DiesAfterOne(), batch_size=None, num_workers=1))
    (worker,) = batches._workers
    noticing = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr(worker, "is_alive", lambda: True)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)

    def later(_):
        signal.signal(signal.SIGCHLD, noticing)
        if named:
            signal.raise_signal(signal.SIGCHLD)

    monkeypatch.setattr(time, "sleep", later)
    how = rf"worker \(pid {worker.pid}\) is killed by signal: Killed\. " if named else "worker, connection lost "
    try:
        with (
            pytest.raises(MirageError, match=f"^a process that prepares batches ended: DataLoader {how}"),
            workers.in_one_line(),
        ):
            next(batches)
    finally:
        signal.signal(signal.SIGCHLD, noticing)
    assert not isinstance(noticing, signal.Handlers), "torch has a handler of its own"


def test_a_connection_lost_elsewhere_stays_what_it_is():
    with pytest.raises(ConnectionResetError, match=r"^the logger's$"), workers.in_one_line():
        raise ConnectionResetError("the logger's")

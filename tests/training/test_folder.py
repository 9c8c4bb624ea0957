"""A run's folder: one training at a time, what a resume may change, half checkpoints, full and read-only disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import SCRATCH

from mirage_vlm.errors import MirageError
from mirage_vlm.training import checkpoints, folder, run
from mirage_vlm.training.checkpoints import METRICS_FILE, MetricsFile
from mirage_vlm.training.recipe import load_recipe
from mirage_vlm.training.trainer import LatentTrainer

RECIPE = """\
stage: stage2
output_dir: {folder}/run
model:
  scratch: {scratch}
  latent_size: 3
  image_scale: 0.4375
  attn: eager
data:
  - {{task: vsp-planning, levels: [3], n: 24}}
train: {{learning_rate: 1.0e-3, warmup: 0, log_every: 1, seed: 3, max_steps: 4, batch_size: 4, save_every: 2}}
"""


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, scratch=SCRATCH))
    return path


@pytest.fixture
def start(path):
    """start(*overrides): a run; its final model."""
    return lambda *overrides, **options: run.train(load_recipe(path, overrides), **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run of four steps, to be copied."""
    folder = tmp_path_factory.mktemp("done")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, scratch=SCRATCH))
    return run.train(load_recipe(path)).parent


@pytest.fixture
def stopped(done, tmp_path) -> Path:
    """The same, as if killed after step 2."""
    shutil.copytree(done, tmp_path / "run")
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    return tmp_path / "run"


def refusal(start, *overrides: str, **options) -> str:
    with pytest.raises(MirageError) as caught:
        start(*overrides, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- two of one thing ------------------------------------------------------------------------------------------------

HELD = """
import sys, time
from pathlib import Path
from mirage_vlm.training.folder import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    if len(sys.argv) > 2:
        import os
        if os.fork() == 0:
            time.sleep(float(sys.argv[2]))  # as a process that prepares batches, which notices late
            os._exit(0)
    time.sleep(600)
"""


@pytest.fixture
def holder():
    children = []

    def hold(output: Path, *more: str) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", HELD, str(output), *more],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        return child

    yield hold
    for child in children:
        child.kill()
        child.wait()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_is_refused_by_name(start, stopped, holder, resume, tmp_path):
    child = holder(stopped)
    link = tmp_path / "link"
    link.symlink_to(stopped)
    for output in (stopped, link):
        message = refusal(start, f"output_dir={output}", resume=resume)
        assert message.startswith(f"{output}: another training is writing there (process {child.pid} on ")
        assert "choose another output_dir" in message and socket.gethostname() in message
    before = (stopped / METRICS_FILE).read_text()
    child.kill()
    child.wait()
    start(resume=True)
    assert (stopped / METRICS_FILE).read_text().startswith(before.split('{"step": 3')[0])


def test_the_workers_of_a_killed_run_are_waited_for(tmp_path, holder):
    child = holder(tmp_path / "run", "2")
    child.send_signal(signal.SIGKILL)
    child.wait()
    began = time.monotonic()
    with folder.alone(tmp_path / "run"):  # newer versions of filelock have let go in the worker at once
        assert time.monotonic() - began < folder.WORKERS_LEAVE


def test_a_folder_that_cannot_be_made(start, tmp_path):
    (tmp_path / "file").touch()
    assert "file/run: cannot be written: Not a directory" in refusal(start, f"output_dir={tmp_path}/file/run")


def test_nothing_is_left_of_a_run_that_is_refused(start, tmp_path):
    refusal(start, "stage=sft", f"output_dir={tmp_path}/a/b/c")
    assert not (tmp_path / "a").exists()


# -- resumed with another recipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.max_steps=5"],
        ["train.max_steps=5", "train.log_every=2", "train.save_every=1", "train.keep=1"],
        ["train.non_finite=skip", "train.workers=1", "train.keep_examples=1", "train.gradient_checkpointing=true"],
        ["train.epochs=9"],
        ["model.attn=sdpa"],
    ],
)
def test_what_may_change(start, stopped, overrides):
    assert start(*overrides, resume=True).exists()
    assert not list(stopped.glob("recipe-until-*"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["stage=stage1"], 'stage is "stage1", was "stage2"'),
        (["train.learning_rate=1e-4"], "train.learning_rate is 0.0001, was 0.001"),
        (["train.seed=4", "train.beta2=0.9"], "train.seed is 4, was 3"),
        (["train.batch_size=2"], "train.batch_size is 2, was 4"),
        (["train.batch_size=2", "train.accumulate=2"], "train.accumulate is 2, was 1"),
        (["train.max_steps=3"], "train.max_steps is 3, was 4"),
        (["train.max_steps=-1"], "train.max_steps is -1, was 4"),
        (["data=[{task: vsp-planning, levels: [3], n: 20}]"], "data[0].n is 20, was 24"),
        (["data=[{task: vsp-planning, n: 20}, {task: geometry}]"], "data is [{"),
        (["loss.ce=0.2"], "loss.ce is 0.2, was 0.1"),
        (["model.latent_size=2"], "model.latent_size is 2, was 3"),
    ],
)
def test_what_asks_for_force(start, stopped, overrides, told):
    message = refusal(start, *overrides, resume=True)
    assert message.startswith(f"{stopped}/checkpoint-2: the recipe has changed (")
    assert told in message and "--force" in message
    assert json.loads((stopped / "recipe.json").read_text())["train"]["seed"] == 3, "nothing is written"


def test_forced(start, stopped):
    assert start("train.learning_rate=1e-4", resume=True, force=True).exists()
    assert json.loads((stopped / "recipe-until-2.json").read_text())["train"]["learning_rate"] == 1e-3
    assert json.loads((stopped / "final" / "recipe.json").read_text())["train"]["learning_rate"] == 1e-4


def test_the_same_batch_in_other_parts(start, tmp_path):
    start("train.bucket=false", "train.max_steps=2")
    start("train.bucket=false", "train.batch_size=2", "train.accumulate=2", resume=True)
    message = refusal(start, "train.bucket=false", "train.batch_size=2", "train.accumulate=4", resume=True)
    assert "train.accumulate is 4, was 2" in message


def test_adapters_added_or_removed(start, stopped, tmp_path):
    for force in (False, True):
        message = refusal(start, "model.lora.rank=2", resume=True, force=force)
        assert "checkpoint-2: was trained with no LoRA and the recipe has it (model.lora)" in message
    output = f"output_dir={tmp_path}/lora"
    start("model.lora.rank=2", "train.max_steps=2", output)
    assert "was trained with LoRA and the recipe has none" in refusal(start, output, resume=True, force=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.scratch.width=64", "model.scratch.mlp=32"],
        ["model.scratch.layers=1"],
        ["model.feedback=linear"],
        ["model.freeze_vision=false"],
        ["model.scratch.vocab_size=300"],
    ],
)
def test_another_model_in_one_line(start, stopped, overrides):
    assert "model." in refusal(start, *overrides, resume=True)
    message = refusal(start, *overrides, resume=True, force=True)
    assert message.startswith(f"{stopped}/checkpoint-2: its ") and "of another model than the recipe's" in message


@pytest.mark.parametrize("change", ["model.lora.rank=4", "model.lora.modules=[q_proj]", "model.lora.modules=[up_proj]"])
def test_other_adapters_in_one_line(start, tmp_path, change):
    lora = ("model.lora.rank=2", "model.lora.modules=[q_proj, v_proj]")
    start(*lora, "train.max_steps=2")
    assert "its weights cannot be taken" in refusal(start, *lora, change, resume=True, force=True)


# -- half checkpoints ------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_a_half_checkpoint_is_not_gone_on_from(done, start, tmp_path, name, how):
    shutil.copytree(done, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-4" / name
    {"missing": Path.unlink, "empty": lambda path: path.write_bytes(b""), "cut": cut}[how](file)
    if how == "cut" and name.endswith(".pt"):  # what torch wrote shows its faults when it is read
        message = refusal(start, "train.max_steps=6", resume=True)
        assert "checkpoint-4: its " in message and "damaged" in message
        return
    assert folder.newest_whole(tmp_path / "run").name == "checkpoint-2"
    recipe = load_recipe(tmp_path / "recipe.yaml", [])
    assert folder.newest_checkpoint(recipe, True) == str(tmp_path / "run" / "checkpoint-2")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert "checkpoint-4: is not whole (" in refusal(start, resume=True)


def test_what_a_kill_left_of_an_old_checkpoint_goes(start, stopped):
    (stopped / ".checkpoint-1.old").mkdir()
    start(resume=True)
    assert not (stopped / ".checkpoint-1.old").exists()


def test_folders_that_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").touch()
    assert [path.name for path in folder.checkpoints_of(tmp_path)] == ["checkpoint-2"]


def test_a_damaged_line_of_metrics(start, stopped):
    (stopped / METRICS_FILE).write_text('{"step": 1}\nnot JSON\n')
    assert "metrics.jsonl: cannot be read or is damaged" in refusal(start, resume=True)


# -- disks -----------------------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


def failing(fault: Exception, after: int):
    """A writer that fails from its n-th call on."""
    calls = iter(range(1000))

    def wrap(own):
        def writer(*args, **kwargs):
            if next(calls) >= after:
                raise fault
            return own(*args, **kwargs)

        return writer

    return wrap


@pytest.mark.parametrize("fault", [FULL, READ_ONLY, RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_disk_that_fills_up_in_a_checkpoint(start, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(torch, "save", failing(fault, 3)(torch.save))  # three files of the first checkpoint
    message = refusal(start)
    assert message.startswith(f"{tmp_path}/run: cannot write checkpoint-4: ")
    assert "checkpoint-2 is whole, and --resume goes on from it" in message
    monkeypatch.undo()
    output = tmp_path / "run"
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (output / "incomplete").exists() and not (output / "final").exists()
    assert start(resume=True).exists()


@pytest.mark.parametrize("name", ["write_files", "save_pretrained"])
def test_a_disk_that_fills_up_in_weights(start, tmp_path, monkeypatch, name):
    own = getattr(checkpoints.LatentVLM, name)
    monkeypatch.setattr(checkpoints.LatentVLM, name, failing(FULL, 1 if name == "write_files" else 0)(own))
    message = refusal(start)
    what = "checkpoint-4" if name == "write_files" else "the final model"
    assert f"run: cannot write {what}: No space left on device" in message
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name[0] not in ".mr") == (
        ["checkpoint-2"] if name == "write_files" else ["checkpoint-2", "checkpoint-4"]
    )


def test_a_disk_that_fills_up_in_the_metrics(start, tmp_path, monkeypatch):
    own = Path.open

    def full(self, mode="r", *args, **kwargs):
        if self.name == METRICS_FILE and mode == "a":
            raise FULL
        return own(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    assert f"{tmp_path}/run: cannot write the metrics: No space left on device" in refusal(start)


def test_a_disk_that_fills_up_at_the_start(start, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(FULL, 0)(os.fsync))
    assert f"cannot write {tmp_path}/run/recipe.json: " in refusal(start)
    assert not list((tmp_path / "run").glob("recipe*"))


def test_a_fault_of_another_kind_is_told_as_it_is(start, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(LatentTrainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="something else"):
        start()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_small_disk(start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        message = refusal(start, f"output_dir={disk}/run", "train.keep=9", "train.save_every=1", "train.max_steps=9")
        assert message.startswith(f"{disk}/run: cannot write ") and "--resume goes on from it" in message
        whole = folder.checkpoints_of(disk / "run")
        assert whole and all(folder.lacking(path) is None for path in whole)
        assert all(bool(t.isfinite().all()) for t in load_file(whole[-1] / "model.safetensors").values())
        assert not (disk / "run" / "final").exists()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)  # files of the fault may be open still


def test_the_metrics_are_json(tmp_path):
    file = MetricsFile(tmp_path / METRICS_FILE, 5)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    file.on_log(None, state, None, {"loss": float("nan"), "kl": float("inf"), "ce": 1.0})
    line = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["kl"], line["ce"]) == (None, None, 1.0)

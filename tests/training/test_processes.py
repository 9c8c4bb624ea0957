"""Several processes against one: the same losses, metrics and weights, by whatever launcher and however shared out.

A launch costs more than what is tried in it, so each does several runs (`processes.py`), and every test looks at one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from processes import Job
from safetensors.torch import load_file, save_file
from support import batch_of, dialogue, ragged

from mirage_vlm.cli.train import _check_launch
from mirage_vlm.formats import write_jsonl
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.decoder import checkpoint_activations
from mirage_vlm.training import run
from mirage_vlm.training.checkpoints import METRICS_FILE, TRAINABLE_FILE
from mirage_vlm.training.data import BucketSampler, Collator
from mirage_vlm.training.in_step import Needs, counted, make_up, needs_of
from mirage_vlm.training.losses import stage1, stage2
from mirage_vlm.training.recipe import load_recipe
from mirage_vlm.training.rollout import Batch
from mirage_vlm.training.shares import ShareCollator, Shares

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
WORKER = Path(__file__).with_name("processes.py")
BIN = Path(sys.executable).parent

# 33 examples leave one over for the fifth step of 8: a process has nothing there. Pictures and spans are everywhere
# in some batches of two, and nowhere in others.
RECIPE = """\
stage: stage2
output_dir: {folder}/run
model: {{path: {folder}/base, attn: eager}}
data: [{{path: {folder}/train.jsonl}}]
train: {{learning_rate: 1.0e-3, weight_decay: 0.01, warmup: 2, max_steps: 5, log_every: 1, save_every: 9, seed: 3,
         bucket: false}}
"""
WHOLE, HALF, QUARTER = "train.batch_size=8", "train.batch_size=4", ("train.batch_size=2", "train.accumulate=2")
STAGES = ("stage1", "stage2")
STAGE1, TIED, BUCKETS = "stage=stage1", "model.path={folder}/tied", "train.bucket=true"
CHECKPOINTED, PARALLEL = "train.gradient_checkpointing=true", "train.latent_iterations=2"
TRAINED = ("model.freeze_vision=false", "model.feedback=linear")
LORA = ("model.lora.rank=2", "model.lora.modules=[q_proj, down_proj]", "train.learning_rate=1e-2")
FITTED = (STAGE1, *LORA, "model.feedback=rescaled")  # which has a number of this run's data
SAVED = "train.save_every=3"
LONG = ("train.max_steps=9", "train.save_every=6")  # checkpoint-6 is in the middle of the second epoch

# what one process does, and what two do in its place: each with a copy of the model (DDP), or with a share (FSDP2)
ALONE = {
    "stage1": (STAGE1, WHOLE),
    "stage2": (WHOLE,),
    "trained": (*TRAINED, WHOLE),
    "lora": (*LORA, WHOLE),
    "fitted": (*FITTED, WHOLE),
    "tied": (TIED, WHOLE),
    "parallel": (PARALLEL, WHOLE),
    "buckets": (BUCKETS, HALF, "train.accumulate=2"),
    "long": (*LONG, WHOLE),
}
COPIES = {
    "stage1": (STAGE1, HALF),
    "stage1-accumulated": (STAGE1, *QUARTER),
    "stage1-packed": (STAGE1, HALF, "train.pack=150", "train.feature_cache={folder}/features"),
    "stage2": (HALF,),
    "stage2-accumulated": QUARTER,
    "stage2-checkpointed": (HALF, CHECKPOINTED),
    "trained-accumulated": (*TRAINED, *QUARTER),
    "lora": (*LORA, HALF),
    "buckets": (BUCKETS, HALF),
    "long": (*LONG, HALF),
}
SHARES = {
    "stage1-checkpointed": (STAGE1, HALF, CHECKPOINTED),
    "stage2": (HALF, SAVED),
    "stage2-accumulated": (*QUARTER, CHECKPOINTED),
    "trained-accumulated": (*TRAINED, *QUARTER),
    "lora": (*LORA, HALF, SAVED),
    "fitted": (*FITTED, HALF, SAVED),
    "tied": (TIED, HALF),
    "parallel-accumulated": (PARALLEL, *QUARTER),
}
LOST = {  # a loss of the last process is no number in step 3
    "stopped": (HALF, "train.save_every=2", "train.keep=1"),
    "skipped": (*QUARTER, "train.non_finite=skip"),
}
RESUMED = ("stage2", "lora", "fitted")  # of those with shares, each once more from its own checkpoint-3


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """The recipe, its data, and `tiny` as a checkpoint: once as it is, once with its embeddings for a head."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    plain = [dialogue(["Go"], [f"right, then {word}"]) for word in ("up", "down", "left")]
    (folder / "pictures").mkdir()
    write_jsonl(
        folder / "train.jsonl", [*ragged(), *plain, *ragged(), *plain, *ragged(), *plain, *ragged(), *plain[:1]]
    )
    tiny.save_pretrained(folder / "base")
    tiny.save_pretrained(folder / "tied")
    config = json.loads((folder / "tied" / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "tied" / "config.json").write_text(json.dumps(config))
    tables = load_file(folder / "tied" / "model.safetensors")
    del tables["lm_head.weight"]
    save_file(tables, folder / "tied" / "model.safetensors", metadata={"format": "pt"})
    return folder


def overrides(folder: Path, kind: str, name: str, wanted: tuple[str, ...]) -> list[str]:
    return [*(value.format(folder=folder) for value in wanted), f"output_dir={folder}/{kind}/{name}"]


@pytest.fixture(scope="module")
def alone(folder):
    """alone(name): the output folder of one process's run; each is done once, when it is asked for."""

    def done(name: str) -> Path:
        if not (output := folder / "alone" / name).exists():
            run.train(load_recipe(folder / "recipe.yaml", overrides(folder, "alone", name, ALONE[name])))
        return output

    return done


def start(*command: object, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for a launcher; one that hangs is killed, with all that it started, and fails the test."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def two(config: str, *command: object, cwd: Path) -> subprocess.CompletedProcess:
    """Two processes by `accelerate launch`."""
    launcher = ("accelerate.commands.launch", "--config_file", CONFIGS / config, "--num_processes", "2")
    return finish(start(*launcher, *command, cwd=cwd))


def write_jobs(path: Path, jobs: list[Job]) -> Path:
    path.write_text(json.dumps([asdict(job) for job in jobs]))
    return path


@pytest.fixture(scope="module")
def copies(folder) -> subprocess.CompletedProcess:
    """Two processes with a copy each; in the end one of them is killed, and the other has to end too."""
    jobs = [Job(overrides(folder, "copies", name, wanted)) for name, wanted in COPIES.items()]
    resumed = overrides(folder, "copies", "long-resumed", COPIES["long"])
    jobs.append(Job(resumed, after=f"{folder}/copies/long/checkpoint-6"))
    jobs += [Job(overrides(folder, "copies", name, wanted), none_in=3) for name, wanted in LOST.items()]
    jobs.append(Job(overrides(folder, "copies", "killed", COPIES["long"]), killed_in=8))
    return two("cpu-2.yaml", WORKER, "recipe.yaml", write_jobs(folder / "copies.json", jobs), cwd=folder)


@pytest.fixture(scope="module")
def shares(folder) -> subprocess.CompletedProcess:
    """Two processes with a share of the weights each; in the end one of them meets a broken example."""
    jobs = [Job(overrides(folder, "shares", name, wanted)) for name, wanted in SHARES.items()]
    for name in RESUMED:
        values = overrides(folder, "shares", f"{name}-resumed", SHARES[name])
        jobs.append(Job(values, after=f"{folder}/shares/{name}/checkpoint-3"))
    jobs += [Job(overrides(folder, "shares", name, wanted), none_in=3) for name, wanted in LOST.items()]
    write_jsonl(folder / "broken.jsonl", [dialogue([text], ["up"]) for text in [*["Go"] * 7, "left " * 600]])
    broken = ("stage=sft", "data=[{{path: {folder}/broken.jsonl}}]", "train.batch_size=1", "train.workers=1")
    jobs.append(Job(overrides(folder, "shares", "broken", broken), by_command=True))
    return two("fsdp2-8.yaml", WORKER, "recipe.yaml", write_jobs(folder / "shares.json", jobs), "--shared", cwd=folder)


def metrics(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def assert_same(found: Path, expected: Path, first: int = 1) -> None:
    """The same metrics from step `first` on, and the same final weights."""
    ours, theirs = metrics(found), [line for line in metrics(expected) if line["step"] >= first]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in ("tokens", "latents"):
            assert one[key] == other[key] > 0
        for key in one.keys() & {"loss", "ce", "align", "token_accuracy"}:
            assert one[key] == pytest.approx(other[key], abs=1e-5), f"{key} of step {one['step']}"
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    one, other = (load_file(output / "final" / "model.safetensors") for output in (found, expected))
    assert one.keys() == other.keys()
    for name in one:
        # another order of sums, which Adam makes larger; a wrong gradient moves a weight by 1e-3 to 1e-2 a step
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert LatentVLM.from_pretrained(found / "final").config.latent_size == 3


@pytest.mark.parametrize("name", COPIES)
def test_two_copies_are_as_one_process(folder, copies, alone, name):
    assert (folder / "copies" / name / "final").exists(), copies.stderr[-5000:]
    assert_same(folder / "copies" / name, alone(name.split("-")[0]))


@pytest.mark.parametrize("name", SHARES)
def test_two_shares_are_as_one_process(folder, shares, alone, name):
    assert (folder / "shares" / name / "final").exists(), shares.stderr[-5000:]
    assert_same(folder / "shares" / name, alone(name.split("-")[0]))


@pytest.mark.parametrize("name", RESUMED)
def test_shares_resume(folder, shares, alone, name):
    assert (folder / "shares" / f"{name}-resumed" / "final").exists(), shares.stderr[-5000:]
    assert_same(folder / "shares" / f"{name}-resumed", alone(name), first=4)


def test_a_checkpoint_of_shares_is_a_whole_model(folder, shares):
    checkpoint = folder / "shares" / "stage2" / "checkpoint-5"
    last, final = (load_file(path / "model.safetensors") for path in (checkpoint, checkpoint.parent / "final"))
    assert last.keys() == final.keys()
    assert all(torch.equal(last[name], final[name]) for name in last)
    assert LatentVLM.from_pretrained(checkpoint).config.latent_size == 3
    adapters, fitted = (
        load_file(folder / "shares" / name / "checkpoint-3" / TRAINABLE_FILE) for name in ("lora", "fitted")
    )
    assert adapters and all("lora_" in name or "trainable_tokens" in name for name in adapters)
    assert fitted.keys() - adapters.keys() == {"feedback.size"}


def test_copies_resume(folder, copies, alone):
    """The order of the second epoch has to come back."""
    assert (folder / "copies" / "long-resumed" / "final").exists(), copies.stderr[-5000:]
    assert_same(folder / "copies" / "long-resumed", alone("long"), first=7)


def test_the_death_of_one_process_ends_all(folder, copies):
    assert copies.returncode != 0
    output = folder / "copies" / "killed"
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (output / "final").exists()


@pytest.mark.parametrize("kind", ["copies", "shares"])
def test_a_loss_of_one_process_that_is_no_number_is_one_of_all(folder, request, kind):
    done = request.getfixturevalue(kind)
    output = folder / kind / "stopped"
    said = [(output / f"fault-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1], done.stderr[-5000:]
    assert said[0].startswith("SharedFault: step 3: the loss is not finite") and "checkpoint-2" in said[0]
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"] and not (output / "final").exists()
    skipped = metrics(folder / kind / "skipped")
    assert [line.get("skipped") for line in skipped] == [None, None, 1, 1, 1]
    assert skipped[2]["loss"] is None and skipped[3]["loss"] > 0
    final = load_file(folder / kind / "skipped" / "final" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in final.values())


@pytest.mark.slow
def test_a_killed_run_resumes_by_the_command(folder, copies, alone):
    """And under another launcher."""
    values = overrides(folder, "copies", "killed", COPIES["long"])
    command = ("-m", "mirage_vlm.cli.main", "train", "recipe.yaml", *values, "--resume")
    done = finish(start("torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command, cwd=folder))
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("the model is in") == 1, "one process speaks for all"
    assert_same(folder / "copies" / "killed", alone("long"))


@pytest.mark.slow
def test_two_machines(folder, alone):
    """Two launchers that find one another, each with two processes; every process holds a quarter of the weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [Job(overrides(folder, "machines", stage, (f"stage={stage}", "train.batch_size=2"))) for stage in STAGES]
    path = write_jobs(folder / "machines.json", jobs)
    where = ("--num_processes", "4", "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank")
    command = ("accelerate.commands.launch", "--config_file", CONFIGS / "fsdp2-multi-node.yaml", *where)
    both = [start(*command, rank, WORKER, "recipe.yaml", path, "--shared", cwd=folder) for rank in (0, 1)]
    for machine in [finish(process) for process in both]:
        assert machine.returncode == 0, machine.stderr[-5000:]
    for stage in STAGES:
        assert_same(folder / "machines" / stage, alone(stage))


def test_what_one_process_cannot_read_ends_all_with_one_line(shares):
    assert shares.returncode != 0
    assert shares.stderr.count("broken.jsonl:8: messages: a prompt has") == 1, shares.stderr[-5000:]
    ours = shares.stderr[: shares.stderr.index("torch/distributed/elastic")]  # then the launcher says its own
    assert "Traceback" not in ours


# -- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 33])
@pytest.mark.parametrize("bucket", [False, True])
def test_every_way_to_make_a_step_takes_the_same_examples(count, bucket):
    """8 examples a step; with bucketing the batch stays and only processes and accumulation change."""

    def joined(lists) -> list[int]:
        return list(chain.from_iterable(lists))

    def steps(processes: int, batch: int, accumulate: int) -> list[list[int]]:
        order = BucketSampler([i % 5 for i in range(count)], batch, seed=1, bucket=bucket)
        dealt = [list(Shares(order, batch, rank, processes, lambda: 3)) for rank in range(processes)]
        assert {len(rounds) for rounds in dealt} == {len(Shares(order, batch, 0, processes, int))}
        rounds = [joined(parts) for parts in zip(*dealt, strict=True)]
        return [sorted(joined(rounds[i : i + accumulate])) for i in range(0, len(rounds), accumulate)]

    ways = [(1, 4, 2), (2, 4, 1)] if bucket else [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)]
    first, *others = [steps(*way) for way in ways]
    assert all(other == first for other in others)
    assert sorted(joined(first)) == list(range(count)), "each once"


def test_shares_ask_for_the_epoch():
    order = BucketSampler([0] * 20, 4, seed=1, bucket=False)
    epoch = [0]
    shares = Shares(order, 4, 1, 2, lambda: epoch[0])
    first = list(shares)
    assert first == list(shares)
    epoch[0] = 1
    assert first != list(shares)


@pytest.mark.parametrize("stage", [stage1, stage2])
def test_an_empty_share_adds_nothing(fresh, stage):
    """Nor does it leave a parameter of the decoder without a gradient."""
    batch = ShareCollator(Collator(fresh.encoder, targets=True))([])
    found = stage(fresh, Batch(**batch))
    assert (found.ce_sum, found.align_sum, found.tokens, found.latents, found.correct) == (0, 0, 0, 0, 0)
    found.ce_sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in fresh.language_model.parameters())


@pytest.mark.parametrize("values", [("stage=stage1",), ("stage=stage2",), ("stage=stage2", PARALLEL)], ids=str)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0], [1], [2, 3], [1, 2]], ids=str)
def test_a_batch_takes_what_was_said(tiny, folder, values, rows):
    recipe = load_recipe(folder / "recipe.yaml", values)
    batch = batch_of(tiny, [ragged()[i] for i in rows])
    tensors = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
    needs = needs_of(tensors, recipe, tiny.config.pad_id)
    with torch.no_grad(), counted(tiny.language_model) as calls:
        if recipe.stage == "stage1":
            stage1(tiny, batch)
        else:
            stage2(tiny, batch, latent_iterations=recipe.train.latent_iterations)
    assert calls == [needs.passes]
    assert needs.vision == (batch.pixel_values is not None)
    assert needs.feedback == (rows != [1]), "both stages read it, where there is a span"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_made_up_adds_nothing(fresh, checkpointing):
    if checkpointing:
        fresh.train()
        checkpoint_activations(fresh.model)
    with counted(fresh.language_model) as calls:
        zero = make_up(fresh, 2, Needs(2, 0, 1), Needs(6, 1, 1))
    assert calls == [4] and zero == 0
    zero.backward()
    for module in (fresh.language_model, fresh.vision_tower):
        assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    with pytest.raises(RuntimeError, match="took 7 passes through the decoder, 6 were agreed on"):
        make_up(fresh, 7, Needs(2, 0, 0), Needs(6, 0, 0))


def test_a_launch_that_starts_one_process_only_is_told(monkeypatch, capsys):
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    _check_launch()
    assert not capsys.readouterr().err
    monkeypatch.setenv("MASTER_PORT", "29500")
    _check_launch()
    assert capsys.readouterr().err.startswith("warning: this is one process; accelerate launch --cpu starts no more")
    monkeypatch.setenv("WORLD_SIZE", "2")
    _check_launch()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_are_accelerates(tiny, path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= config.num_machines
    if config.fsdp_config:
        layers = {type(module).__name__ for module in tiny.modules()}
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in layers
        assert config.fsdp_config["fsdp_version"] == 2

"""What a run says before its first step and at each log."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from support import SCRATCH

from mirage_vlm.cli.main import run as command
from mirage_vlm.errors import MirageError
from mirage_vlm.training import run
from mirage_vlm.training.recipe import RewardRecipe, RLRecipe, load_recipe
from mirage_vlm.training.telling import Plan, Teller, duration, fitted, losses_line, number, rewards_line

RECIPE = """\
stage: stage1
output_dir: {folder}/run
model: {{scratch: {scratch}, latent_size: 3, image_scale: 0.4375, attn: eager}}
data:
  - {{task: vsp-planning, levels: [3], n: 12, repeat: 2}}
  - {{task: vsp-perception, levels: [3], n: 8}}
train: {{warmup: 0, log_every: 2, max_steps: 4, batch_size: 2, accumulate: 2, save_every: 3}}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, scratch=SCRATCH))
    return path


def test_a_run_says_what_it_does(path, tmp_path, capsys):
    run.train(load_recipe(path), device="cpu")
    lines = capsys.readouterr().out.splitlines()
    said = dict(line.split(maxsplit=1) for line in lines[:7])
    assert said["stage"] == "stage1: the targets in the place of latents"
    assert said["device"].startswith("cpu (") and said["device"].endswith("float32")
    assert re.fullmatch(r"from scratch, 1\d\d,\d{3} parameters, \d\d,\d{3} of them trained", said["model"])
    assert said["data"] == "32 examples: 12 x 2 of vsp-planning; 8 of vsp-perception"
    assert said["steps"] == "4 (0.5 epochs), each of 4 examples = 2 x 2 accumulated"
    assert said["latents"] == "k 3, pooling average, feedback identity"
    assert said["writes"] == f"{tmp_path}/run: metrics.jsonl, a checkpoint every 3 steps, final"
    logs = [line for line in lines if line.startswith("step ")]
    assert [line.split("  ")[0] for line in logs] == ["step 1/4", "step 2/4", "step 4/4"]
    form = r"step 2/4  loss [\d.]+  ce [\d.]+  align [\d.]+  acc [\d.]+  grad [\d.]+  lr [\d.e+-]+  \S+ s/step  .* left"
    assert re.fullmatch(form, logs[1]), logs[1]
    assert logs[2].endswith("done") and lines[-1].startswith("4 steps in ")
    assert not any("{" in line for line in lines), "no dictionaries"

    run.train(load_recipe(path, ["train.max_steps=6", "train.warmup=9"]), resume=True, force=True)
    lines = capsys.readouterr().out.splitlines()
    assert "resumed  from step 4" in lines
    assert any(line.startswith("note: warmup takes 9 of 6 steps") for line in lines)


def test_data_without_spans_is_told(path, capsys):
    run.train(load_recipe(path, ["data=[{task: vsp-perception, levels: [3], n: 8}]", "train.max_steps=1"]))
    assert "note: no example has a latent span, so stage1 trains on text alone" in capsys.readouterr().out


def test_a_loss_that_grows_is_told(path, capsys):
    run.train(load_recipe(path, ["train.learning_rate=3", "train.max_steps=8"]))
    assert re.search(
        r"note: the loss grew from \S+ to \S+; look at train.learning_rate \(it is 3\)", capsys.readouterr().out
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:0", "tpu", ""])
def test_a_device_that_there_is_not(path, tmp_path, capsys, device):
    with pytest.raises(SystemExit) as end:
        command(["train", str(path), "--device", device])
    assert end.value.code == 2
    assert f"error: --device: '{device}' is not one of cpu, cuda" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_cuda(path):
    with pytest.raises(MirageError, match="--device: torch finds no CUDA device here"):
        run.train(load_recipe(path), device="cuda")


def test_force_goes_with_resume(path, capsys):
    with pytest.raises(SystemExit):
        command(["train", str(path), "--force"])
    assert "give it together with --resume" in capsys.readouterr().err


def test_only_the_first_process_speaks(path, capsys):
    teller = Teller(Plan(load_recipe(path), 1, 1, (), 1, ""))
    state = SimpleNamespace(is_world_process_zero=False, global_step=0, max_steps=9, log_history=[])
    for event in (teller.on_train_begin, teller.on_step_end, teller.on_train_end):
        event(None, state, None)
    teller.on_log(None, state, None, {"loss": 1.0})
    assert not capsys.readouterr().out


def test_an_estimate_before_the_first_long_wait(path, capsys):
    teller = Teller(Plan(load_recipe(path), 1, 1, (), 1, ""))
    args = SimpleNamespace(logging_steps=50, world_size=1, device=torch.device("cpu"))
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=100, log_history=[])
    teller.on_train_begin(args, state, None)
    capsys.readouterr()
    teller.began = teller.warm = teller.began - 30
    for state.global_step in (1, 2, 3, 4):
        if state.global_step == 3:
            teller.warm -= 20  # two steps
        teller.on_step_end(args, state, None)
    assert capsys.readouterr().out == "about 16 min 10 s to go\n"


GRPO = {
    "loss": 0.01,
    "grad_norm": 0.3121,
    "learning_rate": 1e-5,
    "reward": 0.4123,
    "reward_std": 0.1,
    "rewards/accuracy/mean": 0.4,
    "rewards/accuracy/std": 0.1,
    "rewards/mine:format_of_answers/mean": 0.52,
    "latent_rate": 0.95,
    "kl": 0.00001234,
    "completions/mean_length": 87.25,
    "completions/max_length": 120.0,
    "clip_ratio/region_mean": 0.0,
} | {f"other/{i}": 0.0 for i in range(32)}


def test_grpo_says_what_counts_on_one_line():
    line = fitted("step 3/100", [*rewards_line(GRPO), "12.3 s/step", "20 min 00 s left"])
    assert len(line) <= 120 and line.startswith("step 3/100  reward 0.4123 (accuracy 0.4 format_of_answers 0.52)")
    assert line.endswith("12.3 s/step  20 min 00 s left") and "kl 1.2e-05" in line


def test_many_rewards_are_cut():
    logs = {f"rewards/{'x' * 30}{i}/mean": 0.5 for i in range(9)} | {"reward": 1.0}
    assert len(fitted("step 1/1", rewards_line(logs))) == 120


def test_what_is_no_number_is_said():
    line = losses_line(
        {"loss": float("nan"), "ce": None, "grad_norm": float("inf"), "learning_rate": 0.1, "skipped": 2}
    )
    assert line == ["loss not finite", "ce -", "grad not finite", "lr 0.1", "skipped 2"]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (1.23456, "1.235"), (0.00005, "5.0e-05"), (12345.6, "1.235e+04"), (True, "1")]
)
def test_numbers(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (1e7, "2,777 h 46 min")],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_the_plan_of_grpo(path):
    recipe = load_recipe(path)
    recipe = type(recipe)(
        "grpo",
        "runs/x",
        recipe.model,
        recipe.data,
        train=recipe.train,
        rl=RLRecipe(rewards=(RewardRecipe("accuracy", 0.9), RewardRecipe("boxed"))),
    )
    args = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    lines = Plan(recipe, 3_754_600_000, 1_500_000, ("12 of vsp-planning",) * 6, 72, "k 3").lines(args, 10)
    assert "model    from scratch, 3.75 B parameters, 1.5 M of them trained" in lines
    assert "steps    10, each of 8 responses = 2 x 2 accumulated x 2 processes" in lines
    assert "rewards  0.9 x accuracy, 1 x boxed; 5 responses a prompt, KL 0.01" in lines
    assert lines[3].endswith("; and 2 more")

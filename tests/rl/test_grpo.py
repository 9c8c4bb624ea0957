"""Whole runs of GRPO: what they write, that they resume, share out and adapt, and what they refuse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mirage_vlm.cli.main import run as command
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.rl.run import open_examples, run_recipe
from mirage_vlm.rl.trainer import LatentGRPO
from mirage_vlm.training.recipe import load_recipe

RECIPE = """\
stage: grpo
output_dir: {folder}/run
model: {{path: {model}, attn: eager}}
data: [{{task: vsp-planning, levels: [3], n: 12, seed: 1, style: direct}}]
rl:
  n: 4
  temperature: 1.0
  max_new_tokens: 30
  kl: 0.1
  rewards: [{{name: "test_grpo:letters", weight: 0.5}}, {{name: thought}}]
train:
  {{max_steps: 3, batch_size: 8, learning_rate: 1.0e-3, log_every: 1, save_every: 2, scheduler: constant, warmup: 0}}
"""


def letters(trajectories):
    """A reward that differs among responses of any model."""
    return [sum(letter in "aeiou" for letter in each.text) / 10 for each in trajectories]


def rising(trajectories):
    return [float(i) for i in range(len(trajectories))]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    tiny.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def grpo(folder, tmp_path):
    """A run of the recipe with overrides: its recipe and its folder."""

    def start(name: str = "run", *overrides: str, resume: bool = False) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(folder=tmp_path, model=folder / "model"))
        recipe = load_recipe(path, [f"output_dir={tmp_path / name}", *overrides])
        return run_recipe(recipe, resume=resume)

    return start


def metrics(final: Path) -> list[dict]:
    return [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text().splitlines()]


def weights(final: Path) -> dict[str, torch.Tensor]:
    return load_file(final / "model.safetensors")


def apart(one: Path, other: Path) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(weights(one).values(), weights(other).values(), strict=True))


@pytest.mark.parametrize("latents", ["replay", "reroll", "gaussian"])
def test_a_run_and_its_metrics(grpo, folder, latents):
    noise = ["rl.latent_noise=0.1"] if latents == "gaussian" else []
    final = grpo("run", f"rl.latents={latents}", *noise)
    lines = metrics(final)
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    for line in lines[:3]:
        assert line["rollout_logprob_max_abs_diff"] < 1e-4
        assert 0 <= line["latent_rate"] <= 1 and (line["latents"] > 0) == (line["latent_norm"] > 0)
        assert line["rewards/thought/mean"] == pytest.approx(line["latent_rate"])
        parts = 0.5 * line["rewards/test_grpo:letters/mean"] + line["rewards/thought/mean"]
        assert line["reward"] == pytest.approx(parts, abs=1e-6)
        if latents == "gaussian":
            assert line["text_entropy"] > line["entropy"] - 1e-5
        else:
            assert line["text_entropy"] == pytest.approx(line["entropy"], rel=1e-5)
        for name in ("kl", "entropy", "frac_reward_zero_std", "clip_ratio/region_mean", "rollout_tokens_per_second"):
            assert name in line
        assert line["rollout_seconds"] > 0 and line["train_seconds"] > 0
        assert line["group_std"] >= 0 and line["groups_without_signal"] in (0, 0.5, 1)  # of two groups
        assert (line["group_std"] > 0) == (line["groups_without_signal"] < 1)
    assert sum(line["latent_rate"] for line in lines[:3]) > 0
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[2]["kl"] > 1e-6
    assert lines[-1]["examples"] == 12
    LatentVLM.from_pretrained(final)
    before = load_file(folder / "model" / "model.safetensors")
    moved = [name for name, tensor in weights(final).items() if not torch.equal(tensor, before[name])]
    assert moved and not any("visual" in name for name in moved)
    assert not (final.parent / "README.md").exists()


def test_a_stopped_run_goes_on_to_the_same_weights(grpo):
    whole = grpo("whole", "train.max_steps=4")
    grpo("cut", "train.max_steps=2")
    with pytest.raises(MirageError, match="holds checkpoints of an earlier run"):
        grpo("cut", "train.max_steps=4")
    cut = grpo("cut", "train.max_steps=4", resume=True)
    assert apart(whole, cut) < 1e-7
    timed = ("seconds", "runtime", "per_second", "step_time")
    for one, other in zip(metrics(whole)[:4], metrics(cut)[:2] + metrics(cut)[-3:-1], strict=True):
        assert {k: v for k, v in one.items() if not any(t in k for t in timed)} == pytest.approx(
            {k: v for k, v in other.items() if not any(t in k for t in timed)}
        )


def test_accumulation_changes_nothing(grpo):
    one = grpo("one", "train.max_steps=2")
    two = grpo("two", "train.max_steps=2", "train.batch_size=4", "train.accumulate=2")
    assert apart(one, two) < 1e-5
    assert metrics(one)[1]["reward"] == pytest.approx(metrics(two)[1]["reward"], abs=1e-6)


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_are_one(grpo, folder, tmp_path, rank):
    lora = [f"model.lora={{rank: {rank}}}"] if rank else []
    one = grpo("one", "train.max_steps=2", *lora)
    overrides = [f"output_dir={tmp_path / 'two'}", "train.max_steps=2", "train.batch_size=4", *lora]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mirage_vlm.cli.main"]
    path = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, "train", str(tmp_path / "recipe.yaml"), *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, **path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two" / "final"
    assert apart(one, two) < 1e-5
    for ours, theirs in zip(metrics(one)[:2], metrics(two)[:2], strict=True):
        for name in ("reward", "latent_rate", "kl", "latent_norm", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_adapters_learn_and_are_merged(grpo, folder):
    final = grpo("lora", "model.lora={rank: 2}", "rl.updates=2", "rl.latents=reroll")
    lines = metrics(final)
    assert all(line.get("rollout_logprob_max_abs_diff", 0) < 1e-4 for line in lines[:3])
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[2]["kl"] > 0
    before = load_file(folder / "model" / "model.safetensors")
    moved = [name for name, tensor in weights(final).items() if not torch.equal(tensor, before[name])]
    assert any("q_proj" in name for name in moved) and not any("norm" in name for name in moved)


def test_several_updates_are_clipped_and_compared_once(grpo):
    """The engine's log-probabilities are those of the policy before its updates."""
    final = grpo("several", "rl.updates=3", "train.max_steps=6", "train.learning_rate=3.0e-3", "train.save_every=3")
    lines = metrics(final)[:6]
    fresh, later = lines[::3], lines[1::3] + lines[2::3]
    assert all(line["rollout_logprob_max_abs_diff"] < 1e-4 for line in fresh)
    rollouts = ("rollout_logprob_max_abs_diff", "rollout_seconds", "rollout_tokens_per_second", "group_std")
    assert not any(name in line for name in rollouts for line in later)
    assert all(line["train_tokens_per_second"] > 0 and line["text_entropy"] > 0 for line in lines)
    assert any(line["clip_ratio/region_mean"] > 0 for line in later)
    assert all(line["clip_ratio/region_mean"] == 0 for line in fresh)


def test_text_only(grpo):
    lines = metrics(grpo("text", "rl.spans=none", "rl.rewards=[{name: boxed}]"))
    assert all(line["latent_rate"] == 0 and line["latents"] == 0 for line in lines[:3])


def test_every_response_is_made_to_think(grpo):
    lines = metrics(grpo("forced", "rl.spans=forced"))
    assert all(line["latent_rate"] == 1 and line["rollout_logprob_max_abs_diff"] < 1e-4 for line in lines[:3])


def test_the_spread_within_groups(grpo, monkeypatch):
    """Not that over all responses: here all of a group are worth the same, and the groups differ."""
    monkeypatch.setattr(LatentGRPO.__mro__[2], "_calculate_rewards", _by_prompt)
    line = metrics(grpo("spread", "train.max_steps=1"))[0]
    assert line["reward_std"] > 0.1
    assert line["group_std"] == 0 and line["groups_without_signal"] == 1


def _by_prompt(self, inputs, prompts, *others):
    worth = torch.tensor([float(prompt != prompts[0]) for prompt in prompts])
    return torch.stack([worth, torch.zeros_like(worth)], dim=1)


def test_a_policy_out_of_bounds(grpo, monkeypatch):
    monkeypatch.setattr(LatentGRPO, "_roll_out", _broken(LatentGRPO._roll_out))
    with pytest.raises(MirageError, match="step 0: the policy's log-probabilities are not finite"):
        grpo("broken")


def _broken(roll_out):
    """Weights that are no numbers any more, from the first rollout on."""

    def rolled(self, prompts, trainer):
        found = roll_out(self, prompts, trainer)
        with torch.no_grad():
            self.vlm.model.lm_head.weight.fill_(torch.nan)
        return found

    return rolled


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_step_that_is_not_finite(grpo, tmp_path, monkeypatch, policy):
    own = LatentGRPO._compute_loss

    def broken(self, model, inputs):
        loss = own(self, model, inputs)
        return loss * torch.nan if self.state.global_step == 2 else loss

    monkeypatch.setattr(LatentGRPO, "_compute_loss", broken)
    chosen = f"train.non_finite={policy}"
    if policy == "stop":
        with pytest.raises(MirageError, match=r"step 3: the loss is not finite, at a learning rate of .*-2"):
            grpo("run", chosen)
        assert not (tmp_path / "run" / "final").exists()
    else:
        final = grpo("run", chosen)
        assert [line.get("skipped") for line in metrics(final)] == [None, None, 1, 1]
        assert apart(final, final.parent / "checkpoint-2") == 0
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_one_readable_line_a_step(grpo, capsys):
    grpo("run", "train.max_steps=1")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("rewards  0.5 x test_grpo:letters, 1 x thought; 4 responses a prompt") for line in lines)
    (line,) = [line for line in lines if line.startswith("step ")]
    assert line.startswith("step 1/1  reward ") and "letters " in line and "kl " in line and len(line) <= 120
    assert not any("{" in line for line in lines)


def test_engine_and_trainer_apart_are_told_of(grpo, monkeypatch):
    observe = LatentGRPO._observe
    monkeypatch.setattr(LatentGRPO, "_observe", lambda self, logps, entropy: observe(self, logps - 0.5, entropy))
    with pytest.warns(UserWarning, match="engine and trainer differ by 0.50 nats"):
        grpo("apart", "train.max_steps=1")


def test_a_model_that_must_think_and_does_not(grpo, fresh, folder, tmp_path):
    """A head that never finds the start of a span likely: all states are of about one length."""
    with torch.no_grad():
        fresh.model.lm_head.weight[fresh.config.start_id] = 0
        fresh.model.lm_head.weight.mul_(5)
    fresh.save_pretrained(tmp_path / "silent")
    silent = f"model.path={tmp_path / 'silent'}"
    assert metrics(grpo("free", silent, "train.max_steps=1"))[0]["latent_rate"] == 0
    with pytest.raises(MirageError, match="none of 8 responses opened a latent span"):
        grpo("required", silent, "rl.spans=required")


def test_a_model_that_stops_to_think_is_warned_of(grpo, monkeypatch):
    seen = iter([True, False, False])
    insist = LatentGRPO._insist
    monkeypatch.setattr(LatentGRPO, "_insist", lambda self, thought, count: insist(self, next(seen), count))
    with pytest.warns(UserWarning, match=r"step 1: no response has opened a latent span for 1 step\(s\)") as told:
        grpo("warned", "rl.spans=required")
    assert len([each for each in told if "latent span" in str(each.message)]) == 1


def test_data_whose_answers_cannot_be_checked(tmp_path, folder):
    line = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Which way?"}]}]}
    good = {**line, "task": "vsp-planning", "meta": {"map": ["SF", "FG"]}}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(good) + "\n" + json.dumps(line) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, model=folder / "model"))
    recipe = load_recipe(path, [f"data=[{{path: {data}}}]", "rl.rewards=[{name: accuracy}]"])
    with pytest.raises(MirageError, match=r"data\.jsonl:2: an example has neither a task nor an answer"):
        open_examples(recipe)
    recipe = load_recipe(path, [f"data=[{{path: {data}}}]"])
    assert len(open_examples(recipe)) == 2, "rewards that look at no answer need none"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl.n=3"], "train.batch_size: 8 responses a step are not a multiple of rl.n = 3"),
        (["rl.n=1"], "rl.n: the advantage is taken among"),
        (["rl.latents=copy"], "rl.latents: 'copy' is not one of replay, reroll, gaussian"),
        (["rl.latents=gaussian"], "rl.latent_noise: must be positive with gaussian"),
        (["rl.latent_noise=0.1"], "rl.latent_noise: must be positive with gaussian"),
        (["rl.rewards=[]"], "rl.rewards: give at least one"),
        (["rl.rewards=[{name: boxed}, {name: boxed}]"], "rl.rewards: each reward counts once"),
        (["rl.rewards=[{name: boxed, weight: .nan}]"], "rl.rewards: weights must be finite"),
        (["rl.updates=3", "train.save_every=2"], "train.save_every: must be a multiple of rl.updates"),
        (["model.lora={rank: 2, dropout: 0.1}"], "model.lora.dropout: must be 0 in stage grpo"),
        (["loss={ce: 0.5}"], "loss: is of the other stages"),
        (["rl.spans=always"], "rl.spans: 'always' is not one of free, required, forced, none"),
        (["rl.span_after=x"], "rl.span_after: is the text"),
        (["rl.spans=forced", 'rl.span_after=""'], "rl.span_after: is the text"),
        (["rl.temperature=.inf"], "rl.temperature: must be a finite number"),
        (["rl.latents=gaussian", "rl.latent_noise=.inf"], "rl.latent_noise: must be a finite number"),
        (["rl.clip=.nan"], "rl.clip"),
        (["rl.kl=-1"], "rl.kl: must not be negative"),
        (["stage=stage2"], "rl: is what stage grpo needs, and no other has"),
        (["rl=null"], "rl: is what stage grpo needs, and no other has"),
        (["train.visibility=bottleneck"], "train.visibility: 'bottleneck' is not one of full, evict"),
        (["train.pack=100"], "train.pack"),
    ],
)
def test_recipes_that_are_refused(tmp_path, overrides, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, model="x"))
    with pytest.raises(MirageError, match=re.escape(message)):
        load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl.rewards=[{name: acuracy}]"], "there is no reward 'acuracy'"),
        (["data=[{task: vsp-planning, levels: [3], n: 1}]"], "1 examples do not make one step of 2 prompts"),
        (["rl.max_new_tokens=900"], "do not fit the model's context of 512"),
    ],
)
def test_runs_that_are_refused(grpo, overrides, message):
    with pytest.raises(MirageError, match=re.escape(message)):
        grpo("refused", *overrides)


def test_without_trl(grpo, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MirageError, match=re.escape("pip install 'mirage-vlm[rl]'")):
        grpo()


def test_the_command(folder, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, model=folder / "model"))
    with pytest.raises(SystemExit) as end:
        command(["train", str(path), "train.max_steps=1"])
    assert not end.value.code and "run/final" in capsys.readouterr().out

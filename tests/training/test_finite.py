"""Trainings that went wrong say so: no step, checkpoint, metric or final model that is not finite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import SCRATCH

from mirage_vlm.errors import MirageError
from mirage_vlm.training import finite, run
from mirage_vlm.training.checkpoints import METRICS_FILE, finite_or_null
from mirage_vlm.training.recipe import load_recipe
from mirage_vlm.training.trainer import LatentTrainer

RECIPE = """\
stage: stage1
output_dir: {folder}/run
model:
  scratch: {scratch}
  latent_size: 3
  image_scale: 0.4375
  attn: eager
data:
  - {{task: vsp-planning, levels: [3], n: 24}}
train: {{learning_rate: 1.0e-3, warmup: 0, log_every: 1, seed: 3, max_steps: 6, batch_size: 4, save_every: 2}}
"""


@pytest.fixture
def start(tmp_path):
    """start(*overrides): a run in a folder of its own; its final model."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, scratch=SCRATCH))
    return lambda *overrides, **options: run.train(load_recipe(path, overrides), **options)


def metrics(folder: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / METRICS_FILE).read_text().splitlines()]


def all_finite(folder: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(folder / "model.safetensors").values())


def poison(monkeypatch, where: str, steps: set[int], micro: int = 0) -> None:
    """In these steps a term of the loss, or a gradient, is none; of the micro-batches of a step the n-th."""
    own, seen = LatentTrainer.compute_loss, {"step": -1, "n": 0}

    def poisoned(self, model, inputs, *args, **kwargs):
        step = self.state.global_step + 1
        seen["n"] = seen["n"] + 1 if seen["step"] == step else 0
        seen["step"] = step
        if step not in steps or seen["n"] != micro:
            return own(self, model, inputs, *args, **kwargs)
        if where == "gradient":
            loss = own(self, model, inputs, *args, **kwargs)
            loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss
        forward = self.stage_module.forward

        def broken(*inner, **batch):
            found = forward(*inner, **batch)
            found[f"{where}_sum"] = found[f"{where}_sum"] * torch.nan
            sums = found["bits"].view(torch.float64).clone()
            sums[0 if where == "ce" else 1] = torch.nan
            found["bits"] = sums.view(torch.int64)
            return found

        monkeypatch.setattr(self.stage_module, "forward", broken)
        try:
            return own(self, model, inputs, *args, **kwargs)
        finally:
            monkeypatch.setattr(self.stage_module, "forward", forward)

    monkeypatch.setattr(LatentTrainer, "compute_loss", poisoned)


@pytest.mark.parametrize(
    ("where", "cause"),
    [("ce", "the cross-entropy (ce)"), ("align", "the alignment (align)"), ("gradient", "the gradient")],
)
def test_a_step_that_is_not_finite_ends_the_run(start, tmp_path, monkeypatch, where, cause):
    poison(monkeypatch, where, {5})
    with pytest.raises(MirageError) as caught:
        start("train.keep=1")
    message = str(caught.value)
    assert message.startswith(f"step 5: {cause} is not finite, at a learning rate of 0.000"), message
    assert f"the newest checkpoint is {tmp_path}/run/checkpoint-4" in message and "\n" not in message
    folder = tmp_path / "run"
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    kept = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"], "one that no step has yet gone on from pushes none out"
    assert all(all_finite(folder / name) for name in kept) and not (folder / "final").exists()
    monkeypatch.undo()
    assert all_finite(start("train.keep=1", resume=True))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]


def test_the_first_step(start, tmp_path, monkeypatch):
    poison(monkeypatch, "ce", {1})
    with pytest.raises(MirageError, match=r"step 1: the cross-entropy .* no checkpoint was saved before"):
        start()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_the_second_micro_batch_of_a_step(start, monkeypatch, clip):
    poison(monkeypatch, "align", {3}, micro=1)
    with pytest.raises(MirageError, match="step 3: the alignment"):
        start("train.batch_size=2", "train.accumulate=2", f"train.max_grad_norm={clip}")


def test_a_step_that_is_skipped_changes_nothing(start, tmp_path, monkeypatch, capsys):
    """The weights after it are those before it; the next step and its moments are as if it had not been."""
    plain = start("train.max_steps=2", "train.scheduler=constant", f"output_dir={tmp_path}/plain")
    poison(monkeypatch, "ce", {3})
    skipped = start("train.max_steps=3", "train.scheduler=constant", "train.non_finite=skip", "train.weight_decay=0.1")
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "run" / "checkpoint-2"))
    assert before.keys() == after.keys()
    at_two, at_three = after, load_file(skipped / "model.safetensors")
    assert all(torch.equal(at_two[name], at_three[name]) for name in at_two)
    lines = metrics(tmp_path / "run")
    assert lines[2]["loss"] is None and lines[2]["grad_norm"] is None and lines[2]["skipped"] == 1
    assert "skipped" not in lines[1]
    assert "3 steps in" in (said := capsys.readouterr().out) and "1 of them left out" in said


@pytest.mark.parametrize("micro", [0, 1])
def test_the_mean_over_several_steps_is_of_those_that_were_taken(start, tmp_path, monkeypatch, micro):
    common = ("train.batch_size=2", "train.accumulate=2", "train.learning_rate=1e-12")
    start(*common, f"output_dir={tmp_path}/plain")
    each = [line["loss"] for line in metrics(tmp_path / "plain")[:6]]
    poison(monkeypatch, "ce", {4}, micro)
    start(*common, "train.log_every=6", "train.non_finite=skip")
    _, line, last = metrics(tmp_path / "run")
    taken = [loss for step, loss in enumerate(each, 1) if step not in (1, 4)]
    assert line["loss"] == pytest.approx(sum(taken) / 4, rel=1e-5)
    assert line["skipped"] == last["skipped"] == 1 and line["ce"] > 0


def test_too_many_in_a_row(start, monkeypatch):
    monkeypatch.setattr(finite, "MOST_SKIPPED", 2)
    poison(monkeypatch, "gradient", {2, 3, 4})
    with pytest.raises(MirageError, match="step 4: the gradient is not finite, for 3 steps in a row"):
        start("train.non_finite=skip")


def test_skips_apart_from_each_other_are_no_row(start, monkeypatch):
    monkeypatch.setattr(finite, "MOST_SKIPPED", 1)
    poison(monkeypatch, "gradient", {2, 4, 6})
    assert all_finite(start("train.non_finite=skip"))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_weights_that_are_none_are_never_saved(start, tmp_path, monkeypatch, policy):
    """As of an overflow in the optimiser itself, after a step that was finite."""
    own = LatentTrainer._save_checkpoint

    def broken(self, *args, **kwargs):
        if self.state.global_step == 4:
            with torch.no_grad():
                self.vlm.model.lm_head.weight[0, 0] = torch.inf
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LatentTrainer, "_save_checkpoint", broken)
    with pytest.raises(MirageError, match=r"step 4: weights are not finite any more, so nothing is saved; .*-2"):
        start("train.keep=1", f"train.non_finite={policy}")
    folder = tmp_path / "run"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folder / "final").exists() and not (folder / "incomplete").exists()


def test_a_learning_rate_of_ten(start, tmp_path):
    """Whatever becomes of it, what is left is finite and said truly."""
    try:
        start("train.learning_rate=1e30", "train.max_steps=12", "train.weight_decay=0.01")
    except MirageError as fault:
        assert "not finite" in str(fault) and "train.learning_rate (it is 1e+30)" in str(fault)
    folder = tmp_path / "run"
    metrics(folder)
    assert not (folder / "final").exists()
    assert all(all_finite(path) for path in folder.glob("checkpoint-*"))


def test_data_without_a_label(start, monkeypatch):
    own = run.Collator.__call__

    def unlabelled(self, trajectories):
        batch = own(self, trajectories)
        return batch | {"labels": torch.full_like(batch["labels"], -100)}

    monkeypatch.setattr(run.Collator, "__call__", unlabelled)
    with pytest.raises(MirageError, match="data: the first step has neither a token with a label nor a latent"):
        start("stage=sft", "data=[{task: vsp-perception, levels: [3], n: 8}]")


def test_an_untouched_run_says_nothing_of_it(start, tmp_path, capsys):
    start("train.max_steps=2")
    assert all("skipped" not in line for line in metrics(tmp_path / "run"))
    assert "left out" not in capsys.readouterr().out


def test_json_has_no_numbers_that_are_none():
    nan, inf = float("nan"), float("inf")
    assert finite_or_null({"a": nan, "b": [1.0, -inf], "c": {"d": inf}, "e": "NaN", "f": 2}) == {
        "a": None,
        "b": [1.0, None],
        "c": {"d": None},
        "e": "NaN",
        "f": 2,
    }

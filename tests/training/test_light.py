"""A recipe is refused before anything heavy is imported; its names are those of the tables they stand for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.feedback import FEEDBACKS
from mirage_vlm.modeling.names import FEEDBACK_NAMES, POOLING_NAMES
from mirage_vlm.modeling.pooling import LEARNT, POOLINGS
from mirage_vlm.rl.rewards import REWARDS
from mirage_vlm.training.align import ALIGNMENTS
from mirage_vlm.training.names import ALIGNMENT_NAMES, LOGGERS, REWARD_NAMES
from mirage_vlm.training.recipe import load_recipe

GOOD = """\
stage: {stage}
output_dir: {folder}/run
model: {{path: bundled}}
data:
- {{task: vsp-planning, levels: [3], n: 4}}
- {{path: {folder}/data.jsonl}}
"""

# run as the command is, and look at what it has imported by then
SCRIPT = """
import sys
from mirage_vlm.cli.main import run
try:
    run(["train", *sys.argv[1:]])
except SystemExit as end:
    print(end.code, sorted({"torch", "transformers", "datasets", "trl", "peft"} & set(sys.modules)))
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "data.jsonl").touch()
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.format(folder=tmp_path, stage="stage2"))
    return path


def test_names_and_tables_agree():
    assert tuple(FEEDBACKS) == FEEDBACK_NAMES
    assert (*POOLINGS, *LEARNT) == POOLING_NAMES
    assert tuple(ALIGNMENTS) == ALIGNMENT_NAMES
    assert tuple(REWARDS) == REWARD_NAMES


def test_loggers_are_known_to_transformers():
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    assert set(LOGGERS) <= {"all", *INTEGRATION_TO_CALLBACK}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=2", "unknown key 'train.epoch'; did you mean 'epochs'?"),
        ("stage=grpo", "rl: is what stage grpo needs, and no other has; add rl: {}"),
        ("rl={}", "rl: is what stage grpo needs, and no other has; leave it out of stage2"),
        ("data=[{task: vsp-planing}]", "data[0].task: there is no task 'vsp-planing'; choose from vsp-planning"),
        ("data=[{path: none.jsonl}]", "data[0].path: there is no none.jsonl"),
        ("model.path=/nowhere/final", "model.path: there is no /nowhere/final"),
        ("model.feedback=mlp", "model.feedback: 'mlp' is not one of identity"),
        ("train.learning_rate=1e999", "train.learning_rate: '1e999' is too large for a number"),
    ],
)
def test_faults_come_before_torch(recipe, override, message):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(recipe), override],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "2 []\n", done.stdout + done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=[{task: vsp-planning, style: cott}]"], "data[0].style: vsp-planning has no style 'cott'"),
        (["data=[{task: vsp-planning, levels: [1]}]"], "data[0].levels: levels of vsp-planning are from"),
        (["data=[{task: vsp-planning, levels: []}]"], "data[0].levels: levels of vsp-planning are from"),
        (["data=[{task: geometry, levels: [99]}]"], "data[0].levels: levels of geometry"),
        (["data=[{task: vsp-planning, n: -1}]"], "data[0].n: must be positive"),
        (["data=[{path: 'no*thing'}]"], "data[0].path: no file matches no*thing"),
        (
            ["model.path=", "model.scratch={}", "model.tokenizer_data=[{task: x}]"],
            "model.tokenizer_data[0].task: there is no task 'x'",
        ),
        (["model.path=", "model.scratch={heads: 5}"], "model.scratch.width: 192 does not go into heads = 5"),
        (["model.path=", "model.scratch={kv_heads: 4}"], "model.scratch.kv_heads: heads = 6 is not a multiple of 4"),
        (["model.path=", "model.scratch={layers: 0}"], "model.scratch.layers: must be positive"),
        (["model.path=", "model.scratch={vision_heads: 3}"], "model.scratch.vision_width: 128 does not go into"),
        (["model.path=", "model.scratch={rope_theta: .nan}"], "model.scratch.rope_theta: must be positive"),
        (["model.path=./nowhere"], "model.path: there is no nowhere"),
        (["model.attn=fast"], "model.attn: 'fast' is not one of eager"),
        (["model.image_scale=0"], "model.image_scale: must be positive"),
        (["model.image_scale=.inf"], "model.image_scale: must be a finite number"),
        (["model.lora={rank: 0}"], "model.lora.rank: must be positive"),
        (["model.lora={alpha: 0}"], "model.lora.alpha: must be positive"),
        (["model.lora={dropout: 1}"], "model.lora.dropout: must be from 0 to below 1"),
        (["model.lora={modules: []}"], "model.lora.modules: give at least one"),
        (["stage=stage1", "loss={ce: 0, align: 0}"], "loss: ce and align are both 0, so stage1 would learn nothing"),
        (["loss={align_stage2: .nan}"], "loss.align_stage2: must not be negative"),
        (["train.max_steps=0"], "train.max_steps: must be positive, or -1"),
        (["train.max_steps=-5"], "train.max_steps: must be positive, or -1"),
        (["train.max_steps=2", "train.epochs=.inf"], "train.epochs: must be a finite number"),
        (["train.seed=-1"], "train.seed: must be from 0 to below 2^32"),
        (["train.seed=4294967296"], "train.seed: must be from 0 to below 2^32"),
        (["train.keep_examples=.inf"], "train.keep_examples: must be a finite number"),
        (["train.own_share=[.nan, 1]"], "train.own_share: must be two shares"),
        (["train.non_finite=ignore"], "train.non_finite: 'ignore' is not one of stop, skip"),
        (["output_dir="], "output_dir: expected str, got None"),
        (["output_dir=/dev/null/x"], "output_dir: /dev/null is not a folder"),
        (["stage=grpo", "rl.rewards=[{name: acuracy}]"], "rl.rewards[0].name: there is no reward 'acuracy'"),
        (["stage=grpo", "rl.rewards=[{name: boxed, weight: 0}, {name: format, weight: 0}]"], "all weights are 0"),
        (["stage=grpo", "rl={temperature: .inf}"], "rl.temperature: must be a finite number"),
    ],
)
def test_what_else_is_refused_by_its_key(recipe, monkeypatch, overrides, message):
    monkeypatch.setenv("HOME", str(recipe.parent))
    with pytest.raises(MirageError) as caught:
        load_recipe(recipe, [*overrides, "train.batch_size=10"], files=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_of_the_file_has_its_line(recipe):
    recipe.write_text(recipe.read_text().replace("vsp-planning", "vsp"))
    with pytest.raises(MirageError, match=rf"^{recipe}:5: data\[0\]\.task: there is no task 'vsp'"):
        load_recipe(recipe)
    recipe.write_text(recipe.read_text().replace("vsp,", "vsp-planning,"))
    (recipe.parent / "data.jsonl").unlink()
    with pytest.raises(MirageError, match=rf"^{recipe}:6: data\[1\]\.path: there is no"):
        load_recipe(recipe, files=True)
    load_recipe(recipe)  # as what lies beside a checkpoint


def test_what_a_user_names_is_looked_at_later(recipe):
    load_recipe(recipe, ["stage=grpo", "rl={rewards: [{name: 'mine:reward'}]}", "train.batch_size=10"], files=True)
    load_recipe(recipe, ["data=[{task: 'mine:TASK', style: any, levels: [99]}]"], files=True)


def test_home_is_where_paths_say(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = load_recipe(
        recipe,
        ["output_dir=~/x", "model.path=~/m", "data=[{path: ~/d}]", "train.feature_cache=~/f"],
    )
    assert (found.output_dir, found.model.path, found.data[0].path) == ("/home/me/x", "/home/me/m", "/home/me/d")
    assert found.train.feature_cache == "/home/me/f"

"""Recipes: what is read, and every way of being wrong, with file, line and key."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers.integrations import INTEGRATION_TO_CALLBACK as LOGGERS

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.study import load_study
from mirage_vlm.modeling.bundled import resolve
from mirage_vlm.modeling.feedback import FEEDBACKS
from mirage_vlm.training.recipe import SCHEDULERS, LoraRecipe, ModelRecipe, Recipe, load_recipe
from mirage_vlm.training.run import prepare_model

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "accelerate")  # those are accelerate's
STUDIES = [path for path in FILES if "\nrows:" in path.read_text()]
RECIPES = [path for path in FILES if path not in STUDIES]

SMALL = """\
# a comment
stage: stage2
output_dir: runs/x

model:
  path: runs/base/final
  latent_size: 4
data:
  - {task: vsp-planning, levels: [3, 4], n: 10}
  - path: data/train.jsonl
train:
  learning_rate: 1e-4
  batch_size: 16
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(MirageError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "FILE")


def test_a_recipe_is_read(write):
    recipe = load_recipe(write(SMALL))
    assert (recipe.stage, recipe.output_dir) == ("stage2", "runs/x")
    assert (recipe.model.path, recipe.model.latent_size, recipe.model.lora) == ("runs/base/final", 4, None)
    assert [source.task for source in recipe.data] == ["vsp-planning", None]
    assert recipe.data[0].levels == (3, 4) and recipe.data[1].path == "data/train.jsonl"
    assert recipe.train.learning_rate == 1e-4 and recipe.train.batch_size == 16
    assert recipe.train.epochs == 1.0, "what is not said has its default"
    assert recipe.loss.ce == 0.1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_shipped_recipe_loads(path):
    assert isinstance(load_recipe(path), Recipe)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_shipped_study_loads(path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)  # its recipes are named from there
    study = load_study(path)
    assert all((Path(resolve(base.path)) / "config.json").exists() for base in study.bases)


def test_there_are_recipes():
    assert RECIPES


def test_limits_of_pixels_reach_the_model_and_its_checkpoint(write, tmp_path):
    path = write(SMALL)
    changes = ["model.path=bundled", "model.min_pixels=1568", "model.max_pixels=12544", "data=[{task: vsp-planning}]"]
    recipe = load_recipe(path, changes)
    vlm = prepare_model(recipe, [])
    assert vlm.image_processor.size["shortest_edge"] == 1568 and vlm.image_processor.size["longest_edge"] == 12544
    vlm.save_pretrained(tmp_path / "final")
    again = prepare_model(dataclasses.replace(recipe, model=ModelRecipe(path=str(tmp_path / "final"))), [])
    assert (again.config.min_pixels, again.config.max_pixels) == (1568, 12544)
    assert again.image_processor.size["longest_edge"] == 12544


def test_a_recipe_survives_being_saved(write):
    """What lies beside a checkpoint is a recipe again: JSON is YAML."""
    recipe = load_recipe(write(SMALL), ["model.lora.rank=4"])
    assert load_recipe(write(json.dumps(recipe.to_dict(), indent=2))) == recipe


# -- overrides -------------------------------------------------------------------------------------------------------


def test_overrides(write):
    path = write(SMALL)
    recipe = load_recipe(
        path,
        [
            "train.max_steps=50",
            "output_dir=runs/y",
            "train.learning_rate=3e-5",
            "train.bf16=true",
            "model.lora.rank=8",
            "data=[{task: vsp-reasoning, n: 3}]",
            "train.report_to=[tensorboard, wandb]",
            "model.latent_size=",
        ],
    )
    assert recipe.train.max_steps == 50 and recipe.output_dir == "runs/y"
    assert recipe.train.learning_rate == 3e-5 and recipe.train.bf16 is True
    assert recipe.model.lora == LoraRecipe(rank=8)
    assert [source.task for source in recipe.data] == ["vsp-reasoning"]
    assert recipe.train.report_to == ("tensorboard", "wandb")
    assert recipe.model.latent_size is None, "an empty value takes it back"
    assert dataclasses.replace(recipe.train, max_steps=-1).batch_size == 16
    assert load_recipe(path, ["train.seed=1", "train.seed=2"]).train.seed == 2, "the last one wins"


def test_overrides_that_are_wrong(write):
    path = write(SMALL)
    assert refusal(path, "train.max_steps") == "override 'train.max_steps' must be key=value"
    assert refusal(path, "train.max_stepz=3") == (
        "override 'train.max_stepz=3': unknown key 'train.max_stepz'; did you mean 'max_steps'?"
    )
    assert refusal(path, "trian.seed=3").startswith(
        "override 'trian.seed=3': unknown key 'trian'; did you mean 'train'?"
    )
    assert refusal(path, "train.max_steps=many").startswith("override 'train.max_steps=many': train.max_steps: ")
    assert "lists are set whole" in refusal(path, "data.n=3")
    assert "'stage' is not a group of keys" in refusal(path, "stage.x=3")


def test_an_override_that_is_not_yaml(write):
    assert "train.seed" in refusal(write(SMALL), "train.seed=[1")


# -- unknown, missing, mistyped --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "typo", "message"),
    [
        (2, "stagee: stage2", "FILE:2: unknown key 'stagee'; did you mean 'stage'?"),
        (7, "  latent_sise: 4", "FILE:7: unknown key 'model.latent_sise'; did you mean 'latent_size'?"),
        (9, "  - {task: vsp-planning, levles: [3]}", "FILE:9: unknown key 'data[0].levles'; did you mean 'levels'?"),
        (13, "  batchsize: 16", "FILE:13: unknown key 'train.batchsize'; did you mean 'batch_size'?"),
        (13, "  zzz: 16", "FILE:13: unknown key 'train.zzz'; known: epochs, max_steps, batch_size"),
    ],
)
def test_an_unknown_key(write, line, typo, message):
    lines = SMALL.splitlines()
    lines[line - 1] = typo
    assert refusal(write("\n".join(lines))).startswith(message)


@pytest.mark.parametrize(
    ("line", "wrong", "message"),
    [
        (3, "output_dir: 7", "FILE:3: output_dir: expected str, got 7"),
        (7, "  latent_size: four", "FILE:7: model.latent_size: expected int, got 'four'"),
        (7, "  latent_size: 4.0", "FILE:7: model.latent_size: expected int, got 4.0"),
        (7, "  freeze_vision: 1", "FILE:7: model.freeze_vision: expected bool, got 1"),
        (9, "  - {task: vsp-planning, levels: 3}", "FILE:9: data[0].levels: expected a list, got 3"),
        (9, "  - {task: vsp-planning, levels: [3, x]}", "FILE:9: data[0].levels[1]: expected int, got 'x'"),
        (9, "  - vsp-planning", "FILE:9: data[0]: expected keys and values, got 'vsp-planning'"),
        (12, "  learning_rate: fast", "FILE:12: train.learning_rate: expected a number, got 'fast'"),
        (12, "  learning_rate: true", "FILE:12: train.learning_rate: expected float, got True"),
        (13, "  batch_size: yes", "FILE:13: train.batch_size: expected int, got True"),
    ],
)
def test_a_value_of_the_wrong_type(write, line, wrong, message):
    lines = SMALL.splitlines()
    lines[line - 1] = wrong
    assert refusal(write("\n".join(lines))) == message


def test_missing_keys(write):
    assert "missing stage, data" in refusal(write("output_dir: x\nmodel: {path: y}\n"))
    assert refusal(write("stage: stage1\noutput_dir: x\ndata: [{path: y}]\n")) == "FILE:1: the recipe: missing model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage=stage3", "stage: 'stage3' is not one of sft, stage1, stage2, grpo"),
        ("model.scratch={}", "model: give one of path and scratch"),
        ("model.path=", "model: give one of path and scratch"),
        ("model.pooling=avg", "model.pooling: 'avg' is not one of average, grid, random, full, resampler"),
        ("model.feedback=mlp", f"model.feedback: 'mlp' is not one of {', '.join(FEEDBACKS)}"),
        ("model.stop_rule=never", "model.stop_rule: 'never' is not one of fixed, learned"),
        ("model.dtype=float16", "model.dtype: 'float16' is not one of float32, bfloat16"),
        ("model.latent_size=0", "model.latent_size: must be positive"),
        ("data=[]", "data: give at least one source"),
        ("data=[{path: a}, {}]", "data[1]: give one of path and task"),
        ("data=[{path: a, task: vsp-planning}]", "data[0]: give one of path and task"),
        ("data=[{task: vsp-planning, n: 0}]", "data[0].n: must be positive"),
        ("model.min_pixels=0", "model.min_pixels: must be positive"),
        ("model.max_pixels=-784", "model.max_pixels: must be positive"),
        ("model.max_pixels=many", "model.max_pixels: expected int, got 'many'"),
        ("model.max_pixels=true", "model.max_pixels: expected int, got True"),
        ("model.min_pixels=1.5", "model.min_pixels: expected int, got 1.5"),
        ("model={path: x, min_pixels: 900, max_pixels: 800}", "model.min_pixels: is above model.max_pixels"),
        ("train.batch_size=0", "train.batch_size: must be positive"),
        ("train.save_every=-1", "train.save_every: must be positive"),
        ("train.keep=0", "train.keep: must be positive"),
        ("train.learning_rate=0", "train.learning_rate: must be positive"),
        ("train.learning_rate=.inf", "train.learning_rate: must be positive"),
        ("train.beta2=2", "train.beta2: must be from 0 to below 1"),
        ("train.weight_decay=-1", "train.weight_decay: must not be negative"),
        ("train.warmup=-3", "train.warmup: must not be negative"),
        ("train.max_grad_norm=-1", "train.max_grad_norm: must not be negative"),
        ("train.epochs=0", "train.epochs: must be positive, or train.max_steps"),
        ("train.scheduler=foo", f"train.scheduler: 'foo' is not one of {', '.join(SCHEDULERS)}"),
        (
            "train.report_to=[nolog]",
            f"train.report_to: 'nolog' is not one of all, {', '.join(LOGGERS)}",
        ),
    ],
)
def test_impossible_values(write, change, message):
    assert refusal(write(SMALL), change).endswith(f": {message}")


@pytest.mark.parametrize(
    "change",
    [
        "train.batch_size=0",
        "model.pooling=avg",
        "data=[{task: vsp-planning, n: 0}]",
    ],
)
def test_an_impossible_value_of_an_override_names_the_override(write, change):
    assert refusal(write(SMALL), change).startswith(f"override {change!r}: ")


def test_an_impossible_value_in_the_file_names_its_line(write):
    assert refusal(write(SMALL.replace("stage2", "stage3"))).startswith("FILE:2: stage: 'stage3' is not")
    assert refusal(write(SMALL.replace("n: 10", "n: -1"))) == "FILE:9: data[0].n: must be positive"


def test_files_that_are_no_recipes(write, tmp_path):
    assert refusal(tmp_path / "missing.yaml").startswith("FILE: cannot read the recipe")
    assert "not valid YAML" in refusal(write("stage: [1"))
    for text in ("", "- a\n", "just words"):
        assert refusal(write(text)) == "FILE: the recipe is not a mapping of keys to values"

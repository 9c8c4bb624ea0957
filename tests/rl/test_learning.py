"""GRPO learns: the bundled model's weak side, answers without words, gets better on maps that it has not seen."""

from pathlib import Path

import pytest

from mirage_vlm.decoding import GenerationConfig
from mirage_vlm.evaluation.intervals import over_seeds
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.bundled import resolve
from mirage_vlm.rl.rewards import reward_of
from mirage_vlm.rl.run import run_recipe
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "research" / "grpo-direct.yaml"
SAMPLES = 4


def worth(model: str, recipe) -> list[float]:
    """The mean reward of four sampled responses to each of 150 held-out maps, by the recipe's rewards."""
    vlm = LatentVLM.from_pretrained(resolve(model), attn="eager")
    maps = list(GeneratedDataset("vsp-planning", (3, 4), 150, 0, "direct", "test"))
    config = GenerationConfig(max_new_tokens=32, temperature=1.0, n=SAMPLES, seed=1, return_latents=False)
    found = vlm.generate(maps, config)
    rewards = [(reward_of(each.name), each.weight) for each in recipe.rl.rewards]
    values = [sum(parts) for parts in zip(*([w * v for v in reward(found)] for reward, w in rewards), strict=True)]
    return [sum(values[i : i + SAMPLES]) / SAMPLES for i in range(0, len(values), SAMPLES)]


@pytest.mark.slow
def test_the_reward_of_held_out_maps_rises(tmp_path):
    """Over three seeds, each with maps and draws of its own, by more than seeds and maps scatter."""
    short = ["data=[{task: vsp-planning, levels: [3, 4], n: 8000, style: direct}]", "train.max_steps=30"]
    gains = []
    before = None
    for seed in (1, 2, 3):
        own = [
            short[0].replace("n:", f"seed: {seed}, n:"),
            short[1],
            f"train.seed={seed}",
            f"output_dir={tmp_path / str(seed)}",
        ]
        recipe = load_recipe(RECIPE, own)
        before = worth("bundled", recipe) if before is None else before
        after = worth(str(run_recipe(recipe)), recipe)
        gains.append([a - b for a, b in zip(after, before, strict=True)])
    mean, low, _ = over_seeds(gains)
    assert low > 0 and mean > 0.05, (mean, low)

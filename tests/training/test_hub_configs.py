"""The hub's own config.json: flat, as Qwen wrote it, or nested, as transformers writes it anew."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import CORPUS, batch_of, distance, ragged
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2VLImageProcessorPil

from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.checkpoint import has_latents, read_config
from mirage_vlm.modeling.family import family_of
from mirage_vlm.modeling.scratch import train_tokenizer
from mirage_vlm.rl.run import run_recipe
from mirage_vlm.training.losses import stage2
from mirage_vlm.training.memory import estimate, model_shape, sizes
from mirage_vlm.training.recipe import LoraRecipe, ModelRecipe, Recipe, TrainRecipe, load_recipe
from mirage_vlm.training.run import add_adapters, merge_adapters

HUB = Path(__file__).parent.parent / "data" / "hub"
NAMES = ("qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen2-vl-2b", "qwen2-vl-7b")
FORMS = ("flat", "nested")
TOTAL = {  # parameters as the hub counts them
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
}
SMALL_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
}
SMALL_VISION = {"depth": 2, "num_heads": 2}


def shrunk(name: str, form: str, tokenizer) -> dict:
    """A config of the hub's form, with few and narrow layers, for a small tokenizer."""
    config = json.loads((HUB / f"{name}-{form}.json").read_text())
    text = config if form == "flat" else config["text_config"]
    text |= {**SMALL_TEXT, "vocab_size": len(tokenizer) + 9}
    text["rope_scaling"]["mrope_section"] = [2, 3, 3]
    if "layer_types" in text:
        text["layer_types"] = ["full_attention"] * 2
    vision = config["vision_config"]
    vision |= SMALL_VISION
    if "out_hidden_size" in vision:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    else:
        vision |= {"embed_dim": 32, "hidden_size": 32}
    for key, token in {"bos": "<|endoftext|>", "eos": "<|im_end|>"}.items():
        text[f"{key}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    for key in ("vision_start", "vision_end"):
        config[f"{key}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{key}|>")
    for key in ("image", "video"):
        config[f"{key}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{key}_pad|>")
    return config | {"torch_dtype": "float32"}


def small(folder: Path, name: str, form: str) -> Path:
    """A checkpoint of the hub's form: its config, its names of weights, float32."""
    tokenizer = train_tokenizer([*CORPUS, "r1c1"], 1024)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shrunk(name, form, tokenizer)))
    torch.manual_seed(5)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    weights = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor.contiguous()
        for key, tensor in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 50176}).save_pretrained(folder)
    return folder


@pytest.fixture(params=[(name, form) for name in NAMES for form in FORMS], ids="-".join)
def hub(request, tmp_path) -> Path:
    return small(tmp_path / "hub", *request.param)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_the_real_sizes_are_planned_from_the_config_alone(tmp_path, name, form):
    (tmp_path / "config.json").write_text((HUB / f"{name}-{form}.json").read_text())
    model = model_shape(str(tmp_path))
    wanted = Recipe("stage1", "x", ModelRecipe(path=str(tmp_path), dtype="bfloat16"), (), train=TrainRecipe())
    assert sizes(model, wanted).total == TOTAL[name]
    lora = Recipe("stage2", "x", ModelRecipe(path="x", dtype="bfloat16", lora=LoraRecipe()), (), train=TrainRecipe())
    tables = 1 if name in ("qwen2.5-vl-3b", "qwen2-vl-2b") else 2
    assert sizes(model, lora).rest_trained == 3 * model.config.text_config.hidden_size * tables
    assert estimate(model, lora)["weights"] > 2 * TOTAL[name]
    config = read_config(tmp_path)
    assert family_of(config).image_token_id == 151655 and not has_latents(tmp_path)


def test_adapters_are_added_trained_merged_and_saved(hub, tmp_path):
    name = hub.parent.name
    vlm = LatentVLM.from_base(hub, attn="eager", latent_size=2)
    tied = json.loads((hub / "config.json").read_text())["tie_word_embeddings"]
    assert vlm.family.tied(vlm.model) == tied, name
    batch = batch_of(vlm, ragged()[:2], targets=False)
    with torch.no_grad():
        before = stage2(vlm, batch).hidden
    vlm.requires_grad_(False)
    add_adapters(vlm, LoraRecipe(rank=2))
    trained = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
    stage2(vlm, batch).ce_sum.backward()
    with torch.no_grad():
        for parameter in trained:
            parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0
        moved = stage2(vlm, batch).hidden
        merge_adapters(vlm)
        merged = stage2(vlm, batch).hidden
        assert distance(moved, before) > 0
        assert distance(merged, moved) < 1e-4
        vlm.save_pretrained(tmp_path / "saved")
        again = LatentVLM.from_pretrained(tmp_path / "saved", attn="eager")
        assert again.family.tied(again.model) == tied
        assert distance(stage2(again, batch).hidden, merged) == 0


RECIPE = """
stage: {stage}
output_dir: {out}
model: {{path: {path}, attn: eager, image_scale: 0.4375, latent_size: 2, lora: {{rank: 2}}}}
data: [{{task: vsp-planning, levels: [3], n: 8, style: direct}}]
train: {{max_steps: 2, batch_size: 4, learning_rate: 1.0e-2, save_every: 2}}
"""
RL = "rl: {n: 2, max_new_tokens: 6, spans: free, rewards: [{name: boxed}]}\n"


@pytest.mark.parametrize(
    ("name", "form"), [("qwen2.5-vl-3b", "flat"), ("qwen2.5-vl-7b", "flat"), ("qwen2-vl-2b", "nested")]
)
@pytest.mark.parametrize("stage", ["stage2", "grpo"])
def test_recipes_with_adapters_run_on_them(tmp_path, name, form, stage):
    base = small(tmp_path / "hub", name, form)
    text = RECIPE.format(stage=stage, out=tmp_path / "run", path=base) + (RL if stage == "grpo" else "")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    final = run_recipe(recipe)
    start, end = LatentVLM.from_base(base), LatentVLM.from_pretrained(final)
    old, new = start.state_dict(), end.state_dict()
    assert old.keys() == new.keys(), "a plain checkpoint again"
    assert load_file(final / "model.safetensors")

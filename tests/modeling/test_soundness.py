"""Checkpoints whose parts do not fit together: one line at load that names the part, never a wrong answer."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentConfig, LatentVLM, checkpoint
from mirage_vlm.modeling.bundled import BUNDLED, BUNDLED_BASE, BUNDLED_TASKS, located
from mirage_vlm.modeling.checkpoint import has_latents
from mirage_vlm.modeling.scratch import CHAT_TEMPLATE, train_tokenizer
from mirage_vlm.modeling.soundness import check_finite
from mirage_vlm.trajectory import user_turn


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture
def spoiled(saved, tmp_path) -> Path:
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "spoiled"))


def edit(path: Path, *place: str, **changes: object) -> None:
    """Set keys of an object in a JSON file."""
    whole = json.loads(path.read_text())
    part = whole
    for key in place:
        part = part[key]
    part |= changes
    path.write_text(json.dumps(whole))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(path: object, *said: str, **options: object) -> None:
    """Refused in one line that names the path."""
    with pytest.raises(MirageError) as caught:
        LatentVLM.from_pretrained(path, **options)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line
    for part in said:
        assert part in line, line


# -- where it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BUNDLED, BUNDLED_TASKS, Path(BUNDLED)])
def test_the_packages_own_models_by_name(name):
    vlm = LatentVLM.from_pretrained(name)
    assert has_latents(name) and vlm.config.latent_size == 4


def test_a_base_by_name():
    assert LatentVLM.from_base(BUNDLED_BASE, latent_size=2).config.latent_size == 2


@pytest.mark.parametrize(
    "name",
    ["./x", "../x/y", "/abs/x", "runs/x/final", "~/no-such-folder", "nowhere", "a b/c", "-/x", "a/b/", "", "x/.."],
)
def test_a_path_that_is_not_there_never_asks_the_network(name, monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError("asked")

    monkeypatch.setattr(checkpoint.AutoConfig, "from_pretrained", ask)
    for load in (LatentVLM.from_pretrained, LatentVLM.from_base, has_latents):
        with pytest.raises(MirageError, match=r"no such folder, and no name of a model on the hub|not a checkpoint"):
            load(name)


def test_a_folder_called_as_the_owner_is_means_a_path(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MirageError, match=r"runs/final: no such folder, and no name"):
        located("runs/final")
    assert located("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_a_name_that_only_sounds_like_ours():
    with pytest.raises(MirageError, match=r"bundled-task: no such folder.*bundled, bundled-base, bundled-tasks"):
        located("bundled-task")


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    def ask(name):
        raise OSError("We couldn't connect\nto the hub, and so on")

    monkeypatch.setattr(checkpoint.AutoConfig, "from_pretrained", ask)
    with pytest.raises(
        MirageError, match=r"^o/n: no such folder, and the hub gives no such model: We couldn't connect$"
    ):
        LatentVLM.from_pretrained("o/n")


def test_a_file_and_an_empty_folder(saved, tmp_path):
    refused(saved / "model.safetensors", "it is a file; give the folder it is in")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "there is no config.json in it")


def test_a_folder_below_home(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert LatentVLM.from_pretrained(f"~/{saved.name}").config.latent_size == 3


@pytest.mark.parametrize("text", ["{", "[1]", "{}", "null", '"x"', '{"model_type": "foo"}', "", '{"model_type": 3}'])
def test_a_broken_config(spoiled, text):
    (spoiled / "config.json").write_text(text)
    refused(spoiled, "config.json cannot be used")
    with pytest.raises(MirageError):
        has_latents(spoiled)


def test_a_config_that_cannot_be_read(spoiled):
    (spoiled / "config.json").write_bytes(b"\xff\xfe{")
    refused(spoiled, "config.json cannot be used")
    (spoiled / "config.json").unlink()
    os.mkdir(spoiled / "config.json")
    refused(spoiled, "not a checkpoint")


# -- the latent part -------------------------------------------------------------------------------------------------

WRONG = {
    "latent_size": ["4", 1.5, True, -1, 0, None, [4]],
    "latent_token_id": ["351", -1, 1.0, True],
    "latent_start_id": ["350", [1]],
    "latent_end_id": [{}, "x"],
    "compress_strategy": [3, "avg", ["average"], ""],
    "latent_feedback": [3, "unknown", []],
    "latent_stop_rule": [1, "sometimes", {}],
    "latent_target": [0, "nothing"],
    "latent_places": ["yes", 1],
    "latent_codes": ["256", 0, 2.5, True],
    "latent_evict_images": ["no", 0],
    "image_scale": ["1", 0, -1.0, True, [1]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_latent_keys_of_the_wrong_kind(spoiled, key, value):
    edit(spoiled / "config.json", **{key: value})
    with pytest.raises(MirageError) as caught:
        LatentVLM.from_pretrained(spoiled)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["4", 1.5, True, -1])
def test_a_latent_size_that_is_none_is_named(spoiled, value):
    edit(spoiled / "config.json", latent_size=value)
    refused(spoiled, f"config.json: latent_size must be a whole number of at least 1, not {value!r}")


@pytest.mark.parametrize("scale", ["NaN", "Infinity", "-Infinity"])
def test_a_scale_that_is_no_number(spoiled, scale):
    text = (spoiled / "config.json").read_text()
    (spoiled / "config.json").write_text(text.replace('"image_scale": 0.4375', f'"image_scale": {scale}'))
    refused(spoiled, "image_scale")


def test_ids_that_are_one_token(spoiled, tiny):
    edit(spoiled / "config.json", latent_token_id=tiny.config.start_id)
    refused(spoiled, "must be three different tokens")


@pytest.mark.parametrize(
    "changes",
    [{"latent_size": 1.5}, {"latent_size": "8"}, {"image_scale": math.nan}, {"stop_rule": None}, {"pooling": 3}],
)
def test_options_of_the_wrong_kind(saved, changes):
    with pytest.raises(MirageError, match=next(iter(changes))):
        LatentVLM.from_pretrained(saved, **changes)
    with pytest.raises(MirageError):
        LatentConfig(**{"latent_size": 4, "start_id": 1, "pad_id": 2, "end_id": 3} | changes)


def test_options_that_there_are_not(saved):
    with pytest.raises(MirageError, match="unknown option 'latent_sise'"):
        LatentVLM.from_pretrained(saved, latent_sise=3)
    with pytest.raises(MirageError, match="unknown option 'latent_sise'"):
        LatentVLM.from_base(saved, latent_sise=3)
    for dtype in ("int8", "foo", "nn", 3, torch.int8, None):
        with pytest.raises(MirageError, match="dtype must be"):
            LatentVLM.from_pretrained(saved, dtype=dtype)
    refused(saved, "foo", attn="foo")
    refused(saved, attn=3)


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"), [("merge_size", 1), ("merge_size", 4), ("patch_size", 16), ("temporal_patch_size", 1)]
)
def test_a_processor_that_cuts_otherwise(spoiled, key, value):
    edit(spoiled / "preprocessor_config.json", **{key: value})
    refused(spoiled, "config.json says", f"preprocessor_config.json says {value} ({key})")


@pytest.mark.parametrize(
    ("key", "value"), [("spatial_merge_size", 1), ("patch_size", 7), ("temporal_patch_size", 1), ("in_channels", 1)]
)
def test_a_vision_config_that_contradicts_the_weights(spoiled, key, value):
    edit(spoiled / "config.json", "vision_config", **{key: value})
    refused(spoiled, "config.json does not fit the weights")


@pytest.mark.parametrize("content", ["{", '{"image_processor_type": "CLIPImageProcessor"}', None])
def test_a_processor_that_is_none(spoiled, content):
    if content is None:
        (spoiled / "preprocessor_config.json").unlink()
    else:
        (spoiled / "preprocessor_config.json").write_text(content)
    refused(spoiled)


@pytest.mark.parametrize("token", [999, -1, "5", 7])
def test_a_picture_token_that_is_none(spoiled, token):
    edit(spoiled / "config.json", image_token_id=token)
    refused(spoiled)


def test_another_token_for_pictures_than_the_templates(spoiled, tiny):
    edit(spoiled / "config.json", image_token_id=tiny.tokenizer.convert_tokens_to_ids("<|video_pad|>"))
    refused(spoiled, "makes 0 places for one picture", "image_token_id")


# -- shapes and weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 400),
        ("vocab_size", 100),
        ("hidden_size", 64),
        ("intermediate_size", 32),
        ("num_key_value_heads", 2),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
    ],
)
def test_a_text_config_that_contradicts_the_weights(spoiled, key, value):
    edit(spoiled / "config.json", "text_config", **{key: value})
    if key == "num_hidden_layers":
        edit(spoiled / "config.json", "text_config", layer_types=["full_attention"] * value)
    refused(spoiled)


def test_rotary_shares_that_do_not_add_up(spoiled):
    rope = json.loads((spoiled / "config.json").read_text())["text_config"]["rope_parameters"]
    edit(spoiled / "config.json", "text_config", rope_parameters={**rope, "mrope_section": [1, 1, 1]})
    refused(spoiled, "mrope_section [1, 1, 1] must add up to half a head")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["visual.blocks.0", "layers.1.mlp", "embed_tokens", "norm"])
def test_weights_that_are_no_numbers(spoiled, part, value):
    names = []

    def spoil(weights):
        name = next(name for name in sorted(weights) if part in name)
        names.append(name.rpartition(".")[0].rpartition(".")[2])
        weights[name].view(-1)[-1] = value

    edit_weights(spoiled, spoil)
    refused(spoiled, names[0], "holds 1 of", "NaN or infinite")


def test_weights_that_are_large_are_numbers(spoiled):
    edit_weights(spoiled, lambda weights: weights["lm_head.weight"].fill_(3e38))
    assert LatentVLM.from_pretrained(spoiled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_of_every_width(dtype, value):
    for size in (1, 7, 5000):
        weights = torch.full((size, 9), 3.0, dtype=dtype)
        weights[0, 0] = torch.finfo(dtype).max
        check_finite([("sound", weights), ("whole", torch.ones(3, dtype=torch.int64))], "here")
        weights[size // 2, 5] = value
        with pytest.raises(MirageError, match=rf"^here: spoilt holds 1 of {size * 9:,} numbers that are NaN"):
            check_finite([("spoilt", weights)], "here")


def test_both_inf_signs_in_one_tensor(spoiled):
    def spoil(weights):
        weights["lm_head.weight"][0, :2] = torch.tensor([math.inf, -math.inf])

    edit_weights(spoiled, spoil)
    refused(spoiled, "lm_head.weight holds 2 of")


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "other shape", "other names", "NaN"])
def test_a_feedback_that_does_not_fit(fresh, tmp_path, kind):
    config = LatentConfig(**{**vars(fresh.config), "feedback": "linear"})
    vlm = LatentVLM(fresh.model, fresh.tokenizer, fresh.image_processor, config)
    folder = tmp_path / "linear"
    vlm.save_pretrained(folder)
    file = folder / checkpoint.FEEDBACK_FILE
    weights = load_file(file)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("not weights at all, but long enough to be read")
    elif kind == "other shape":
        save_file({name: tensor.new_zeros(3, 3) for name, tensor in weights.items()}, file)
    elif kind == "other names":
        save_file({f"x.{name}": tensor for name, tensor in weights.items()}, file)
    else:
        save_file({name: tensor * math.nan for name, tensor in weights.items()}, file)
    refused(folder, checkpoint.FEEDBACK_FILE)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_weights_file_that_was_cut(spoiled, length):
    weights = (spoiled / "model.safetensors").read_bytes()
    (spoiled / "model.safetensors").write_bytes(weights[:length])
    refused(spoiled, "cannot be loaded")


# -- tokenizer and chat template -------------------------------------------------------------------------------------


def test_a_tokenizer_with_more_tokens_than_rows(spoiled):
    tokenizer = AutoTokenizer.from_pretrained(spoiled)
    tokenizer.add_tokens([f"word{i}" for i in range(40)])
    tokenizer.save_pretrained(spoiled)
    refused(spoiled, "the embedding table has")


def test_a_base_with_another_models_tokenizer(spoiled):
    train_tokenizer([f"word{i} and other{i}" for i in range(900)], 1024).save_pretrained(spoiled)
    with pytest.raises(MirageError, match=r"the embedding table has .* rows; it is another model's tokenizer"):
        LatentVLM.from_base(spoiled)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "there is no chat template"),
        ("", "there is no chat template"),
        ("{% for message in messages %}", "the chat template is broken"),
        ("{{ messages[9].content }}", "the chat template"),
        ("{{ raise_exception('never') }}", "the chat template is broken: never"),
        ("{{ 1 / 0 }}", "the chat template is broken"),
        ("{{ 'a' + 1 }}", "the chat template is broken"),
        ("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n", "writes a user's text 0 times"),
        (CHAT_TEMPLATE.replace("{{ part.text }}", "{{ part.text }}{{ part.text }}"), "writes a user's text 2 times"),
        (CHAT_TEMPLATE.replace("<|image_pad|>", ""), "makes 0 places for one picture"),
        (CHAT_TEMPLATE.replace("<|image_pad|>", "<|image_pad|><|image_pad|>"), "makes 2 places for one picture"),
        (CHAT_TEMPLATE.replace("add_generation_prompt", "nobody"), "does not begin the answer"),
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", "makes 0 places"),
    ],
)
def test_chat_templates_that_do_not_do(spoiled, template, said):
    if template is None:
        (spoiled / "chat_template.jinja").unlink()
    else:
        (spoiled / "chat_template.jinja").write_text(template)
    refused(spoiled, said)


def test_a_template_that_refuses_these_turns(fresh):
    fresh.tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(MirageError, match="the chat template refuses this prompt: no system turn"):
        fresh.encoder.prompt([user_turn("Go")])


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer(spoiled, file):
    (spoiled / file).write_text("{")
    refused(spoiled)

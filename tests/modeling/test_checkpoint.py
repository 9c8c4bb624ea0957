"""Checkpoints: what is saved is loaded, tokens are added by name, and bad ones are refused in one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import CORPUS, batch_of, distance, ragged
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentConfig, LatentVLM, checkpoint
from mirage_vlm.modeling.checkpoint import has_latents
from mirage_vlm.modeling.config import LATENT_TOKENS
from mirage_vlm.modeling.scratch import SPECIAL_TOKENS, train_tokenizer
from mirage_vlm.training.losses import stage2

REFERENCE_KEYS = {"latent_size", "latent_token_id", "latent_start_id", "latent_end_id", "compress_strategy"}


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture
def spoiled(saved, tmp_path) -> Path:
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "spoiled"))


def edit_config(folder: Path, **changes: object) -> None:
    """Set keys of `config.json`; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- round trips -----------------------------------------------------------------------------------------------------


def test_a_saved_model_is_loaded_as_it_was(tiny, saved):
    again = LatentVLM.from_pretrained(saved, attn="eager")
    assert not again.training
    assert again.config == tiny.config
    assert same_weights(again, tiny)
    assert again.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    for trajectory in ragged():
        before, after = tiny.encoder.example(trajectory), again.encoder.example(trajectory)
        assert torch.equal(before.input_ids, after.input_ids) and torch.equal(before.labels, after.labels)
        if before.helpers is not None:
            assert torch.equal(before.helpers.pixel_values, after.helpers.pixel_values)
    batch = batch_of(tiny, ragged(), targets=False)
    with torch.no_grad():
        assert distance(stage2(again, batch).hidden, stage2(tiny, batch).hidden) == 0


def test_the_feedbacks_weights_are_part_of_the_checkpoint(fresh, tmp_path):
    config = replace(fresh.config, feedback="linear", pooling="grid", stop_rule="learned", latent_size=7)
    vlm = LatentVLM(fresh.model, fresh.tokenizer, fresh.image_processor, config).eval()
    with torch.no_grad():
        vlm.feedback.proj.weight.normal_(0, 0.2)
        vlm.feedback.proj.bias.normal_()
    vlm.save_pretrained(tmp_path / "linear")
    again = LatentVLM.from_pretrained(tmp_path / "linear", attn="eager")
    assert again.config == config
    assert same_weights(again, vlm)
    batch = batch_of(vlm, ragged(), targets=False)
    with torch.no_grad():
        assert distance(stage2(again, batch).consumed, stage2(vlm, batch).consumed) == 0

    (tmp_path / "linear" / checkpoint.FEEDBACK_FILE).unlink()
    with pytest.raises(MirageError, match="feedback 'linear' has weights, but latent_feedback"):
        LatentVLM.from_pretrained(tmp_path / "linear")


def test_options_win_over_the_checkpoint(saved):
    again = LatentVLM.from_pretrained(saved, latent_size=9, pooling="full", feedback="linear", dtype=torch.bfloat16)
    assert (again.config.latent_size, again.config.pooling, again.config.feedback) == (9, "full", "linear")
    assert again.encoder.config is again.config
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_another_feedback_starts_afresh(fresh, tmp_path):
    linear = replace(fresh.config, feedback="linear")
    LatentVLM(fresh.model, fresh.tokenizer, fresh.image_processor, linear).save_pretrained(tmp_path / "linear")
    assert LatentVLM.from_pretrained(tmp_path / "linear", feedback="identity").config.feedback == "identity"


def test_plain_transformers_loads_it(tiny, saved):
    model = AutoModelForImageTextToText.from_pretrained(saved, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(saved)
    ids = tokenizer("The elf walks over the ice<|latent_start|>", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == tiny.config.start_id
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, tiny.model(input_ids=ids).logits)


def test_it_has_the_keys_of_the_reference(tiny, saved):
    config = json.loads((saved / "config.json").read_text())
    assert config.keys() >= REFERENCE_KEYS
    ids = [config[key] for key in ("latent_start_id", "latent_token_id", "latent_end_id")]
    assert ids == tiny.tokenizer.convert_tokens_to_ids(["<|latent_start|>", "<|latent_pad|>", "<|latent_end|>"])


def test_a_checkpoint_with_only_the_keys_of_the_reference(spoiled):
    own = {"latent_feedback", "latent_stop_rule", "image_scale"}
    edit_config(spoiled, **dict.fromkeys(own), latent_size=6, compress_strategy="average", stage="stage2")
    assert not own & json.loads((spoiled / "config.json").read_text()).keys()
    config = LatentVLM.from_pretrained(spoiled).config
    assert (config.latent_size, config.pooling) == (6, "average")
    assert (config.feedback, config.stop_rule, config.image_scale) == ("identity", "fixed", 1.0)


# -- from a base -----------------------------------------------------------------------------------------------------


def base_checkpoint(tiny: LatentVLM, folder: Path, spare: int, tied: bool) -> Path:
    """An ordinary VLM whose table has so many rows more than its tokenizer has tokens."""
    tokenizer = train_tokenizer(CORPUS, 1024)
    settings = tiny.model.config.to_dict()
    for key in [key for key in settings if key.startswith("latent_") or key in ("compress_strategy", "image_scale")]:
        del settings[key]
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = tied
    settings["text_config"]["vocab_size"] = len(tokenizer) + spare
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny.image_processor.save_pretrained(folder)
    assert not has_latents(folder)
    return folder


@pytest.mark.parametrize(("spare", "tied"), [(0, False), (2, True), (3, False), (20, True)])
def test_from_base_adds_the_tokens_by_name(tiny, tmp_path, spare, tied):
    folder = base_checkpoint(tiny, tmp_path / "base", spare, tied)
    before = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    old = AutoTokenizer.from_pretrained(folder)
    known = len(old)
    vlm = LatentVLM.from_base(folder, attn="eager", latent_size=5, pooling="grid")

    ids = [vlm.config.start_id, vlm.config.pad_id, vlm.config.end_id]
    assert ids == [known, known + 1, known + 2]
    assert [vlm.tokenizer.convert_ids_to_tokens(i) for i in ids] == list(LATENT_TOKENS)
    assert vlm.tokenizer("a<|latent_pad|><|latent_pad|>b", add_special_tokens=False)["input_ids"][1:3] == [ids[1]] * 2
    for token in SPECIAL_TOKENS:  # those it had are special still
        assert vlm.tokenizer(token, add_special_tokens=False)["input_ids"] == [old.convert_tokens_to_ids(token)]
    assert vlm.tokenizer.decode([*ids, old.eos_token_id], skip_special_tokens=True) == ""
    assert (vlm.config.latent_size, vlm.config.pooling) == (5, "grid")

    rows = max(known + spare, known + 3)
    tables = [(vlm.model.get_input_embeddings().weight, before.get_input_embeddings().weight)]
    tables += [(vlm.model.lm_head.weight, before.lm_head.weight)]
    for now, then in tables:
        assert now.shape == (rows, tiny.width), "grown only where it was too small"
        assert torch.equal(now[:known], then[:known])
        torch.testing.assert_close(now[ids], then[:known].mean(dim=0).expand(3, -1))
        assert torch.equal(now[known + 3 :], then[known + 3 :])
    assert (vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight) == tied
    assert vlm.model.config.text_config.vocab_size == rows

    text = vlm.tokenizer("The elf walks over the ice", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        now, then = (model(input_ids=text).logits[..., :known] for model in (vlm.model, before))
        torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-5)  # a taller head may be multiplied in other blocks

    vlm.save_pretrained(tmp_path / "latent")
    again = LatentVLM.from_pretrained(tmp_path / "latent")
    assert has_latents(tmp_path / "latent")
    assert again.config == vlm.config and same_weights(again, vlm)
    assert (again.model.lm_head.weight is again.model.get_input_embeddings().weight) == tied


# -- bad checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", ["latent_token_id", "latent_start_id", "latent_end_id", "latent_size"])
def test_no_latent_tokens(spoiled, lacking):
    edit_config(spoiled, **{lacking: None})
    with pytest.raises(MirageError, match=f"{spoiled}: the checkpoint has no latent tokens .*{lacking}.*from_base"):
        LatentVLM.from_pretrained(spoiled)


@pytest.mark.parametrize("key", ["latent_token_id", "latent_start_id", "latent_end_id"])
def test_ids_that_are_not_the_tokenizers(spoiled, key):
    edit_config(spoiled, **{key: 300})
    with pytest.raises(MirageError, match=r"config.json says <\|latent_\w+\|> is 300, the tokenizer says 35\d"):
        LatentVLM.from_pretrained(spoiled)


@pytest.mark.parametrize("tokenizer", ["an older one", "none"])
def test_a_tokenizer_without_the_tokens(spoiled, tokenizer):
    for path in [*spoiled.glob("tokenizer*"), *spoiled.glob("*.jinja")]:
        path.unlink()
    if tokenizer == "an older one":
        train_tokenizer(CORPUS, 1024).save_pretrained(spoiled)
    with pytest.raises(MirageError, match="tokenizer"):
        LatentVLM.from_pretrained(spoiled)


def test_a_pooling_that_no_one_knows(spoiled):
    edit_config(spoiled, compress_strategy="avg")
    with pytest.raises(MirageError, match="unknown pooling 'avg'"):
        LatentVLM.from_pretrained(spoiled)


def test_a_family_that_no_one_knows():
    config = type("Config", (), {"model_type": "llava"})()
    with pytest.raises(MirageError, match="no adapter for model type 'llava'; known: qwen2_5_vl"):
        LatentVLM(type("Model", (), {"config": config})(), None, None, LatentConfig(4, 1, 2, 3))


def test_no_checkpoint_at_all(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", saved / "config.json"):
        with pytest.raises(MirageError, match=f"{path}: not a checkpoint"):
            LatentVLM.from_pretrained(path)
    with pytest.raises(MirageError, match=r"nowhere: no such folder"):
        LatentVLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(MirageError, match=r"nowhere: no such folder"):
        LatentVLM.from_base(tmp_path / "nowhere")


def test_a_config_that_is_not_json(spoiled):
    (spoiled / "config.json").write_text("{")
    with pytest.raises(MirageError, match="not a valid JSON file"):
        LatentVLM.from_pretrained(spoiled)


def test_no_weights(spoiled):
    (spoiled / "model.safetensors").unlink()
    with pytest.raises(MirageError, match=r"the checkpoint cannot be loaded: .*model.safetensors"):
        LatentVLM.from_pretrained(spoiled)


def test_half_the_weights_file(spoiled):
    weights = (spoiled / "model.safetensors").read_bytes()
    (spoiled / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(MirageError, match="cannot be loaded"):
        LatentVLM.from_pretrained(spoiled)


def test_a_weight_is_missing(spoiled):
    weights = load_file(spoiled / "model.safetensors")
    weights.pop(next(name for name in weights if "layers.1.mlp.down_proj" in name))
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MirageError, match="down_proj"):
        LatentVLM.from_pretrained(spoiled)


# -- atomic saving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["model", "tokenizer", "image_processor"])
def test_a_save_that_fails_leaves_no_trace(tiny, tmp_path, monkeypatch, broken):
    target = tmp_path / "kept"
    tiny.save_pretrained(target)
    before = contents(target)

    def fail(self, folder, *args, **kwargs):
        (Path(folder) / "half-written").write_text("x")
        raise OSError("no space left on the device")

    monkeypatch.setattr(type(getattr(tiny, broken)), "save_pretrained", fail)
    for name in ("kept", "new"):
        with pytest.raises(OSError, match="no space left"):
            tiny.save_pretrained(tmp_path / name)
    assert contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_save_replaces_the_whole_folder(fresh, tmp_path):
    target = tmp_path / "deep" / "model"
    linear = replace(fresh.config, feedback="linear")
    LatentVLM(fresh.model, fresh.tokenizer, fresh.image_processor, linear).save_pretrained(target)
    assert (target / checkpoint.FEEDBACK_FILE).exists()
    plain = LatentVLM(fresh.model, fresh.tokenizer, fresh.image_processor, replace(linear, feedback="identity"))
    plain.save_pretrained(target)
    assert not (target / checkpoint.FEEDBACK_FILE).exists(), "nothing of the earlier checkpoint stays"
    assert LatentVLM.from_pretrained(target).config.feedback == "identity"
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_the_processor_needs_no_torchvision(saved):
    assert "Pil" in type(AutoImageProcessor.from_pretrained(saved, backend="pil")).__name__
    assert "Pil" in type(LatentVLM.from_pretrained(saved).image_processor).__name__

"""`min_pixels` and `max_pixels`: what the model sees, what is saved, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentConfig, LatentVLM
from mirage_vlm.trajectory import Image, LatentSpan, Trajectory, assistant_turn, user_turn

PATCH = 28 * 28  # pixels of a merged patch
LARGE, SMALL = PIL.Image.new("RGB", (280, 280), "red"), PIL.Image.new("RGB", (28, 28), "red")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    """`tiny` without its image scale, so that 280 pixels are ten patches."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"image_scale": 1.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def patches(vlm: LatentVLM, picture: PIL.Image.Image) -> int:
    ids, found = vlm.encoder.prompt([user_turn(picture)])
    count = ids.count(vlm.family.image_token_id)
    height, width = vlm.family.merged_grid(found.grid_thw[0])
    assert count == height * width
    return count


def sizes(folder: Path) -> tuple[int, int]:
    size = json.loads((folder / "preprocessor_config.json").read_text())["size"]
    return size["shortest_edge"], size["longest_edge"]


def test_limits_decide_how_many_patches_a_picture_has(saved):
    assert patches(LatentVLM.from_pretrained(saved), LARGE) == 100
    assert patches(LatentVLM.from_pretrained(saved, max_pixels=16 * PATCH), LARGE) == 16
    assert patches(LatentVLM.from_pretrained(saved, min_pixels=9 * PATCH), SMALL) == 9
    both = LatentVLM.from_pretrained(saved, min_pixels=4 * PATCH, max_pixels=25 * PATCH)
    assert (patches(both, SMALL), patches(both, LARGE)) == (4, 25)
    assert (both.config.min_pixels, both.config.max_pixels) == (4 * PATCH, 25 * PATCH)


def test_they_hold_for_helper_images_and_what_is_said_of_spans(saved):
    vlm = LatentVLM.from_pretrained(saved, max_pixels=4 * PATCH)
    span = LatentSpan(helper=Image(LARGE), k=5)
    example = Trajectory((user_turn("Go"), assistant_turn(span)))
    for refuse in (lambda: vlm.encoder.check_span(span, example), lambda: vlm.encoder.example(example)):
        with pytest.raises(MirageError, match=r"5.*4"):
            refuse()
    vlm.encoder.check_span(replace(span, k=4), example)
    LatentVLM.from_pretrained(saved).encoder.check_span(span, example)


def test_they_are_saved_for_everybody(saved, tmp_path):
    LatentVLM.from_pretrained(saved, max_pixels=16 * PATCH).save_pretrained(tmp_path / "one")
    assert sizes(tmp_path / "one") == (PATCH, 16 * PATCH)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["max_pixels"] == 16 * PATCH and "min_pixels" not in config
    again = LatentVLM.from_pretrained(tmp_path / "one")
    assert again.config.max_pixels == 16 * PATCH and patches(again, LARGE) == 16
    plain = AutoImageProcessor.from_pretrained(tmp_path / "one", backend="pil")
    found = plain(images=[LARGE], return_tensors="pt")
    assert torch.equal(found["pixel_values"], again.encoder.pictures([Image(LARGE)]).pixel_values)

    again = LatentVLM.from_pretrained(tmp_path / "one", min_pixels=2 * PATCH, max_pixels=25 * PATCH)
    again.save_pretrained(tmp_path / "two")
    assert sizes(tmp_path / "two") == (2 * PATCH, 25 * PATCH)
    assert patches(LatentVLM.from_pretrained(tmp_path / "two"), LARGE) == 25


def test_without_them_a_checkpoint_stays_as_it_is(saved, tmp_path):
    before = {path.name: path.read_bytes() for path in saved.glob("*.json")}
    vlm = LatentVLM.from_pretrained(saved)
    vlm.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "preprocessor_config.json").read_bytes() == before["preprocessor_config.json"]
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "min_pixels" not in config and "max_pixels" not in config
    processor = vlm.image_processor
    assert LatentVLM(vlm.model, vlm.tokenizer, processor, vlm.config).image_processor is processor


def test_the_callers_processor_is_left_alone(tiny):
    vlm = copy.deepcopy(tiny)
    before = vlm.image_processor.to_dict()
    config = replace(vlm.config, max_pixels=16 * PATCH)
    assert LatentVLM(vlm.model, vlm.tokenizer, vlm.image_processor, config).image_processor is not vlm.image_processor
    assert vlm.image_processor.to_dict() == before


def test_as_qwen_checkpoints_write_them(saved, tmp_path):
    """Qwen2.5-VL's own `preprocessor_config.json` has the two at its top, and no `size`."""
    folder = Path(shutil.copytree(saved, tmp_path / "qwen"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    del settings["size"]
    settings |= {"min_pixels": 3136, "max_pixels": 64 * PATCH}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert patches(LatentVLM.from_pretrained(folder), LARGE) == 64
    assert patches(LatentVLM.from_pretrained(folder, max_pixels=16 * PATCH), LARGE) == 16


def test_files_that_disagree(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "spoiled"))
    config = json.loads((folder / "config.json").read_text()) | {"max_pixels": 5000}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        MirageError, match=r"spoiled: config\.json says max_pixels is 5000, but preprocessor_config\.json"
    ):
        LatentVLM.from_pretrained(folder)
    assert patches(LatentVLM.from_pretrained(folder, max_pixels=16 * PATCH), LARGE) == 16


@pytest.mark.parametrize("value", [0, -1, 1.5, 784.0, True, "784", "", [784]])
@pytest.mark.parametrize("name", ["min_pixels", "max_pixels"])
def test_numbers_that_are_none(saved, name, value):
    with pytest.raises(MirageError, match=f"{name} must be a whole number of at least 1, not ") as at:
        LatentVLM.from_pretrained(saved, **{name: value})
    assert repr(value) in str(at.value)
    with pytest.raises(MirageError, match=f"{name} must be"):
        LatentConfig(4, 1, 2, 3, **{name: value})


def test_a_least_above_the_most(saved):
    with pytest.raises(MirageError, match=r"min_pixels is 1000, above max_pixels, which is 900$"):
        LatentVLM.from_pretrained(saved, min_pixels=1000, max_pixels=900)
    with pytest.raises(MirageError, match=r"min_pixels is 300000, above .* 200704; .* has max_pixels=200704"):
        LatentVLM.from_pretrained(saved, min_pixels=300_000)
    with pytest.raises(MirageError, match=r"min_pixels is 784, above .* 783; .* has min_pixels=784"):
        LatentVLM.from_pretrained(saved, max_pixels=783)

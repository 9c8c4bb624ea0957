"""Kept features of a frozen vision tower: the same training, no second pass through the tower, never a stale one."""

import copy
import errno
import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SCRATCH, dialogue, distance, gradients, picture, ragged, span

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.features import FeatureStore, fingerprint, picture_keys
from mirage_vlm.training import losses, run
from mirage_vlm.training.data import Collator
from mirage_vlm.training.recipe import load_recipe
from mirage_vlm.training.rollout import Batch

WITHIN = 1e-6


@pytest.fixture
def frozen(fresh) -> LatentVLM:
    fresh.vision_tower.requires_grad_(False)
    return fresh


class Seen:
    """How often the tower was run, and over how many patches in all."""

    def __init__(self, vlm: LatentVLM):
        self.calls = self.patches = 0
        vlm.vision_tower.register_forward_pre_hook(self.count)

    def count(self, _, inputs) -> None:
        self.calls += 1
        self.patches += len(inputs[0])


def batch_of(vlm: LatentVLM, trajectories: list, stage: str, keys: bool = True) -> Batch:
    return Batch(**Collator(vlm.encoder, targets=stage == "stage1", keys=keys)(trajectories))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# -- names -----------------------------------------------------------------------------------------------------------


def test_pictures_are_named_by_their_content(tiny):
    images = [picture(2, 3, 1), picture(3, 2, 2), picture(2, 3, 1)]
    pictures = tiny.encoder.pictures(images)
    keys = picture_keys(pictures.pixel_values, pictures.grid_thw)
    assert keys[0] == keys[2] != keys[1]
    alone = tiny.encoder.pictures(images[1:2])
    assert picture_keys(alone.pixel_values, alone.grid_thw) == keys[1:2], "whatever it comes with"
    bent = pictures.pixel_values.clone()
    bent[0, 0] += 1e-6
    assert [a == b for a, b in zip(picture_keys(bent, pictures.grid_thw), keys, strict=True)] == [False, True, True]
    turned = pictures.grid_thw[:, [0, 2, 1]]
    assert not set(picture_keys(pictures.pixel_values, turned)) & set(keys), "the shape counts"
    half = picture_keys(pictures.pixel_values.bfloat16(), pictures.grid_thw)
    assert not set(half) & set(keys)


def test_a_tower_is_named_by_what_its_features_depend_on(frozen, tmp_path):
    tower = frozen.vision_tower
    own = fingerprint(tower)
    frozen.save_pretrained(tmp_path / "saved")
    assert fingerprint(LatentVLM.from_pretrained(tmp_path / "saved").vision_tower) == own, "saved and loaded"
    assert fingerprint(copy.deepcopy(tower).bfloat16()) != own
    wider = copy.deepcopy(tower)
    wider.config.window_size += 28
    assert fingerprint(wider) != own, "the same weights may see in other windows"
    with torch.no_grad():
        next(iter(tower.parameters())).view(-1)[0] += 1e-3
    assert fingerprint(tower) != own


# -- the same training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [True, False], ids=["keys-from-the-collator", "keys-from-the-store"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_losses_are_the_same_and_the_tower_runs_once(frozen, tmp_path, stage, keys):
    batch = batch_of(frozen, ragged(), stage, keys)
    assert (batch.picture_keys is not None) == keys and (batch.helper_keys is None) == (stage == "stage2" or not keys)
    loss = getattr(losses, stage)
    plain = loss(frozen, batch)
    expected = gradients(frozen, plain.ce + plain.align)
    frozen.feature_store = FeatureStore(tmp_path, frozen.vision_tower)
    seen = Seen(frozen)
    for _ in range(2):
        found = loss(frozen, batch)
        assert distance(found.ce_sum, plain.ce_sum) < WITHIN and distance(found.align_sum, plain.align_sum) < WITHIN
        assert distance(found.hidden, plain.hidden) < WITHIN
        got = gradients(frozen, found.ce + found.align)
        assert max(distance(got[name], expected[name]) for name in expected) < 1e-5
        assert seen.calls == (2 if stage == "stage1" else 1), "helper images have a pass of their own; all once"
    assert len(files(tmp_path)) == 4 + (6 if stage == "stage1" else 0)


def test_a_picture_seen_several_times_runs_once(frozen, tmp_path):
    one, other = picture(2, 3, 1), picture(3, 1, 2)
    rows = [
        dialogue([one, "Which way?"], ["Go"]),
        dialogue([other, one, "Which way?"], ["up"]),
        dialogue([one], ["up"]),
    ]
    batch = batch_of(frozen, rows, "stage2")
    with torch.no_grad():
        plain = frozen.embed_prompt(batch.input_ids, batch.pixel_values, batch.grid_thw)
        frozen.feature_store = FeatureStore(tmp_path, frozen.vision_tower)
        seen = Seen(frozen)
        found = frozen.embed_prompt(batch.input_ids, batch.pixel_values, batch.grid_thw, batch.picture_keys)
    assert distance(found, plain) < WITHIN, "each in its place"
    assert seen.patches == 4 * (6 + 3) < len(batch.pixel_values)


def test_what_is_known_and_what_is_not_come_together(frozen, tmp_path):
    images = [picture(2, 3, n) for n in range(4)]
    everything = frozen.encoder.pictures(images)
    some = frozen.encoder.pictures(images[1:3])
    with torch.no_grad():
        plain = frozen.image_features(everything.pixel_values, everything.grid_thw)
        frozen.feature_store = FeatureStore(tmp_path, frozen.vision_tower)
        frozen.image_features(some.pixel_values, some.grid_thw)
        seen = Seen(frozen)
        found = frozen.image_features(everything.pixel_values, everything.grid_thw)
    assert seen.patches == 2 * 24
    for a, b in zip(found, plain, strict=True):
        assert distance(a, b) < WITHIN


def test_where_a_gradient_is_wanted_nothing_is_kept(frozen, tmp_path):
    frozen.feature_store = FeatureStore(tmp_path, frozen.vision_tower)
    batch = batch_of(frozen, [dialogue(["Go"], ["up ", span(0, 2)])], "stage1")
    frozen.vision_tower.requires_grad_(True)
    loss = losses.stage1(frozen, batch, detach_targets=False)
    assert any(g.abs().sum() > 0 for name, g in gradients(frozen, loss.align).items() if ".visual." in name)
    assert files(tmp_path) == []


# -- never stale -----------------------------------------------------------------------------------------------------


def look(vlm: LatentVLM, image) -> torch.Tensor:
    pictures = vlm.encoder.pictures([image])
    with torch.no_grad():
        return vlm.image_features(pictures.pixel_values, pictures.grid_thw)[0]


@pytest.mark.parametrize("how", ["another run", "the same run"])
def test_a_changed_tower_is_a_miss(frozen, tmp_path, how):
    image = picture(2, 3, 1)
    frozen.feature_store = FeatureStore(tmp_path, frozen.vision_tower)
    before = look(frozen, image)
    with torch.no_grad():
        frozen.vision_tower.patch_embed.proj.weight.mul_(1.1)
    if how == "another run":
        frozen.feature_store = FeatureStore(tmp_path, frozen.vision_tower)
    else:
        frozen.feature_store.look_again()
    seen = Seen(frozen)
    assert distance(look(frozen, image), before) > 1e-3 and seen.calls == 1
    assert len(files(tmp_path)) == 2


def test_mixed_precision_has_features_of_its_own(frozen, tmp_path):
    image = picture(2, 3, 1)
    frozen.feature_store = FeatureStore(tmp_path, frozen.vision_tower)
    full = look(frozen, image)
    seen = Seen(frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = [look(frozen, image) for _ in range(2)]
    assert seen.calls == 1 and torch.equal(*half) and not torch.equal(half[0].float(), full)
    assert {path.parts[-3] for path in files(tmp_path)} == {"float32", "bfloat16"}


def test_a_tower_in_bfloat16(frozen, tmp_path):
    frozen.vision_tower.bfloat16()
    frozen.feature_store = FeatureStore(tmp_path, frozen.vision_tower)
    first, again = look(frozen, picture(2, 2, 1)), look(frozen, picture(2, 2, 1))
    assert first.dtype == again.dtype == torch.bfloat16 and torch.equal(first, again)


# -- damage ----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut short": cut,
    "a bit flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "nonsense": lambda path: path.write_bytes(b"nonsense" * 20),
    "another tensor": lambda path: save_file({"x": torch.zeros(3)}, path, metadata={"crc32": "0"}),
    "no checksum": lambda path: save_file({"features": torch.zeros(3)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_computed_anew_with_a_warning(frozen, tmp_path, caplog, damage):
    image = picture(2, 3, 1)
    frozen.feature_store = FeatureStore(tmp_path, frozen.vision_tower)
    expected = look(frozen, image)
    (path,) = files(tmp_path)
    damage(path)
    seen = Seen(frozen)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(look(frozen, image), expected) and seen.calls == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: damaged (") and "\n" not in record.getMessage()
    assert torch.equal(look(frozen, image), expected) and seen.calls == 1, "and is whole again"


def test_a_full_disk_ends_the_keeping_not_the_run(frozen, tmp_path, caplog, monkeypatch):
    frozen.feature_store = FeatureStore(tmp_path, frozen.vision_tower)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    seen = Seen(frozen)
    with caplog.at_level(logging.WARNING):
        for seed in (1, 1, 2):
            look(frozen, picture(2, 2, seed))
    assert seen.calls == 3 and files(tmp_path) == []
    (record,) = caplog.records
    assert "cannot be written (No space left on device); no more features are kept" in record.getMessage()


def test_a_folder_that_cannot_be(frozen, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MirageError, match=rf"^{tmp_path}/file: cannot keep features there: Not a directory$"):
        FeatureStore(tmp_path / "file", frozen.vision_tower)


# -- several processes -----------------------------------------------------------------------------------------------


def work(folder, tower, pixels, grids, start, report) -> None:
    """Ask for the same pictures at the same time as another process does; the tower only cuts what it is given."""
    logging.raiseExceptions = True
    faults = []
    handler = logging.Handler()
    handler.emit = lambda record: faults.append(record.getMessage())
    logging.getLogger("mirage_vlm").addHandler(handler)
    store = FeatureStore(folder, tower)
    computed = []

    def cut_up(pixel_values, grid_thw):
        computed.append(len(grid_thw))
        return [part[:, :64].clone() for part in pixel_values.split(4)]

    wrong = 0
    for i in range(len(grids)):
        start.wait()
        own = slice(4 * i, 4 * i + 4)
        (found,) = store.features(pixels[own], grids[i : i + 1], None, cut_up)
        wrong += not torch.equal(found, pixels[own, :64])
    report.put((len(computed), wrong, faults))


def test_two_processes_share_a_folder(frozen, tmp_path):
    context = multiprocessing.get_context("fork")
    pixels, grids = torch.rand(4 * 150, 1176), torch.tensor([[1, 2, 2]] * 150)
    start, report = context.Barrier(2, timeout=20), context.Queue()
    arguments = (tmp_path, frozen.vision_tower, pixels, grids, start, report)
    both = [context.Process(target=work, args=arguments, daemon=True) for _ in range(2)]
    for process in both:
        process.start()
    reports = [report.get(timeout=40) for _ in both]
    for process in both:
        process.join(timeout=20)
    assert [(wrong, faults) for _, wrong, faults in reports] == [(0, [])] * 2
    assert sum(computed for computed, _, _ in reports) >= 150
    kept = files(tmp_path)
    assert len(kept) == 150 and all(path.suffix == ".safetensors" for path in kept), "nothing half written is left"
    assert all(load_file(path)["features"].shape == (4, 64) for path in kept)


# -- in a run --------------------------------------------------------------------------------------------------------

RECIPE = """\
stage: stage1
output_dir: {folder}/run
model:
  scratch: {scratch}
  latent_size: 3
  image_scale: 0.4375
  attn: eager
  freeze_vision: true
data: [{{task: vsp-planning, levels: [3, 4], n: 12, style: mixed}}]
train:
  epochs: 2
  batch_size: 4
  learning_rate: 1.0e-3
  log_every: 1
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, scratch=SCRATCH))
    return lambda *overrides: load_recipe(path, overrides)


@pytest.mark.parametrize("options", [(), ("train.workers=2", "train.pack=200")], ids=["plain", "packed-with-workers"])
def test_a_run_with_a_cache_trains_the_same_model(recipe, tmp_path, monkeypatch, options):
    """The tower runs in the first epoch only, and not at all in another run of the same data."""
    plain = run.train(recipe())
    counts = []
    own = FeatureStore.__init__

    def watched(self, folder, tower):
        own(self, folder, tower)
        counts.append(0)
        tower.register_forward_pre_hook(lambda *_: counts.append(counts.pop() + 1))

    monkeypatch.setattr(FeatureStore, "__init__", watched)
    cache = f"train.feature_cache={tmp_path}/cache"
    runs = [run.train(recipe(cache, *options, f"output_dir={tmp_path}/{name}")) for name in ("first", "second")]
    assert counts == [6, 0], "three batches of prompts and of helper images"
    one = load_file(plain / "model.safetensors")
    for other in runs:
        kept = load_file(other / "model.safetensors")
        assert max((one[name] - kept[name]).abs().max() for name in one) < 1e-6
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[:6] for name in ("run", "first", "second")]
    for step in zip(*lines, strict=True):
        losses_ = [json.loads(line)["loss"] for line in step]
        assert losses_ == pytest.approx([losses_[0]] * 3, rel=1e-5)


def test_a_trained_tower_is_refused(recipe, tmp_path, fresh):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        RECIPE.format(folder=tmp_path, scratch=SCRATCH).replace("true", "false") + "  feature_cache: cache\n"
    )
    with pytest.raises(
        MirageError, match=rf"^{path}:16: train.feature_cache: features of a vision tower that is train"
    ):
        load_recipe(path)
    with pytest.raises(MirageError, match="features of a vision tower that is trained cannot be kept"):
        FeatureStore(tmp_path / "cache", fresh.vision_tower)
    assert not (tmp_path / "cache").exists()


def test_keys_are_made_only_where_they_are_used(tiny):
    batch = Collator(tiny.encoder, targets=True)(ragged())
    assert "picture_keys" not in batch
    keyed = Collator(tiny.encoder, targets=True, keys=True)([dialogue(["Go"], ["up"])])
    assert not {"picture_keys", "helper_keys"} & keyed.keys(), "there is no picture"
    again = replace(Collator(tiny.encoder, targets=True), keys=True)(ragged())
    assert len(again["picture_keys"]) == 4 and len(again["helper_keys"]) == 6

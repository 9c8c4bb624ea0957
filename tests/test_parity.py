"""The reference implementation's numbers, reproduced; see `tests/data/parity/README.md`.

`MIRAGE_PARITY_DIR` names another folder of such numbers.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import distance, shifted
from transformers import AutoModelForImageTextToText

from mirage_vlm.modeling import LatentConfig, LatentVLM
from mirage_vlm.modeling.decoder import checkpoint_activations
from mirage_vlm.training.losses import StageLoss, stage1, stage2
from mirage_vlm.training.rollout import Batch

ROOT = Path(__file__).parent.parent
OWN = ROOT / "tests" / "data" / "parity"
SOURCE = ROOT.parent / "shared" / "parity"
FOLDER = Path(os.environ.get("MIRAGE_PARITY_DIR") or OWN)
CASES = sorted(path for path in FOLDER.iterdir() if path.is_dir()) if FOLDER.is_dir() else []
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
WITHIN = 1e-4

COMPANY = ("alone", "beside-text", "beside-spans")


def test_there_are_golden_numbers():
    assert CASES, f"{FOLDER} holds no folder of golden numbers: nothing would be compared with the reference"


def test_the_copy_is_the_original():
    if not SOURCE.is_dir():
        if IN_CI:
            pytest.fail("../shared/parity, where the golden numbers come from, is missing: CI must compare them")
        pytest.skip("../shared/parity is not on this machine; its copy is used")
    files = [sorted(p.relative_to(top) for p in top.rglob("*") if p.is_file()) for top in (SOURCE, OWN)]
    assert files[0] == files[1]
    for name in files[0]:
        assert (OWN / name).read_bytes() == (SOURCE / name).read_bytes(), name


# -- one golden example, and rows made from it to stand beside it ----------------------------------------------------


@dataclass(frozen=True)
class Golden:
    """What a folder holds, and the model in it."""

    inputs: dict[str, torch.Tensor]
    numbers: dict
    tensors: dict[str, torch.Tensor]
    vlm: LatentVLM

    @property
    def ids(self) -> list[int]:
        return self.inputs["input_ids"][0].tolist()


@cache
def _golden(folder: Path, attention: str) -> Golden:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    numbers = json.loads((folder / "expected.json").read_text())
    vlm = LatentVLM(model, None, None, LatentConfig.read(model.config, str(folder)))
    return Golden(load_file(folder / "inputs.safetensors"), numbers, load_file(folder / "expected.safetensors"), vlm)


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def folder(request) -> Path:
    return request.param


@pytest.fixture(params=[False, True], ids=["", "checkpointed"])
def golden(request, folder) -> Iterator[Golden]:
    found = _golden(folder, "eager")
    found.vlm.train()
    found.vlm.requires_grad_(True)
    if request.param:
        checkpoint_activations(found.vlm.model)
    yield found
    checkpoint_activations(found.vlm.model, on=False)


@dataclass(frozen=True)
class Row:
    """A row of a batch: ids, labels, and by how much its pictures differ from the golden ones; None = it has none."""

    ids: list[int]
    labels: list[int]
    image: float | None = None
    helpers: tuple[float, ...] = ()


def _golden_row(golden: Golden) -> Row:
    has_image = "pixel_values" in golden.inputs
    spans = sum(a != b and b == golden.vlm.config.pad_id for a, b in zip(golden.ids, golden.ids[1:], strict=False))
    return Row(golden.ids, golden.inputs["labels"][0].tolist(), 1.0 if has_image else None, (1.0,) * spans)


def _other_rows(golden: Golden, spans: bool) -> list[Row]:
    """Rows that the golden one must not feel; they bear no labels, so that the cross-entropy is its alone."""
    config, start = golden.vlm.config, golden.numbers["prompt_length"]
    image = golden.vlm.family.image_token_id
    prompt = golden.ids[:start]
    vision = {image, golden.vlm.model.config.vision_start_token_id, golden.vlm.model.config.vision_end_token_id}
    words = [i for i in prompt if i not in vision]
    latent = {config.start_id, config.pad_id, config.end_id}
    answer = [i for i in golden.ids[start:] if i not in latent]
    most = int(golden.inputs["helper_image_grid_thw"][0].prod()) // 4  # merged patches
    k = golden.numbers["k"]

    def row(ids: list[int], image: float | None = None, helpers: tuple[float, ...] = ()) -> Row:
        return Row(ids, [-100] * len(ids), image, helpers)

    def thought(k: int) -> list[int]:
        return [config.start_id] + [config.pad_id] * k + [config.end_id]

    seen = 0.5 if "pixel_values" in golden.inputs else None
    text = [row(words[1:] + answer), row(prompt + answer + answer + answer, seen)]
    if not spans:
        return text
    return [
        row(words[:2] + answer[:1] + thought(max(1, k - 1)) + answer, None, (0.7,)),
        text[1],
        row(prompt + answer + thought(min(k + 1, most)) + answer[:3] + thought(1) + answer, seen, (-1.0, 0.3)),
        text[0],
    ]


def _batch(golden: Golden, rows: list[Row]) -> Batch:
    width = max(len(row.ids) for row in rows)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    inputs = golden.inputs
    images = [row.image for row in rows if row.image is not None]
    helpers = [helper for row in rows for helper in row.helpers]
    pictures = {}
    if images:
        pictures["pixel_values"] = torch.cat([inputs["pixel_values"] * scale for scale in images])
        pictures["grid_thw"] = inputs["image_grid_thw"].repeat(len(images), 1)
    if helpers:
        # only the golden row has all of the golden helper images; other rows' spans take the first
        first = inputs["helper_image_grid_thw"][:1]
        patches = int(first.prod())
        pixels, grids = [], []
        for row in rows:
            if row.helpers and all(scale == 1.0 for scale in row.helpers):
                pixels.append(inputs["helper_pixel_values"])
                grids.append(inputs["helper_image_grid_thw"])
            else:
                pixels += [inputs["helper_pixel_values"][:patches] * scale for scale in row.helpers]
                grids += [first] * len(row.helpers)
        pictures |= {"helper_pixel_values": torch.cat(pixels), "helper_grid_thw": torch.cat(grids)}
    return Batch(
        padded([row.ids for row in rows], 0),
        padded([[1] * len(row.ids) for row in rows], 0),
        padded([row.labels for row in rows], -100),
        **pictures,
    )


def _beside(golden: Golden, company: str) -> tuple[Batch, int]:
    """The golden row in that company, and where it stands: neither first nor the longest."""
    mine = _golden_row(golden)
    if company == "alone":
        return _batch(golden, [mine]), 0
    first, *others = _other_rows(golden, spans=company == "beside-spans")
    batch = _batch(golden, [first, mine, *others])
    assert batch.input_ids.shape[1] > len(mine.ids), "the golden row must be padded"
    return batch, 1


def _own_latents(golden: Golden, batch: Batch, row: int, found: torch.Tensor) -> torch.Tensor:
    """Those of a batch's latents that belong to one row."""
    counts = (batch.input_ids == golden.vlm.config.pad_id).sum(dim=1).tolist()
    return found.split(counts)[row]


def _norms(vlm: LatentVLM, loss: torch.Tensor) -> dict[str, float]:
    """Gradient norm of every parameter, under the names of transformers 4."""
    vlm.zero_grad()
    loss.backward()
    names = {"model.visual.": "visual.", "model.language_model.": "model."}
    found = {}
    for name, parameter in vlm.model.named_parameters():
        for new, old in names.items():
            if name.startswith(new):
                name = old + name[len(new) :]
        found[name] = 0.0 if parameter.grad is None else parameter.grad.norm().item()
    return found


def _check_norms(found: dict[str, float], expected: dict[str, float], but: str = "nothing") -> None:
    assert set(found) == set(expected), "every named parameter is compared"
    wrong = {
        name: (found[name], value)
        for name, value in expected.items()
        if not name.startswith(but) and abs(found[name] - value) > WITHIN * abs(value)
    }
    assert not wrong


def _check(found: torch.Tensor | float, expected: torch.Tensor | float, what: str) -> None:
    apart = distance(torch.as_tensor(found, dtype=torch.float32), torch.as_tensor(expected, dtype=torch.float32))
    assert apart <= WITHIN, f"{what}: {apart:.1e} apart"


def _own_alignment(golden: Golden, batch: Batch, row: int, loss: StageLoss) -> torch.Tensor:
    """1 − cosine of one row's latents, from what the stage hands out, written as the method states it."""
    assert loss.consumed is not None
    targets = _own_latents(golden, batch, row, loss.consumed)
    at = [t for t, token in enumerate(batch.input_ids[row].tolist()) if token == golden.vlm.config.pad_id]
    pairs = [(targets[j], loss.hidden[row, t - 1]) for j, t in enumerate(at)]
    return 1 - torch.stack([(a @ b) / (a.norm() * b.norm()) for a, b in pairs]).mean()


# -- the comparisons -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("company", COMPANY)
def test_stage1(golden, company):
    batch, row = _beside(golden, company)
    expected, length = golden.numbers["stage1"], len(golden.ids)
    loss = stage1(golden.vlm, batch, detach_targets=False)  # as the reference
    assert loss.consumed is not None
    _check(_own_latents(golden, batch, row, loss.consumed), golden.tensors["stage1.targets"], "pooled targets")
    _check(loss.hidden[row, :length], golden.tensors["stage1.hidden_states"], "hidden states")
    _check(loss.ce.item(), expected["ce"], "cross-entropy")
    align = _own_alignment(golden, batch, row, loss)
    _check(align.item(), expected["one_minus_cos"], "1 - cosine")
    if company != "beside-spans":  # there the batch's own term holds the other rows' latents too
        align = loss.align
        _check(align.item(), expected["one_minus_cos"], "1 - cosine, the stage's own")
    total = 0.1 * loss.ce + align
    _check(total.item(), expected["loss"], "loss")
    _check_norms(_norms(golden.vlm, total), expected["grad_norm"])


@pytest.mark.parametrize("company", COMPANY)
def test_stage2(golden, company):
    batch, row = _beside(golden, company)
    expected, length = golden.numbers["stage2"], len(golden.ids)
    loss = stage2(golden.vlm, batch)
    assert loss.consumed is not None
    _check(_own_latents(golden, batch, row, loss.consumed), golden.tensors["stage2.latents"], "latents")
    _check(loss.hidden[row, :length], golden.tensors["stage2.hidden_states"], "hidden states")
    logits = golden.vlm.logits(loss.hidden[row, length - 1])
    _check(logits, golden.tensors["stage2.logits_last"], "logits of the last position")
    _check(loss.ce.item(), expected["ce"], "cross-entropy")
    _check_norms(_norms(golden.vlm, loss.ce), expected["grad_norm"])


def test_detached_targets_change_the_tower_only(golden):
    batch, _ = _beside(golden, "alone")
    expected = golden.numbers["stage1"]["grad_norm"]
    loss = stage1(golden.vlm, batch)
    assert loss.consumed is not None and not loss.consumed.requires_grad
    found = _norms(golden.vlm, 0.1 * loss.ce + loss.align)
    _check_norms(found, expected, but="visual.")
    tower = [name for name in expected if name.startswith("visual.")]
    assert all(abs(found[name] - expected[name]) > 10 * WITHIN * expected[name] for name in tower)
    assert all(found[name] > 0 for name in tower), "the prompt's picture still teaches the tower"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_frozen_tower_leaves_the_rest(golden, stage):
    batch, _ = _beside(golden, "alone")
    golden.vlm.vision_tower.requires_grad_(False)
    loss = stage1(golden.vlm, batch, detach_targets=False) if stage == "stage1" else stage2(golden.vlm, batch)
    total = 0.1 * loss.ce + loss.align if stage == "stage1" else loss.ce
    found = _norms(golden.vlm, total)
    _check_norms(found, golden.numbers[stage]["grad_norm"], but="visual.")
    assert all(parameter.grad is None for parameter in golden.vlm.vision_tower.parameters())


@pytest.mark.parametrize("company", ["alone", "beside-spans"])
def test_the_default_attention_of_transformers_too(folder, company):
    golden = _golden(folder, "sdpa")
    batch, row = _beside(golden, company)
    with torch.no_grad():
        first, second = stage1(golden.vlm, batch), stage2(golden.vlm, batch)
    _check(first.hidden[row, : len(golden.ids)], golden.tensors["stage1.hidden_states"], "stage 1")
    _check(second.hidden[row, : len(golden.ids)], golden.tensors["stage2.hidden_states"], "stage 2")


@pytest.mark.parametrize("fault", ["stale latent", "shifted label", "targets in another order"])
def test_the_comparison_can_fail(folder, fault, monkeypatch):
    """An off-by-one in any of the three places is seen at this tolerance."""
    golden = copy.deepcopy(_golden(folder, "eager"))
    batch, _ = _beside(golden, "alone")
    if fault == "stale latent":
        proper = golden.vlm.recast
        seen: list[torch.Tensor] = []

        def recast(token_ids: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
            seen.append(previous)
            return proper(token_ids, seen[max(0, len(seen) - 2)])

        monkeypatch.setattr(golden.vlm, "recast", recast)
        with torch.no_grad():
            found = stage2(golden.vlm, batch).hidden[0]
        with pytest.raises(AssertionError, match="apart"):
            _check(found, golden.tensors["stage2.hidden_states"], "hidden states")
    elif fault == "shifted label":
        monkeypatch.setitem(golden.inputs, "labels", golden.inputs["labels"].roll(1, dims=1))
        batch, _ = _beside(golden, "alone")
        with torch.no_grad(), pytest.raises(AssertionError, match="apart"):
            _check(stage2(golden.vlm, batch).ce.item(), golden.numbers["stage2"]["ce"], "cross-entropy")
    else:
        in_order = golden.vlm.targets
        monkeypatch.setattr(golden.vlm, "targets", lambda *a, **k: shifted(in_order(*a, **k)))
        with torch.no_grad(), pytest.raises(AssertionError, match="apart"):
            _check(stage1(golden.vlm, batch).align.item(), golden.numbers["stage1"]["one_minus_cos"], "1 - cosine")

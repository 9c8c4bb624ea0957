"""Packed rows: who shares one, that nothing is lost or reordered on the way, and that no example feels its company."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support import SCRATCH, batch_of, dialogue, distance, gradients, picture, ragged, span
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.decoder import checkpoint_activations
from mirage_vlm.training import data, run
from mirage_vlm.training.data import Collator, collate
from mirage_vlm.training.losses import stage1, stage2
from mirage_vlm.training.packing import arrange, packed_attention
from mirage_vlm.training.recipe import load_recipe
from mirage_vlm.training.rollout import Batch

WITHIN = 1e-5


def uneven() -> list:
    """Rows with 0, 1, 2 spans and pictures, so ordered that packing has to put one with a picture before another."""
    rows = ragged()
    return [rows[i] for i in (0, 4, 2, 3, 1)]


ONE_ROW = -1


def packed(vlm: LatentVLM, trajectories: list, width: int) -> Batch:
    """`ONE_ROW` puts all of them into one, whatever that costs."""
    with pytest.MonkeyPatch.context() as patch:
        if width == ONE_ROW:
            patch.setattr(data, "arrange", lambda lengths, _: [list(range(len(lengths)))])
        return Batch(**Collator(vlm.encoder, targets=True, pack=width)(trajectories))


def layout(vlm: LatentVLM, trajectories: list, width: int) -> list[list[int]]:
    """Lengths of the examples of each packed row, read off `segments`."""
    rows = packed(vlm, trajectories, width).segments.tolist()
    return [[len(list(group)) for value, group in itertools.groupby(row) if value] for row in rows]


# -- who shares a row ------------------------------------------------------------------------------------------------


def fewest_tokens(lengths: list[int], width: int) -> int:
    """Rows times their width, by trying every way of dealing the examples out."""
    fewest = []
    for deal in itertools.product(range(len(lengths)), repeat=len(lengths)):
        fills = [sum(n for n, row in zip(lengths, deal, strict=True) if row == r) for r in set(deal)]
        if max(fills) <= width:
            fewest.append(len(fills) * max(fills))
    return min(fewest)


def test_rows_hold_little_padding_and_are_never_too_long():
    rng = random.Random(0)
    spent = best = padded = 0
    for _ in range(60):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 5))]
        rows = arrange(lengths, 90)
        assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(lengths)))
        wide = max(sum(lengths[i] for i in row) for row in rows)
        assert wide <= 90
        assert len(rows) * wide <= 1.02 * len(lengths) * max(lengths), "never more than without packing"
        spent += len(rows) * wide
        best += fewest_tokens(lengths, 90)
        padded += len(lengths) * max(lengths)
    assert best <= spent < 1.04 * best and padded > 1.3 * best


def test_rows_are_as_narrow_as_little_padding_allows():
    assert arrange([30, 20, 30, 20], 99) == [[0, 1], [2, 3]], "not 80 and 20 tokens, which would pad to 160"
    assert arrange([10] * 6, 60) == [[0], [1], [2], [3], [4], [5]], "there is no padding to save"
    assert arrange([100, 100, 99, 100], 400) == [[0], [1], [2], [3]], "one token in 400 is not worth rows of 200"


def test_an_example_longer_than_a_row_widens_the_rows():
    assert arrange([50, 10, 10, 10, 20], 20) == [[0], [1, 2, 3, 4]]
    assert arrange([50], 20) == [[0]]


def test_what_comes_first_stays_first():
    assert arrange([3, 7, 3, 7], 10) == [[0, 1], [2, 3]]


# -- collation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 90, 120, ONE_ROW])
def test_every_example_is_found_again_in_the_packed_rows(tiny, width):
    trajectories = uneven()
    batch = packed(tiny, trajectories, width)
    encoded = [tiny.encoder.example(t) for t in trajectories]
    found = []
    for ids, labels, mask, segments in zip(
        batch.input_ids, batch.labels, batch.attention_mask, batch.segments, strict=True
    ):
        numbers = segments[segments > 0].unique_consecutive().tolist()
        assert numbers == list(range(1, len(numbers) + 1))
        assert torch.equal(mask, (segments > 0).long()) and torch.equal(mask, mask.sort(descending=True).values)
        assert (ids[segments == 0] == tiny.tokenizer.pad_token_id).all() and (labels[segments == 0] == -100).all()
        found += [(ids[segments == n].tolist(), labels[segments == n].tolist()) for n in numbers]
    wanted = [(e.input_ids.tolist(), e.labels.tolist()) for e in encoded]
    assert sorted(found) == sorted(wanted)
    order = [wanted.index(example) for example in found]
    images = [encoded[i].images for i in order if encoded[i].images is not None]
    helpers = [encoded[i].helpers for i in order if encoded[i].helpers is not None]
    assert torch.equal(batch.pixel_values, torch.cat([p.pixel_values for p in images])), "in the order of their tokens"
    assert torch.equal(batch.grid_thw, torch.cat([p.grid_thw for p in images]))
    assert torch.equal(batch.helper_pixel_values, torch.cat([p.pixel_values for p in helpers]))
    assert torch.equal(batch.helper_grid_thw, torch.cat([p.grid_thw for p in helpers]))


def test_the_layouts_of_these_tests_differ(tiny):
    layouts = {width: layout(tiny, uneven(), width) for width in (1, 90, 120, ONE_ROW)}
    assert [len(rows) for rows in layouts.values()] == [5, 3, 2, 1], layouts
    assert arrange([len(tiny.encoder.example(t).input_ids) for t in uneven()], 120) == [[0, 2], [1, 3, 4]]


def test_packing_saves_tokens(tiny):
    unpacked = batch_of(tiny, uneven())
    batch = packed(tiny, uneven(), 90)
    assert batch.input_ids.numel() < unpacked.input_ids.numel()
    assert int(batch.attention_mask.sum()) == int(unpacked.attention_mask.sum())


def test_the_first_token_is_never_asked_for(tiny):
    """It would be predicted from the last token of another example."""
    encoded = [tiny.encoder.example(t) for t in uneven()]
    careless = [replace(e, labels=e.input_ids.clone()) for e in encoded]
    batch = collate(careless, tiny.encoder, pack=400)
    segments, labels = batch["segments"], batch["labels"]
    begins = torch.nn.functional.pad(segments, (1, 0)).diff(dim=1) > 0
    assert begins.sum() == 5 and (labels[begins] == -100).all()
    assert (labels != -100).sum() == sum(len(e.labels) - 1 for e in encoded)


# -- the same loss and gradients -------------------------------------------------------------------------------------


def check(vlm: LatentVLM, trajectories: list, width: int) -> None:
    """Packed against each example alone: a row of its own, without padding or mask."""
    found = stage1(vlm, packed(vlm, trajectories, width))
    alone = [stage1(vlm, batch_of(vlm, [t])) for t in trajectories]
    ce, align = sum(loss.ce_sum for loss in alone), sum(loss.align_sum for loss in alone)
    assert (found.tokens, found.latents, found.correct) == tuple(
        sum(getattr(loss, name) for loss in alone) for name in ("tokens", "latents", "correct")
    )
    assert distance(found.ce_sum, ce) < WITHIN, "cross-entropy"
    assert distance(found.align_sum, align) < WITHIN, "1 - cosine"
    tokens, latents = found.tokens, max(found.latents, 1)
    got = gradients(vlm, 0.1 * found.ce_sum / tokens + found.align_sum / latents)
    wanted = gradients(vlm, 0.1 * ce / tokens + align / latents)
    apart = {name: distance(got[name], wanted[name]) for name in wanted}
    assert max(apart.values()) < WITHIN, f"gradients: {apart}"


def test_the_ragged_examples_are_uneven():
    assert {len(t.spans) for t in uneven()} == {0, 1, 2} == {len(list(t.images())) for t in uneven()}


@pytest.mark.parametrize("width", [1, 90, 120, ONE_ROW])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_the_loss_is_that_of_the_examples_alone(fresh, attn, width):
    fresh.model.set_attn_implementation(attn)
    check(fresh, uneven(), width)


def test_text_alone_packs_too(fresh):
    check(
        fresh,
        [dialogue(["Go"], [answer]) for answer in ("up", "right, then down", "left, then up, then left")],
        ONE_ROW,
    )


def test_gradient_checkpointing(fresh):
    fresh.train()
    checkpoint_activations(fresh.model)
    check(fresh, uneven(), 90)


def slow_varlen(module, query, key, value, attention_mask, scaling=None, **told):
    """What a flash kernel does with bounds, written out: each stretch of the flattened rows attends to itself."""
    assert attention_mask is None and told["max_length_q"] >= told["cu_seq_lens_q"].diff().max()
    groups = query.shape[1] // key.shape[1]
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # [B · T, heads, d]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    stretches = []
    for start, end in itertools.pairwise(told["cu_seq_lens_q"].tolist()):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scaling
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
        stretches.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v[start:end]))
    return torch.cat(stretches).view(query.shape[0], query.shape[2], *q.shape[1:]), None


@pytest.mark.parametrize("width", [90, ONE_ROW])
def test_flash_attention_is_told_the_bounds(fresh, width):
    AttentionInterface.register("slow_flash", slow_varlen)
    AttentionMaskInterface.register("slow_flash", flash_attention_mask)
    batch = packed(fresh, uneven(), width)
    expected = stage1(fresh, batch)
    fresh.language_model.config._attn_implementation = "slow_flash"
    found = stage1(fresh, batch)
    assert distance(found.hidden[batch.segments > 0], expected.hidden[batch.segments > 0]) < WITHIN
    assert distance(found.ce_sum, expected.ce_sum) < WITHIN


def test_positions_are_those_of_each_example_alone(tiny):
    batch = packed(tiny, uneven(), ONE_ROW)
    told = packed_attention(tiny, batch.input_ids, batch.segments, batch.grid_thw)
    assert told.keys() == {"attention_mask", "position_ids"} and told["attention_mask"] is None
    expected = []
    for trajectory in uneven():
        row = batch_of(tiny, [trajectory])
        text = torch.arange(row.input_ids.shape[1])[None, None]
        expected.append(torch.cat([text, tiny.positions(row.input_ids, row.attention_mask, row.grid_thw)]))
    assert torch.equal(told["position_ids"], torch.cat(expected, dim=2))


# -- no example feels its company ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "after", "between"])
def test_an_example_does_not_feel_its_neighbours(tiny, place):
    one = dialogue([picture(2, 2, 1), " Which way? "], ["Go ", span(1, 2), " up"])
    others = [dialogue(["Which way?", picture(1, 1, n)], ["Go right. ", span(n, n)]) for n in (1, 2)]
    trajectories = {"before": [one, *others], "after": [*others, one], "between": [others[0], one, others[1]]}[place]
    with torch.no_grad():
        alone = stage1(tiny, batch_of(tiny, [one])).hidden[0]
        batch = packed(tiny, trajectories, ONE_ROW)
        hidden = stage1(tiny, batch).hidden
        assert batch.segments.max() == 3
        found = hidden[batch.segments == trajectories.index(one) + 1]
        assert distance(found, alone) < WITHIN
    row = [batch.segments == n for n in (1, 2, 3)]
    embeds = tiny.embed_prompt(batch.input_ids, batch.pixel_values, batch.grid_thw).detach().requires_grad_(True)
    told = packed_attention(tiny, batch.input_ids, batch.segments, batch.grid_thw)
    out = tiny.language_model(inputs_embeds=embeds, use_cache=False, **told).last_hidden_state
    for n in range(3):
        slope = torch.autograd.grad(out[row[n]].square().sum(), embeds, retain_graph=True)[0]
        assert slope[row[n]].abs().sum() > 0 and slope[~row[n]].abs().sum() == 0, "no gradient into a neighbour"


def bend(vlm: LatentVLM, monkeypatch, change) -> None:
    """Change the position ids of packed passes only: those have four rows, text positions first."""
    own = vlm.language_model.forward

    def wrong(*args, position_ids=None, **options):
        if position_ids.shape[0] == 4:
            position_ids = change(position_ids)
        return own(*args, position_ids=position_ids, **options)

    monkeypatch.setattr(vlm.language_model, "forward", wrong)


def test_a_missing_mask_is_found_out(fresh, monkeypatch):
    """Positions alone do not keep examples apart."""
    bend(fresh, monkeypatch, lambda positions: positions[1:])
    with pytest.raises(AssertionError):
        check(fresh, uneven(), ONE_ROW)


def test_positions_that_run_on_are_found_out(fresh, monkeypatch):
    """With the mask in place: a picture's plane then counts on as text does."""
    bend(fresh, monkeypatch, lambda p: torch.cat([p[:1], torch.arange(p.shape[2]).expand_as(p[1:])]))
    with pytest.raises(AssertionError):
        check(fresh, uneven(), ONE_ROW)


def test_stage2_refuses_packed_rows(tiny):
    with pytest.raises(ValueError, match="stage 2 takes one example a row"):
        stage2(tiny, packed(tiny, uneven(), ONE_ROW))


# -- training --------------------------------------------------------------------------------------------------------

RECIPE = """\
stage: stage1
output_dir: {folder}/run
model:
  scratch: {scratch}
  latent_size: 3
  image_scale: 0.4375
  attn: eager
  freeze_vision: false
data: [{{task: vsp-planning, levels: [3, 4], n: 24, style: mixed}}]
train: {{batch_size: 4, accumulate: 2, max_steps: 4, learning_rate: 1.0e-3, warmup: 2, log_every: 1, bucket: false}}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, scratch=SCRATCH))
    return lambda *overrides: load_recipe(path, overrides)


def metrics(final) -> list[dict]:
    lines = [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "stage",
    [("stage=stage1",), ("stage=sft", "data=[{task: vsp-perception, levels: [3, 4], n: 24}]")],
    ids=["stage1", "sft"],
)
def test_a_packed_run_trains_the_same_model(recipe, tmp_path, stage):
    """Every example, step and order is as without; only the padding goes. In `sft` the pictures are read in place."""
    plain = run.train(recipe(*stage))
    packed = run.train(recipe(*stage, "train.pack=200", f"output_dir={tmp_path}/packed"))
    one, other = (load_file(final / "model.safetensors") for final in (plain, packed))
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-6
    for a, b in zip(metrics(plain), metrics(packed), strict=True):
        assert (a["tokens"], a["latents"]) == (b["tokens"], b["latents"])
        for key in ("loss", "ce", "token_accuracy", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)


def test_pack_with_stage2_is_refused(tmp_path, recipe):
    (tmp_path / "two.yaml").write_text(
        "stage: stage2\noutput_dir: x\nmodel: {path: y}\ndata: [{path: z}]\ntrain:\n  pack: 512\n"
    )
    with pytest.raises(MirageError, match=rf"^{tmp_path}/two.yaml:6: train.pack: a rollout \(stage2\) .* cannot be"):
        load_recipe(tmp_path / "two.yaml")
    with pytest.raises(MirageError, match=r"^override 'train.pack=-1': train.pack: must be 0"):
        recipe("train.pack=-1")

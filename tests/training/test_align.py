"""Alignment losses against their definitions written out, and the axes in a whole run."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import (
    SCRATCH,
    batch_of,
    check_replay,
    dialogue,
    distance,
    picture,
    slow_cross_entropy,
    slow_embeddings,
    slow_forward,
    slow_pointer,
)

from mirage_vlm.decoding import EngineConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.formats import from_record, to_record
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.feedback import build_feedback
from mirage_vlm.modeling.pooling import Resampler, Targets
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training import run
from mirage_vlm.training.align import ALIGNMENTS, Cosine
from mirage_vlm.training.losses import stage1, stage2, targets_of
from mirage_vlm.training.own import forward_own
from mirage_vlm.training.recipe import load_recipe
from mirage_vlm.trajectory import LatentSpan

IDENTITY = build_feedback("identity", 5)


def single(targets: torch.Tensor) -> Targets:
    """Targets of one part each."""
    return Targets(targets, torch.arange(len(targets)))


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)


def test_cosine(pair):
    found = Cosine()(IDENTITY, pair[0], single(pair[1]))
    expected = [1 - float(p @ t / (p.norm() * t.norm())) for p, t in zip(*pair, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_cosine_is_of_what_is_fed_back(pair):
    linear = build_feedback("linear", 5)
    torch.nn.init.normal_(linear.proj.weight)
    torch.testing.assert_close(
        Cosine()(linear, pair[0], single(pair[1])), Cosine()(IDENTITY, linear(pair[0]), single(pair[1]))
    )


def test_whitened_error_counts_each_direction_by_how_much_targets_differ_in_it(pair):
    rng = np.random.default_rng(0)
    mix = np.diag([30.0, 3.0, 1.0, 0.5, 0.0]) @ np.linalg.qr(rng.normal(size=(5, 5)))[0]  # one direction without spread
    sample = rng.normal(size=(4000, 5)) @ mix + rng.normal(size=5)
    loss = ALIGNMENTS["whitened"]()
    loss.fit(torch.from_numpy(sample).float())
    inverse = np.linalg.pinv(np.cov(sample.T, bias=True), rcond=1e-3)  # Mahalanobis' distance
    losses = loss(IDENTITY, pair[0], single(pair[1])).tolist()
    for found, prediction, target in zip(losses, *map(np.asarray, pair), strict=True):
        apart = prediction - target
        assert found == pytest.approx(apart @ inverse @ apart / 5, rel=1e-3)


def test_contrastive_asks_which_target_is_ones_own(pair):
    predicting, targets = pair
    targets = torch.cat([targets[:5], targets[:1] * 2])  # the last is the first, longer
    found = ALIGNMENTS["contrastive"]()(IDENTITY, predicting, single(targets))
    for i in range(6):
        cosines = [float(predicting[i] @ t / (predicting[i].norm() * t.norm())) for t in targets]
        others = [math.exp(c / 0.07) for j, c in enumerate(cosines) if j != i and {i, j} != {0, 5}]
        own = math.exp(cosines[i] / 0.07)
        assert found[i].item() == pytest.approx(-math.log(own / (own + sum(others))), rel=1e-4)


def test_code_is_cross_entropy_on_the_nearest_entry(pair):
    predicting, targets = pair
    codebook = build_feedback("codebook", 5, codes=4)
    codebook.table.copy_(torch.randn(4, 5, generator=torch.Generator().manual_seed(2)))
    found = ALIGNMENTS["code"]()(codebook, predicting, single(targets))
    for i in range(6):
        near = min(range(4), key=lambda c: float((targets[i] - codebook.table[c]).norm()))
        weight, bias = codebook.head.weight.detach(), codebook.head.bias.detach()
        scores = [float(w @ predicting[i] + b) for w, b in zip(weight, bias, strict=True)]
        expected = -scores[near] + math.log(sum(map(math.exp, scores)))
        assert found[i].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["cosine", "whitened", "contrastive"])
def test_under_autocast_the_loss_is_in_full_precision(pair, name):
    alignment = ALIGNMENTS[name]()
    alignment.fit(torch.randn(100, 5, generator=torch.Generator().manual_seed(3)))
    exact = alignment(IDENTITY, pair[0], single(pair[1]))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(alignment(IDENTITY, pair[0], single(pair[1])), exact)


def test_code_asks_for_all_parts_alike(pair):
    predicting, targets = pair
    codebook = build_feedback("codebook", 5, codes=4)
    codebook.table.copy_(torch.randn(4, 5, generator=torch.Generator().manual_seed(2)))
    whole = ALIGNMENTS["code"]()(codebook, predicting[:2], Targets(targets, torch.tensor([0, 0, 0, 0, 1, 1])))
    alone = ALIGNMENTS["code"]()(codebook, predicting[[0, 0, 0, 0, 1, 1]], single(targets)).tolist()
    assert whole.tolist() == pytest.approx([sum(alone[:4]) / 4, sum(alone[4:]) / 2], rel=1e-5)


def test_code_needs_a_table():
    with pytest.raises(MirageError, match="code needs a feedback that chooses, such as codebook or pointer"):
        ALIGNMENTS["code"]().check(IDENTITY)


# -- in the stages ---------------------------------------------------------------------------------------------------

BOXES = ((0.0, 0.0, 1 / 3, 0.5), (1 / 3, 0.5, 2 / 3, 1.0), (2 / 3, 0.0, 1.0, 0.5))


@pytest.fixture(scope="module")
def coded(tiny) -> LatentVLM:
    """The tiny model with a table of codes, made of random targets."""
    parts = copy.deepcopy(tiny)
    config = replace(tiny.config, feedback="codebook", codes=8)
    vlm = LatentVLM(parts.model, parts.tokenizer, parts.image_processor, config).eval()
    torch.manual_seed(0)
    vlm.feedback.fit(torch.randn(64, vlm.width))
    torch.nn.init.normal_(vlm.feedback.head.weight)
    return vlm


@pytest.fixture
def regions() -> list:
    """Two examples: a span with a box for each latent, and one that is pooled whole."""
    return [
        dialogue([picture(2, 2, 1), "Which way?"], ["Go ", LatentSpan(picture(3, 2, 7), regions=BOXES), "right."]),
        dialogue(["Go"], [LatentSpan(picture(3, 2, 8), k=2), "down."]),
    ]


def test_the_targets_of_regions_are_their_patches(tiny, regions):
    batch = batch_of(tiny, regions)
    found = targets_of(tiny, batch).pooled
    features = tiny.image_features(batch.helper_pixel_values, batch.helper_grid_thw)
    assert torch.equal(found[:3], features[0][[0, 4, 2]]), "rows of 3 patches: (0, 0), (1, 1), (0, 2)"
    torch.testing.assert_close(found[3:], torch.stack([features[1][:3].mean(0), features[1][3:].mean(0)]))


def test_targets_can_be_the_prompts_own_patches(tiny, regions):
    parts = copy.deepcopy(tiny)
    vlm = LatentVLM(parts.model, parts.tokenizer, parts.image_processor, replace(tiny.config, target="prompt"))
    example = dialogue(
        [picture(3, 2, 5), "Which way?"], [LatentSpan(regions=BOXES), "right."]
    )  # no helper image is needed
    batch = batch_of(vlm, [example])
    seen = vlm.image_features(batch.pixel_values, batch.grid_thw)[0]
    example = vlm.encoder.example(dialogue([picture(3, 2, 5), "?"], [LatentSpan(regions=BOXES), "x"]))
    assert example.helpers.pixel_values.data_ptr() == example.images.pixel_values.data_ptr(), "processed once"
    assert torch.equal(targets_of(vlm, batch).pooled, seen[[0, 4, 2]])
    with pytest.raises(MirageError, match="taken from the prompt's picture, but the prompt has none"):
        vlm.encoder.example(dialogue(["Go"], [LatentSpan(regions=BOXES), "x"]))


def test_a_latent_can_be_the_mean_of_several_regions(tiny, coded):
    """The first latent has two boxes, the second one; beside a row whose latents have one each."""
    several = (BOXES[0] + BOXES[2], BOXES[1])
    examples = [
        dialogue(["Go"], [LatentSpan(picture(3, 2, 7), regions=BOXES), "x"]),
        dialogue(["Go"], [LatentSpan(picture(3, 2, 7), regions=several), "x"]),
        dialogue(["Go"], [LatentSpan(picture(3, 2, 7), k=2), "x"]),
    ]
    found = targets_of(tiny, batch_of(tiny, examples)).pooled
    first, second, third = found[:3]
    torch.testing.assert_close(found[3:5], torch.stack([(first + third) / 2, second]))
    torch.testing.assert_close(found[5:], targets_of(tiny, batch_of(tiny, examples[2:])).pooled)
    stand_in = coded.feedback.consumed(targets_of(coded, batch_of(coded, examples[:2])))
    torch.testing.assert_close(stand_in[3], (stand_in[0] + stand_in[2]) / 2)
    read = from_record(to_record(examples[1], image_source=lambda image: "x.png"))
    assert read.spans[0].regions == several


def test_k_must_be_the_number_of_regions(tiny):
    example = dialogue(["Go"], [LatentSpan(picture(3, 2, 7), k=2, regions=BOXES), "x"])
    with pytest.raises(MirageError, match="a latent span of k = 2 has 3 regions; it needs one a latent"):
        tiny.encoder.example(example)


def test_stage_1_with_a_table_reads_its_entries(coded, regions):
    """Against a slow pass in which the nearest entries stand in the place of latents."""
    found = stage1(coded, batch_of(coded, regions), alignment=ALIGNMENTS["code"]())
    ce, align = 0.0, 0.0
    for example in regions:
        row = batch_of(coded, [example])
        targets = targets_of(coded, row)
        near = torch.stack([(coded.feedback.table - t).norm(dim=1).argmin() for t in targets.pooled])
        embeddings, places = slow_embeddings(coded, row), (row.input_ids[0] == coded.config.pad_id).nonzero().flatten()
        for place, code in zip(places.tolist(), near, strict=True):
            embeddings[place] = coded.feedback.table[code]
        hidden = slow_forward(coded, row, embeddings)
        ce += slow_cross_entropy(coded, row, hidden)
        for place, code in zip(places.tolist(), near, strict=True):
            align -= coded.feedback.head(hidden[place - 1]).log_softmax(-1)[code]
    assert found.ce_sum.item() == pytest.approx(float(ce.detach()), rel=1e-5)
    assert found.align_sum.item() == pytest.approx(float(align.detach()), rel=1e-5)
    assert found.latents == 5


def test_stage_2_can_keep_the_alignment(coded, regions):
    batch = batch_of(coded, regions)
    kept = stage2(coded, batch, alignment=ALIGNMENTS["code"]())
    without = stage2(coded, batch_of(coded, regions, targets=False))
    assert without.align_sum.item() == 0 and kept.ce_sum.item() == pytest.approx(without.ce_sum.item(), rel=1e-6)
    predicting = kept.hidden[:, :-1][batch.input_ids[:, 1:] == coded.config.pad_id]
    codes = coded.feedback.labels(targets_of(coded, batch).parts)
    chances = coded.feedback.head(predicting).log_softmax(-1).gather(1, codes[:, None])
    assert kept.align_sum.item() == pytest.approx(-chances.sum().item(), rel=1e-5)


def test_decoding_mixes_the_table(coded, regions):
    (row,) = coded.generate([regions[0]], max_new_tokens=12, latent_size=3, latent_hook=None)
    for span in row.spans:
        weights = torch.linalg.lstsq(coded.feedback.table.T.double(), span.latents.T.double()).solution  # [C, k]
        assert torch.allclose(weights.sum(0), torch.ones(len(span.latents)).double(), atol=1e-3)


@pytest.fixture(scope="module")
def pointing(tiny) -> LatentVLM:
    """The tiny model, pointing at the patches of its prompt."""
    parts = copy.deepcopy(tiny)
    config = replace(tiny.config, feedback="pointer", target="prompt")
    torch.manual_seed(3)
    vlm = LatentVLM(parts.model, parts.tokenizer, parts.image_processor, config).eval()
    for layer in (vlm.feedback.query, vlm.feedback.key):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return vlm


POINTED = [
    dialogue([picture(3, 2, 5), "Which way?"], [LatentSpan(regions=BOXES), "right."]),
    dialogue([picture(2, 2, 6), " or ", picture(1, 1, 9), "?"], ["Go ", LatentSpan(regions=BOXES[:1]), "down."]),
]


def test_a_pointer_mixes_the_patches_of_its_own_prompt(pointing):
    batch = batch_of(pointing, POINTED)
    hidden, latents = forward_own(pointing, batch)
    kept = stage2(pointing, batch, alignment=ALIGNMENTS["code"]())
    expected, align = [], 0.0
    for i, example in enumerate(POINTED):
        row = batch_of(pointing, [example])
        embeddings = slow_embeddings(pointing, row)
        places = (row.input_ids[0] == pointing.config.pad_id).nonzero().flatten().tolist()
        for place, target in zip(places, targets_of(pointing, row).pooled, strict=True):
            chances, mixture, seen = slow_pointer(pointing, row, slow_forward(pointing, row, embeddings[:place])[-1])
            apart = [float((patch - target).norm().detach()) for patch in seen]
            align -= chances[apart.index(min(apart))]
            embeddings[place] = mixture
            expected.append(mixture)
        assert distance(hidden[i, : len(embeddings)], slow_forward(pointing, row, embeddings)) < 1e-5
    assert distance(latents, torch.stack(expected)) < 1e-5
    assert kept.align_sum.item() == pytest.approx(float(align.detach()), rel=1e-5)


def test_the_patches_of_a_pointer_can_say_their_places(pointing):
    """Then they are what the targets are, patch for patch."""
    parts = copy.deepcopy(pointing)
    vlm = LatentVLM(parts.model, parts.tokenizer, parts.image_processor, replace(pointing.config, places=True)).eval()
    vlm.feedback.load_state_dict(pointing.feedback.state_dict())
    batch = batch_of(vlm, POINTED)
    embeds = vlm.embed_prompt(batch.input_ids, batch.pixel_values, batch.grid_thw)
    patches = vlm.patches_of(batch.input_ids, embeds, batch.grid_thw)
    plain = pointing.patches_of(batch.input_ids, embeds, batch.grid_thw)
    targets = targets_of(vlm, batch).pooled
    for target, patch in zip(targets[:3], patches.features[0, [0, 4, 2]], strict=True):  # BOXES in 3 × 2 patches
        torch.testing.assert_close(target, patch)
    assert not torch.allclose(patches.features, plain.features) and torch.equal(patches.there, plain.there)
    check_replay(vlm, vlm.generate(POINTED, max_new_tokens=24))


def test_a_pointer_decodes_as_it_is_trained(pointing):
    prompts = [*POINTED, dialogue(["No picture here."], ["x"]), *POINTED]
    rows = pointing.generate(prompts, max_new_tokens=24, engine=EngineConfig(max_rows=3))
    check_replay(pointing, rows)
    assert any(span.latents.abs().sum() > 0 for row in rows for span in row.spans if span.latents is not None)


# -- whole runs ------------------------------------------------------------------------------------------------------

RECIPE = """\
stage: {stage}
output_dir: {folder}/run
model:
  {model}
  latent_size: 4
  image_scale: 0.4375
  attn: eager
data: [{{task: vsp-planning, levels: [3, 4], n: 24, style: {style}}}]
train: {{learning_rate: 1.0e-3, max_steps: 2, log_every: 1, seed: 3}}
"""


def recipe_of(folder, stage, style, *overrides, model=f"scratch: {SCRATCH}"):
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, stage=stage, style=style, model=model))
    return load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("stage", "style", "overrides"),
    [
        ("stage1", "cells", ["model.feedback=codebook", "model.codes=16", "loss.alignment=code"]),
        ("stage1", "steps", ["model.feedback=rescaled", "loss.alignment=whitened", "model.stop_rule=learned"]),
        ("stage1", "cells", ["model.target=prompt", "loss.alignment=contrastive", "model.stop_rule=learned"]),
        ("stage2", "cells", ["model.feedback=codebook", "model.codes=8", "loss.align_stage2=1", "loss.alignment=code"]),
        ("stage2", "direct", ["model.feedback=pause"]),
        ("stage1", "waves", ["model.feedback=pointer", "model.target=prompt", "loss.alignment=code"]),
        ("stage1", "cells", ["model.feedback=codebook-one", "model.codes=16", "train.keep_examples=1"]),
        ("stage1", "cells", ["model.feedback=pointer", "model.target=prompt", "loss.alignment=code"]),
        ("stage2", "steps", ["train.own_share=[0.5, 1.0]", "train.visibility=evict"]),
        ("stage1", "direct", ["train.visibility=bottleneck"]),
        ("stage1", "direct", ["model.pooling=resampler"]),
        ("sft", "words", []),
        ("sft", "shown", []),
    ],
)
def test_a_run_of_each_kind(tmp_path, stage, style, overrides):
    recipe = recipe_of(tmp_path, stage, style, *overrides)
    final = run.train(recipe)
    vlm = LatentVLM.from_pretrained(final)
    assert vlm.config.feedback == (recipe.model.feedback or "identity")
    assert vlm.config.target == (recipe.model.target or "helper")
    if vlm.config.pooling == "resampler":
        assert not torch.equal(vlm.pooling.queries, Resampler(vlm.width, 4).queries), "it has learnt"
    if vlm.config.feedback.startswith("codebook"):
        assert (vlm.feedback.table.norm(dim=1) > 0).all(), "it was made of targets"
    example = GeneratedDataset("vsp-planning", (3,), 1, 9, style, "test")[0]
    (row,) = vlm.generate([example], max_new_tokens=8)
    assert row.decoding.token_ids is not None


def test_a_table_that_came_with_the_checkpoint_is_kept(tmp_path):
    options = ["model.feedback=codebook", "model.codes=16", "loss.alignment=code"]
    first = run.train(recipe_of(tmp_path / "a", "stage1", "cells", *options))
    second = run.train(
        recipe_of(
            tmp_path / "b",
            "stage2",
            "cells",
            "data=[{task: vsp-planning, n: 8, seed: 5, style: cells}]",
            model=f"path: {first}",
        )
    )
    one, other = (LatentVLM.from_pretrained(path).feedback for path in (first, second))
    assert torch.equal(one.table, other.table)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_more_codes_than_targets(tmp_path):
    with pytest.raises(MirageError, match=r"a table of 4000 codes cannot be made of \d+ targets"):
        run.train(recipe_of(tmp_path, "stage1", "cells", "model.feedback=codebook", "model.codes=4000"))
    assert not (tmp_path / "run").exists()

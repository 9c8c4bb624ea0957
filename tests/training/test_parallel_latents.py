"""Parallel latents: Jacobi iterations over the latents of a span, against a slow computation of them."""

from dataclasses import replace

import pytest
import torch
from support import (
    batch_of,
    dialogue,
    distance,
    gradients,
    picture,
    ragged,
    slow_cross_entropy,
    slow_embeddings,
    slow_forward,
    slow_rollout,
    span,
    split,
)

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.decoder import checkpoint_activations
from mirage_vlm.training import run
from mirage_vlm.training.losses import stage2
from mirage_vlm.training.own import forward_own, passes, stretches
from mirage_vlm.training.recipe import load_recipe
from mirage_vlm.training.rollout import Batch, span_runs
from mirage_vlm.training.trainer import StageModule

WITHIN = 1e-5


def slow_jacobi(vlm: LatentVLM, row: Batch, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The iterations as the method says them, span by span: each pass reads everything before it anew.

    Returns:
        [T, D] hidden states and [latent positions, D] the latents of the last pass.
    """
    embeddings = slow_embeddings(vlm, row)
    start_vector = vlm.model.get_input_embeddings().weight[vlm.config.pad_id]

    def fed_back(state: torch.Tensor) -> torch.Tensor:
        if vlm.config.feedback == "linear":
            return vlm.feedback.proj.weight @ state + vlm.feedback.proj.bias
        return state

    found = []
    for begin, end in span_runs(row.input_ids, vlm.config.pad_id)[0]:
        latents = [fed_back(slow_forward(vlm, row, embeddings[:begin])[-1])] + [start_vector] * (end - begin - 1)
        for _ in range(iterations - 1):
            states = slow_forward(vlm, row, embeddings[:begin] + latents)[begin:]
            latents = [latents[0]] + [fed_back(state) for state in states[:-1]]
        embeddings[begin:end] = latents
        found += latents
    hidden = slow_forward(vlm, row, embeddings)
    return hidden, torch.stack(found) if found else hidden.new_zeros(0, hidden.shape[-1])


def check(vlm: LatentVLM, batch: Batch, iterations: int, slow_iterations: int | None = None) -> None:
    rows = split(vlm, batch)
    slow = [slow_jacobi(vlm, row, slow_iterations or iterations) for row in rows]
    loss = stage2(vlm, batch, latent_iterations=iterations)
    for i, (hidden, _) in enumerate(slow):
        assert distance(loss.hidden[i, : len(hidden)], hidden) < WITHIN, f"hidden states of row {i}"
        assert not loss.hidden[i, len(hidden) :].any(), "nothing is computed at padding"
    expected = torch.cat([latents for _, latents in slow])
    assert loss.latents == len(expected)
    assert distance(loss.consumed, expected) < WITHIN, "latents"
    ce = sum(slow_cross_entropy(vlm, row, hidden) for row, (hidden, _) in zip(rows, slow, strict=True))
    assert distance(loss.ce_sum, ce) < WITHIN, "cross-entropy"
    found, wanted = gradients(vlm, loss.ce_sum), gradients(vlm, ce)
    apart = {name: distance(found[name], wanted[name]) for name in found}
    assert max(apart.values()) < 1e-4, f"gradients: {apart}"  # sums of many terms, in another order on each processor


@pytest.fixture
def batch(tiny) -> Batch:
    """Spans of 2; none; 3 and 1; 4 and 1; 5 latents."""
    return batch_of(tiny, ragged(), targets=False)


# -- the iterations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_they_are_the_slow_iterations(tiny, batch, iterations):
    check(tiny, batch, iterations)


def test_with_a_learnt_feedback(fresh):
    vlm = LatentVLM(
        fresh.model, fresh.tokenizer, fresh.image_processor, replace(fresh.config, feedback="linear")
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        vlm.feedback.proj.weight.normal_(0, 0.2)
        vlm.feedback.proj.bias.normal_(0, 0.2)
    check(vlm, batch_of(vlm, ragged(), targets=False), 3)


@pytest.mark.parametrize("iterations", [5, 9])
def test_as_many_as_latents_are_the_rollout_one_by_one(tiny, batch, iterations):
    slow = [slow_rollout(tiny, row) for row in split(tiny, batch)]
    one_by_one, parallel = stage2(tiny, batch), stage2(tiny, batch, latent_iterations=iterations)
    assert distance(parallel.hidden, one_by_one.hidden) < WITHIN
    assert distance(parallel.consumed, torch.cat([latents for _, latents in slow])) < WITHIN
    found, expected = gradients(tiny, parallel.ce_sum), gradients(tiny, one_by_one.ce_sum)
    assert max(distance(found[name], expected[name]) for name in found) < WITHIN


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_a_row_is_exact_once_its_spans_are_no_longer_than_that(tiny, batch, iterations):
    longest = [2, 0, 3, 4, 5]
    parts = batch.input_ids.eq(tiny.config.pad_id).sum(dim=1).tolist()
    with torch.no_grad():
        exact, exact_latents = forward_own(tiny, batch)
        found, latents = forward_own(tiny, batch, iterations)
    pairs = zip(latents.split(parts), exact_latents.split(parts), strict=True)
    for i, (own, wanted) in enumerate(pairs):
        apart = max(distance(found[i], exact[i]), distance(own, wanted))
        assert apart < WITHIN if longest[i] <= iterations else apart > 1e-3, f"row {i}"
        if longest[i] > iterations:  # the latents that have come through are right even so
            assert distance(own[:iterations], wanted[:iterations]) < WITHIN


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_row_does_not_feel_its_neighbours(tiny, iterations):
    examples = [dialogue(["Go"], ["up ", span(0, 3), " down ", span(1, 2)]), *ragged()[2:]]
    with torch.no_grad():
        alone = stage2(tiny, batch_of(tiny, examples[:1], targets=False), latent_iterations=iterations)
        together = stage2(tiny, batch_of(tiny, examples, targets=False), latent_iterations=iterations)
    assert distance(together.hidden[0, : alone.hidden.shape[1]], alone.hidden[0]) < WITHIN


def test_a_picture_right_after_a_shorter_span_stays_a_picture(tiny):
    """It stands beside the latents of a longer span and is read with them, but is none."""
    image, pad = tiny.family.image_token_id, tiny.config.pad_id
    long = batch_of(tiny, [dialogue([picture(1, 1, 0), "Go up, then"], [span(0, 5), " down"])], targets=False)
    ids = long.input_ids.clone()
    first = span_runs(ids, pad)[0][0][0]
    ids[0, ids[0] == image] = ids[0, 0]
    ids[0, first + 1] = image  # one latent, then the picture
    short = replace(long, input_ids=ids)
    both = Batch(*(torch.cat([getattr(b, f) for b in (long, short)]) for f in FIELDS), long.pixel_values.repeat(2, 1))
    both = replace(both, grid_thw=long.grid_thw.repeat(2, 1))
    with torch.no_grad():
        alone, together = (forward_own(tiny, b, 3)[0] for b in (short, both))
    assert distance(together[1], alone[0]) < WITHIN


FIELDS = ("input_ids", "attention_mask", "labels")


# -- the gradient ----------------------------------------------------------------------------------------------------


def test_the_start_vector_is_the_pads_embedding_and_is_trained_where_it_matters(tiny, batch):
    def gradient(iterations: int) -> float:
        found = gradients(tiny, stage2(tiny, batch, latent_iterations=iterations).ce)
        return found["model.model.language_model.embed_tokens.weight"][tiny.config.pad_id].abs().max().item()

    assert gradient(2) > 0
    assert gradient(0) == 0
    assert gradient(5) < 1e-12, "after five passes nothing of it is left in spans of five"


@pytest.mark.parametrize("iterations", [1, 3])
def test_gradient_checkpointing_changes_nothing(fresh, batch, iterations):
    fresh.train()
    plain = stage2(fresh, batch, latent_iterations=iterations)
    expected = gradients(fresh, plain.ce)
    checkpoint_activations(fresh.model)
    checkpointed = stage2(fresh, batch, latent_iterations=iterations)
    found = gradients(fresh, checkpointed.ce)
    assert distance(checkpointed.hidden, plain.hidden) == 0
    assert max(distance(found[name], expected[name]) for name in found) < WITHIN


# -- how many passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("iterations", "expected"), [(0, 7), (1, 3), (2, 4), (3, 5), (5, 7), (9, 7)])
def test_the_number_of_passes(tiny, batch, iterations, expected):
    """The text before; the first spans, of up to 5 latents; the second spans, of 1."""
    calls = []
    handle = tiny.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with torch.no_grad():
            forward_own(tiny, batch, iterations)
    finally:
        handle.remove()
    assert len(calls) == expected == passes(batch.input_ids, tiny.config.pad_id, iterations)


def test_stretches():
    spans = [[(3, 5)], [], [(2, 5), (7, 8)]]
    lengths = [9, 4, 10]
    assert [(s.runs, s.latents, s.width) for s in stretches(spans, lengths)] == [
        ([(0, 3), (0, 4), (0, 2)], 0, 4),
        ([(0, 0), (0, 0), (2, 3)], 1, 1),
        ([(3, 4), (0, 0), (3, 4)], 1, 1),
        ([(4, 9), (0, 0), (4, 7)], 1, 5),
        ([(0, 0), (0, 0), (7, 10)], 1, 3),
    ]
    assert [(s.runs, s.latents, s.width) for s in stretches(spans, lengths, parallel=True)] == [
        ([(0, 3), (0, 4), (0, 2)], 0, 4),
        ([(3, 9), (0, 0), (2, 7)], 3, 6),
        ([(0, 0), (0, 0), (7, 10)], 1, 3),
    ]


# -- the recipe ------------------------------------------------------------------------------------------------------

RECIPE = """\
stage: {stage}
output_dir: {folder}/run
model: {{path: some/model}}
data: [{{task: vsp-planning, n: 4}}]
train:
  latent_iterations: {iterations}
"""


def read(folder, stage: str, iterations: int):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(stage=stage, folder=folder, iterations=iterations))
    return load_recipe(path)


def test_the_recipe_says_how_many(tmp_path):
    assert read(tmp_path, "stage2", 3).train.latent_iterations == 3
    assert read(tmp_path, "stage1", 0).train.latent_iterations == 0


@pytest.mark.parametrize(
    ("stage", "iterations", "message"),
    [
        ("stage1", 2, "only stage2 computes latents, stage1 does not; leave it out"),
        ("sft", 1, "only stage2 computes latents, sft does not; leave it out"),
        ("stage2", -1, "must be 0 (one latent after the other) or more"),
    ],
)
def test_a_recipe_is_refused(tmp_path, stage, iterations, message):
    with pytest.raises(MirageError) as caught:
        read(tmp_path, stage, iterations)
    assert str(caught.value) == f"{tmp_path}/recipe.yaml:6: train.latent_iterations: {message}"


def test_a_run_trains_with_them(fresh, tmp_path, monkeypatch):
    batch = batch_of(fresh, ragged(), targets=False)
    tensors = {f: getattr(batch, f) for f in (*FIELDS, "pixel_values", "grid_thw")}
    with torch.no_grad():
        found = StageModule(fresh, "stage2", 2)(**tensors)["ce_sum"]
        assert torch.equal(found, stage2(fresh, batch, latent_iterations=2).ce_sum)
    fresh.save_pretrained(tmp_path / "model")
    seen = []
    own = StageModule.forward

    def forward(module, **given):
        seen.append(module.options)
        return own(module, **given)

    monkeypatch.setattr(StageModule, "forward", forward)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(stage="stage2", folder=tmp_path, iterations=2))
    overrides = [
        f"model.path={tmp_path}/model",
        "train.max_steps=1",
        "train.batch_size=2",
        "data=[{task: vsp-planning, n: 4, levels: [3], style: cot}]",
    ]
    run.train(load_recipe(path, overrides))
    assert [options["latent_iterations"] for options in seen] == [2]


# -- these tests can fail --------------------------------------------------------------------------------------------


def test_a_pass_too_few_is_found_out(tiny, batch):
    with pytest.raises(AssertionError, match="hidden states"):
        check(tiny, batch, 3, slow_iterations=4)


def test_detached_passes_are_found_out(fresh, batch, monkeypatch):
    recast = fresh.recast

    def cut(token_ids, previous):
        return recast(token_ids, previous.detach() if token_ids.ndim == 2 else previous)  # 2: those of a span at once

    monkeypatch.setattr(fresh, "recast", cut)
    with pytest.raises(AssertionError, match="gradients"):
        check(fresh, batch, 3)

"""Both stages against slow references: row by row, without cache, mask or padding."""

from collections.abc import Callable
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
    shifted,
    slow_cross_entropy,
    slow_embeddings,
    slow_forward,
    slow_positions,
    slow_rollout,
    span,
    split,
)

from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.decoder import checkpoint_activations
from mirage_vlm.modeling.segment_cache import NARROW
from mirage_vlm.training import losses, own
from mirage_vlm.training.losses import stage1, stage2
from mirage_vlm.training.rollout import Batch, span_runs

WITHIN = 1e-5


def slow_stage1(vlm: LatentVLM, row: Batch, detach: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stage 1 of one row: [T, D] hidden states, cross-entropy sum, 1 − cosine sum."""
    ids = row.input_ids[0].tolist()
    embeddings = slow_embeddings(vlm, row)
    lengths = [end - start for start, end in span_runs(row.input_ids, vlm.config.pad_id)[0]]
    targets: list[torch.Tensor] = []
    if lengths:
        helpers = vlm.model.model.get_image_features(row.helper_pixel_values, row.helper_grid_thw, return_dict=True)
        for k, patches in zip(lengths, helpers.pooler_output, strict=True):
            size = len(patches) // k
            targets += [patches[j * size : (j + 1) * size].mean(dim=0) for j in range(k)]
    if detach:
        targets = [target.detach() for target in targets]
    places = [t for t, token in enumerate(ids) if token == vlm.config.pad_id]
    for t, target in zip(places, targets, strict=True):
        embeddings[t] = target
    hidden = slow_forward(vlm, row, embeddings)
    align = hidden.new_zeros(())
    for t, target in zip(places, targets, strict=True):
        align = align + 1 - (target @ hidden[t - 1]) / (target.norm() * hidden[t - 1].norm())
    return hidden, slow_cross_entropy(vlm, row, hidden), align


def check_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    apart = {name: distance(found[name], expected[name]) for name in found}
    assert max(apart.values()) < WITHIN, f"gradients: {apart}"


def check_stage1(vlm: LatentVLM, batch: Batch, detach: bool = True) -> None:
    rows = [slow_stage1(vlm, row, detach) for row in split(vlm, batch)]
    loss = stage1(vlm, batch, detach_targets=detach)
    for i, (hidden, _, _) in enumerate(rows):
        assert distance(loss.hidden[i, : len(hidden)], hidden) < WITHIN, f"hidden states of row {i}"
    tokens = int((batch.labels[:, 1:] != -100).sum())
    latents = int((batch.input_ids == vlm.config.pad_id).sum())
    assert (loss.tokens, loss.latents) == (tokens, latents)
    ce, align = sum(row[1] for row in rows) / tokens, sum(row[2] for row in rows) / latents
    assert distance(loss.ce, ce) < WITHIN, "cross-entropy"
    assert distance(loss.align, align) < WITHIN, "1 - cosine"
    check_gradients(gradients(vlm, 0.1 * loss.ce + loss.align), gradients(vlm, 0.1 * ce + align))


def check_stage2(vlm: LatentVLM, batch: Batch) -> None:
    rows = split(vlm, batch)
    slow = [slow_rollout(vlm, row) for row in rows]
    loss = stage2(vlm, batch)
    for i, (hidden, _) in enumerate(slow):
        assert distance(loss.hidden[i, : len(hidden)], hidden) < WITHIN, f"hidden states of row {i}"
        assert not loss.hidden[i, len(hidden) :].any(), "nothing is computed at padding"
    expected = torch.cat([latents for _, latents in slow])
    assert loss.latents == len(expected) and (loss.consumed is None) == (len(expected) == 0)
    if loss.consumed is not None:
        assert distance(loss.consumed, expected) < WITHIN, "latents"
    ce = sum(slow_cross_entropy(vlm, row, hidden) for row, (hidden, _) in zip(rows, slow, strict=True))
    assert loss.tokens == int((batch.labels[:, 1:] != -100).sum())
    assert distance(loss.ce_sum, ce) < WITHIN, "cross-entropy"
    check_gradients(gradients(vlm, loss.ce_sum), gradients(vlm, ce))


@pytest.fixture
def batch(tiny) -> Batch:
    return batch_of(tiny, ragged())


# -- the batch of the tests is what they need ------------------------------------------------------------------------


def test_the_ragged_batch_is_ragged(tiny, batch):
    runs = span_runs(batch.input_ids, tiny.config.pad_id)
    assert [[end - start for start, end in row] for row in runs] == [[2], [], [3, 1], [4, 1], [5]]
    assert len({row[0][0] for row in runs if row}) >= 3, "spans begin at different places"
    assert len(batch.grid_thw) == 4 and len(set(batch.attention_mask.sum(dim=1).tolist())) > 3
    for row in split(tiny, batch):
        positions = tiny.positions(row.input_ids, row.attention_mask, row.grid_thw)
        assert torch.equal(positions, slow_positions(tiny, row)), "three-dimensional positions, written out"


def test_span_runs(tiny):
    pad = tiny.config.pad_id
    ids = torch.tensor([[pad, pad, 1, pad, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, pad, pad, pad, pad]])
    assert span_runs(ids, pad) == [[(0, 2), (3, 4)], [], [(2, 6)]]


# -- stage 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [True, False])
def test_stage1_is_the_sum_over_the_rows_alone(tiny, batch, detach):
    check_stage1(tiny, batch, detach)


@pytest.mark.parametrize("row", range(5))
def test_stage1_of_one_row(tiny, batch, row):
    alone = split(tiny, batch)[row]
    if (alone.input_ids == tiny.config.pad_id).any():
        check_stage1(tiny, alone)
    else:
        hidden, ce, _ = slow_stage1(tiny, alone, True)
        loss = stage1(tiny, alone)
        assert distance(loss.hidden[0], hidden) < WITHIN and distance(loss.ce_sum, ce) < WITHIN
        assert loss.align.item() == 0 and loss.latents == 0 and loss.consumed is None


def test_without_spans_stage1_is_transformers_own_loss(tiny):
    examples = [
        dialogue([picture(2, 1, 0), "Which way?"], ["Go up, then right."]),
        dialogue(["The hole is on the left.", picture(1, 1, 1), picture(2, 2, 2)], [r"\boxed{R}"]),
        dialogue(["Go"], ["right, then down, then right"]),
    ]
    batch = batch_of(tiny, examples)
    with torch.no_grad():
        whole = tiny.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.grid_thw,
            mm_token_type_ids=(batch.input_ids == tiny.family.image_token_id).int(),
            labels=batch.labels,
        )
        for loss in (stage1(tiny, batch), stage2(tiny, batch)):
            assert distance(loss.ce, whole.loss) < WITHIN
    predicted = whole.logits[:, :-1].argmax(dim=-1) == batch.labels[:, 1:]
    assert loss.correct == int(predicted.sum())


def test_stage1_needs_the_helper_images(tiny):
    with pytest.raises(ValueError, match="stage 1 needs the helper images"):
        stage1(tiny, batch_of(tiny, ragged(), targets=False))


# -- stage 2 ---------------------------------------------------------------------------------------------------------


def test_stage2_is_the_slow_rollout(tiny, batch):
    check_stage2(tiny, batch)


def test_stage2_with_a_learnt_feedback(fresh):
    vlm = LatentVLM(
        fresh.model, fresh.tokenizer, fresh.image_processor, replace(fresh.config, feedback="linear")
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        vlm.feedback.proj.weight.normal_(0, 0.2)
        vlm.feedback.proj.bias.normal_(0, 0.2)
    batch = batch_of(vlm, ragged(), targets=False)
    check_stage2(vlm, batch)
    assert gradients(vlm, stage2(vlm, batch).ce)["feedback.proj.weight"].abs().max() > 0


@pytest.mark.parametrize("row", range(5))
def test_stage2_of_one_row(tiny, batch, row):
    check_stage2(tiny, split(tiny, batch)[row])


def test_stage2_does_not_care_for_the_order_of_rows(tiny):
    with torch.no_grad():
        forward = stage2(tiny, batch_of(tiny, ragged(), targets=False))
        backward = stage2(tiny, batch_of(tiny, ragged()[::-1], targets=False))
    assert distance(backward.hidden.flip(0), forward.hidden) < WITHIN
    assert distance(backward.ce_sum, forward.ce_sum) < WITHIN


@pytest.mark.parametrize("company", [2, 3])
def test_a_row_does_not_feel_its_neighbours(tiny, company):
    """Not even the length of their spans: a row of one latent stands beside one of five."""
    examples = [dialogue(["Go"], ["up ", span(0, 1), " down"]), *ragged()[-company:]]
    with torch.no_grad():
        alone = stage2(tiny, batch_of(tiny, examples[:1], targets=False))
        together = stage2(tiny, batch_of(tiny, examples, targets=False))
    assert distance(together.hidden[0, : alone.hidden.shape[1]], alone.hidden[0]) < WITHIN


# -- the gradient through the latents --------------------------------------------------------------------------------


def detaching(recast: Callable) -> Callable:
    return lambda token_ids, previous: recast(token_ids, previous.detach())


def test_the_gradient_flows_through_every_latent(fresh, monkeypatch):
    """The slope of the loss along the gradient, by finite differences; with latents detached it is another."""
    batch = batch_of(fresh, ragged()[2:], targets=False)
    weight = fresh.language_model.layers[0].mlp.down_proj.weight
    own = torch.autograd.grad(stage2(fresh, batch).ce, weight)[0]
    direction = own / own.norm()
    with monkeypatch.context() as patch:
        patch.setattr(fresh, "recast", detaching(fresh.recast))
        cut = torch.autograd.grad(stage2(fresh, batch).ce, weight)[0]
    values, step = [], 2e-3
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * step * direction
            values.append(stage2(fresh, batch).ce.item())
            weight -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert abs((own * direction).sum().item() - slope) < 0.01 * abs(slope)
    assert abs((cut * direction).sum().item() - slope) > 0.05 * abs(slope)


# -- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_gradient_checkpointing_changes_nothing(fresh, batch, stage):
    widths = []
    fresh.language_model.layers[0].self_attn.register_forward_hook(lambda *told: widths.append(told[-1][0].shape[1]))

    def run() -> tuple[losses.StageLoss, dict[str, torch.Tensor], list[int]]:
        widths.clear()
        loss = getattr(losses, stage)(fresh, batch)
        found = gradients(fresh, loss.ce + loss.align)
        return loss, found, list(widths)

    fresh.train()
    plain, expected, forwards = run()
    wide = [width for width in forwards if width > NARROW]
    assert 1 in forwards if stage == "stage2" else wide == forwards
    checkpoint_activations(fresh.model)
    checkpointed, found, recomputed = run()
    assert wide and recomputed == forwards + wide[::-1], "each layer is run again for the gradient, but for latents"
    assert distance(checkpointed.hidden, plain.hidden) == 0
    assert torch.equal(checkpointed.ce_sum, plain.ce_sum) and torch.equal(checkpointed.align_sum, plain.align_sum)
    check_gradients(found, expected)
    _, again, recomputed = run()
    assert recomputed == forwards + wide[::-1], "the layers are left as they were found"
    check_gradients(again, expected)
    checkpoint_activations(fresh.model, on=False)
    assert run()[2] == forwards


def test_checkpointing_works_beside_a_frozen_table_and_tower(fresh, batch):
    """With LoRA the embeddings have no gradient of their own, so that nothing a layer is given requires one."""
    fresh.requires_grad_(False)
    for layer in fresh.language_model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)
    fresh.train()
    expected = gradients(fresh, stage2(fresh, batch).ce)
    checkpoint_activations(fresh.model)
    check_gradients(gradients(fresh, stage2(fresh, batch).ce), expected)
    assert len(expected) == 2 and all(gradient.abs().max() > 0 for gradient in expected.values())


# -- the vision tower ------------------------------------------------------------------------------------------------


def tower_norm(vlm: LatentVLM, loss: torch.Tensor) -> float:
    found = gradients(vlm, loss)
    return sum(g.norm().item() for name, g in found.items() if name.startswith("model.model.visual."))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_frozen_tower_gets_no_gradient_and_no_graph(fresh, batch, stage):
    expected = gradients(fresh, getattr(losses, stage)(fresh, batch).ce)
    fresh.vision_tower.requires_grad_(False)
    kept = []
    patch = fresh.vision_tower.patch_embed
    patch.register_forward_hook(lambda _, __, output: kept.append(output.requires_grad))
    loss = getattr(losses, stage)(fresh, batch)
    (loss.ce + loss.align).backward()
    assert kept and not any(kept), "no graph is kept of the tower"
    assert all(parameter.grad is None for parameter in fresh.vision_tower.parameters())
    found = gradients(fresh, getattr(losses, stage)(fresh, batch).ce)
    check_gradients(found, {name: expected[name] for name in found})


def test_targets_teach_the_tower_only_where_they_are_asked_to(tiny):
    no_picture = batch_of(tiny, [dialogue(["Go"], ["up ", span(0, 2), "!"])])
    assert tower_norm(tiny, stage1(tiny, no_picture).align) == 0
    assert tower_norm(tiny, stage1(tiny, no_picture, detach_targets=False).align) > 0
    with_picture = batch_of(tiny, [dialogue(["Go", picture(2, 1, 0)], ["up ", span(0, 2), "!"])])
    assert tower_norm(tiny, stage1(tiny, with_picture).align) > 0, "the prompt's picture is not a target"


# -- these tests can fail --------------------------------------------------------------------------------------------


def stale(recast: Callable) -> Callable:
    """The state of one position earlier is fed back."""
    seen: list[torch.Tensor] = []

    def wrong(token_ids: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        seen.append(previous)
        return recast(token_ids, seen[max(0, len(seen) - 2)])

    return wrong


def skipping(recast: Callable) -> Callable:
    """The pad's own embedding is consumed, as where latents are silently skipped."""
    return lambda token_ids, previous: recast(torch.zeros_like(token_ids), previous)


def blurred(recast: Callable) -> Callable:
    """The state of a neighbouring row is fed back."""
    return lambda token_ids, previous: recast(token_ids, previous.roll(1, dims=0))


@pytest.mark.parametrize(
    ("sabotage", "seen"),
    [(stale, "hidden states"), (skipping, "hidden states"), (blurred, "hidden states"), (detaching, "gradients")],
)
def test_stage2_with_wrong_feedback_is_found_out(fresh, batch, monkeypatch, sabotage, seen):
    monkeypatch.setattr(fresh, "recast", sabotage(fresh.recast))
    with pytest.raises(AssertionError, match=seen):
        check_stage2(fresh, batch)


@pytest.mark.parametrize("check", [check_stage1, check_stage2])
def test_wrong_positions_are_found_out(fresh, batch, monkeypatch, check):
    """Positions of latents and of what follows them are shifted by one."""
    own = fresh.positions

    def wrong(input_ids: torch.Tensor, *rest) -> torch.Tensor:
        return own(input_ids, *rest) + ((input_ids == fresh.config.pad_id).cumsum(dim=1) > 0).long()

    monkeypatch.setattr(fresh, "positions", wrong)
    with pytest.raises(AssertionError, match="hidden states"):
        check(fresh, batch)


def test_alignment_shifted_by_one_is_found_out(tiny, batch, monkeypatch):
    """Each target is drawn towards the state that should predict the one before it."""
    own = torch.nn.functional.cosine_similarity
    monkeypatch.setattr(losses.F, "cosine_similarity", lambda a, b, dim: own(a.roll(1, dims=0), b, dim=dim))
    with pytest.raises(AssertionError, match="cosine"):
        check_stage1(tiny, batch)


def test_targets_in_the_wrong_places_are_found_out(fresh, batch, monkeypatch):
    own = fresh.targets
    monkeypatch.setattr(fresh, "targets", lambda *args, **options: shifted(own(*args, **options)))
    with pytest.raises(AssertionError, match="hidden states"):
        check_stage1(fresh, batch)


def test_attention_to_padding_is_found_out(fresh, batch, monkeypatch):
    cache = own.SegmentCache
    forward = fresh.language_model.forward

    def wrong(*args, attention_mask=None, **options):
        if any(isinstance(value, cache) for value in options.values()):
            attention_mask = torch.ones_like(attention_mask)
        return forward(*args, attention_mask=attention_mask, **options)

    monkeypatch.setattr(fresh.language_model, "forward", wrong)
    with pytest.raises(AssertionError, match="hidden states"):
        check_stage2(fresh, batch)

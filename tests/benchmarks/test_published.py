"""The plain loops: decoding as the engine does, and stage 2 as the slow reference does."""

from __future__ import annotations

import pytest
import torch
from support import batch_of, distance, gradients, ragged, slow_cross_entropy, slow_rollout, split

from mirage_vlm.benchmarks.published import decode_one, stage2_one
from mirage_vlm.training.losses import stage2


@pytest.mark.parametrize("max_spans", [None, 0, 1])
def test_one_at_a_time_decodes_as_the_engine(tiny, max_spans):
    prompts = ragged()
    found = tiny.generate(prompts, max_new_tokens=40, max_spans=max_spans)
    tokens = [decode_one(tiny, prompt, 40, max_spans) for prompt in prompts]
    assert tokens == [list(row.decoding.token_ids) for row in found]
    spans = [row.count(tiny.config.start_id) for row in tokens]
    assert max(spans) >= 2 if max_spans is None else max(spans) == max_spans


def test_at_every_limit(tiny):
    """A latent that would never be consumed is not written, the mark of its span is."""
    prompt = ragged()[2]
    missing = set()
    for limit in range(1, 12):
        (row,) = tiny.generate([prompt], max_new_tokens=limit)
        tokens = decode_one(tiny, prompt, limit)
        assert tokens == list(row.decoding.token_ids)
        if row.decoding.finish_reason == "length":
            missing.add(limit - len(tokens))
    assert missing == {0, 1}, "some limit falls on a latent"


def test_stage_2_with_fresh_passes_is_the_slow_reference(tiny):
    for row in split(tiny, batch_of(tiny, ragged())):
        hidden, _ = slow_rollout(tiny, row)
        expected = slow_cross_entropy(tiny, row, hidden)
        assert float(stage2_one(tiny, row).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_its_gradient_is_that_of_the_batch(tiny):
    batch = batch_of(tiny, ragged())
    ours = gradients(tiny, stage2(tiny, batch).ce_sum)
    theirs = gradients(tiny, torch.stack([stage2_one(tiny, row) for row in split(tiny, batch)]).sum())
    assert max(distance(theirs[name], ours[name]) for name in ours if ours[name].abs().max() > 1e-3) < 1e-3

"""The accuracy of parallel latents, measured row by row too."""

import pytest
import torch
from support import batch_of, distance, ragged, slow_rollout, split

from mirage_vlm.benchmarks.iterations import after_spans, tuned


@pytest.fixture
def examples():
    return [example for example in ragged() if example.spans]


def test_text_after_the_last_span_is_counted_and_nothing_else(tiny, examples):
    right, ce, tokens = 0, 0.0, 0
    with torch.no_grad():
        for row in split(tiny, batch_of(tiny, examples, targets=False)):
            hidden, _ = slow_rollout(tiny, row)
            ids = row.input_ids[0].tolist()
            first = len(ids) - ids[::-1].index(tiny.config.end_id)
            logits = hidden[first - 1 : -1] @ tiny.model.lm_head.weight.T
            wanted = torch.tensor(ids[first:])
            right += bool((logits.argmax(dim=-1) == wanted).all())
            ce -= logits.log_softmax(dim=-1)[range(len(wanted)), wanted].sum().item()
            tokens += len(wanted)
    found = after_spans(tiny, examples, 0)
    assert found.all_right == right / len(examples)
    assert found.ce == pytest.approx(ce / tokens, rel=1e-5)
    assert after_spans(tiny, examples, 9).ce == pytest.approx(found.ce, rel=1e-5)
    assert after_spans(tiny, examples, 1).ce != pytest.approx(found.ce, rel=1e-3)


def test_a_copy_is_trained_and_learns(tiny, examples):
    before = after_spans(tiny, examples, 2)
    model = tuned(tiny, examples, iterations=2, steps=25, rate=3e-2)
    after = after_spans(model, examples, 2)
    assert after.ce < 0.5 * before.ce
    assert after_spans(tiny, examples, 2) == before, "the model itself is as it was"
    for name, parameter in model.vision_tower.named_parameters():
        assert distance(parameter, tiny.vision_tower.get_parameter(name)) == 0

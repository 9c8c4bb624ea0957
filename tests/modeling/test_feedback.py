"""From a hidden state to the next input embedding."""

import copy
from dataclasses import replace

import pytest
import torch

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.feedback import FEEDBACKS, Patches, build_feedback
from mirage_vlm.modeling.pooling import Targets


def test_identity_has_no_weights():
    hidden = torch.randn(4, 7)
    feedback = build_feedback("identity", 7)
    assert torch.equal(feedback(hidden), hidden)
    assert not list(feedback.parameters())


def test_linear_starts_as_the_identity_and_learns():
    hidden = torch.randn(4, 7)
    feedback = build_feedback("linear", 7)
    assert torch.equal(feedback(hidden), hidden)
    with torch.no_grad():
        feedback.proj.weight.normal_()
        feedback.proj.bias.normal_()
    weight, bias = feedback.proj.weight.tolist(), feedback.proj.bias.tolist()
    rows = [
        [b + sum(w * h for w, h in zip(r, x, strict=True)) for r, b in zip(weight, bias, strict=True)]
        for x in hidden.tolist()
    ]
    expected = torch.tensor(rows)
    torch.testing.assert_close(feedback(hidden), expected, atol=1e-5, rtol=1e-5)
    feedback(hidden).sum().backward()
    assert feedback.proj.weight.grad is not None


def test_rescaled_has_the_length_of_a_typical_target():
    targets, hidden = torch.randn(50, 7), 100 * torch.randn(3, 7)
    feedback = build_feedback("rescaled", 7)
    feedback.fit(targets)
    size = sum(float(t.norm()) for t in targets) / 50
    for state, found in zip(hidden, feedback(hidden), strict=True):
        torch.testing.assert_close(found, state / state.norm() * size)


def test_a_codebook_is_a_mixture_of_its_table():
    feedback, hidden = build_feedback("codebook", 7, codes=5), torch.randn(3, 7)
    feedback.table.normal_()
    for state, found in zip(hidden, feedback(hidden), strict=True):
        weights = (feedback.head.weight @ state + feedback.head.bias).exp()
        expected = sum(w * entry for w, entry in zip(weights / weights.sum(), feedback.table, strict=True))
        torch.testing.assert_close(found, expected)


def test_a_codebook_finds_the_clusters_of_its_targets():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(6, 7, generator=generator)
    which = torch.randint(6, (300,), generator=generator)
    targets = centres[which] + 0.01 * torch.randn(300, 7, generator=generator)
    feedback = build_feedback("codebook", 7, codes=6)
    feedback.fit(targets)
    assert torch.cdist(centres, feedback.table).min(dim=1).values.max() < 0.1
    assert (feedback.consumed(Targets(targets, torch.arange(300))) - targets).norm(dim=1).max() < 0.2
    with pytest.raises(MirageError, match="a table of 6 codes cannot be made of 5 targets"):
        feedback.fit(targets[:5])


@pytest.mark.parametrize("name", ["codebook", "pointer"])
def test_the_best_alone_with_the_gradient_of_the_mixture(name):
    torch.manual_seed(0)
    mixing, choosing = build_feedback(name, 7, codes=5), build_feedback(f"{name}-one", 7, codes=5)
    choosing.load_state_dict(mixing.state_dict())
    patches = Patches(torch.randn(3, 4, 7), torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 4]))
    if name == "codebook":
        mixing.table.normal_()
        choosing.table.copy_(mixing.table)
    hidden, direction = 4 * torch.randn(3, 7), torch.randn(3, 7)
    entries = mixing.table.expand(3, 5, 7) if name == "codebook" else patches.features
    best = mixing.scores(hidden, patches).argmax(dim=1)
    expected = torch.stack([own[i] for own, i in zip(entries, best, strict=True)])
    torch.testing.assert_close(choosing(hidden, patches), expected)
    with torch.no_grad():
        assert torch.equal(choosing(hidden, patches), expected)
    gradients = []
    for feedback in (mixing, choosing):
        states = hidden.clone().requires_grad_()
        (feedback(states, patches) * direction).sum().backward()
        gradients.append(states.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_pause_thinks_the_same_whatever_the_state():
    feedback = build_feedback("pause", 7)
    assert feedback.fitted and feedback.vector.abs().min() > 0, "of zeros a norm would have no gradient to speak of"
    assert torch.equal(feedback(torch.randn(3, 7)), feedback.vector.expand(3, 7))
    feedback(torch.randn(3, 7)).sum().backward()
    assert feedback.vector.grad.tolist() == [3.0] * 7


@pytest.mark.parametrize("name", sorted(FEEDBACKS))
def test_every_feedback_is_saved_with_the_checkpoint(tiny, tmp_path, name):
    parts = copy.deepcopy(tiny)
    config = replace(tiny.config, feedback=name, codes=9)
    vlm = LatentVLM(parts.model, parts.tokenizer, parts.image_processor, config)
    vlm.feedback.fit(torch.randn(64, vlm.width))
    vlm.save_pretrained(tmp_path / "saved")
    loaded = LatentVLM.from_pretrained(tmp_path / "saved")
    assert loaded.config == config
    hidden, patches = torch.randn(5, vlm.width), Patches(torch.randn(5, 4, vlm.width), torch.ones(5, 4).bool())
    assert torch.equal(vlm.feedback(hidden, patches), loaded.feedback(hidden, patches))
    assert loaded.feedback.fitted, "it came with the checkpoint"


@pytest.mark.parametrize("name", sorted(FEEDBACKS))
@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_every_feedback_keeps_the_shape(name, shape):
    patches = Patches(torch.randn(2, 4, 7), torch.ones(2, 4, dtype=torch.bool))
    assert build_feedback(name, 7)(torch.randn(*shape, 7), patches).shape == (*shape, 7)


@pytest.mark.parametrize(("saved", "wanted"), [("pointer", "pointer-one"), ("codebook-one", "codebook")])
def test_weights_go_from_a_mixture_to_the_best_alone_and_back(tiny, tmp_path, saved, wanted):
    parts = copy.deepcopy(tiny)
    config = replace(tiny.config, feedback=saved, codes=9)
    vlm = LatentVLM(parts.model, parts.tokenizer, parts.image_processor, config)
    for tensor in vlm.feedback.state_dict().values():
        tensor.normal_()
    vlm.save_pretrained(tmp_path / "saved")
    loaded = LatentVLM.from_pretrained(tmp_path / "saved", feedback=wanted)
    assert type(loaded.feedback) is FEEDBACKS[wanted]
    for name, tensor in vlm.feedback.state_dict().items():
        assert torch.equal(loaded.feedback.state_dict()[name], tensor)
    other = LatentVLM.from_pretrained(tmp_path / "saved", feedback="linear")
    assert torch.equal(other.feedback.proj.weight, torch.eye(tiny.width)), "those of another kind begin anew"


def test_an_unknown_feedback():
    with pytest.raises(MirageError, match="unknown feedback 'linaer'; choose one of identity, linear"):
        build_feedback("linaer", 7)


@pytest.mark.parametrize("name", ["identity", "linear"])
def test_recast_feeds_back_at_latent_positions_only(tiny, name):
    parts = copy.deepcopy(tiny)
    vlm = LatentVLM(parts.model, parts.tokenizer, parts.image_processor, replace(tiny.config, feedback=name))
    if name == "linear":
        torch.nn.init.normal_(vlm.feedback.proj.weight)
    table = vlm.model.get_input_embeddings().weight
    pad, start, end = vlm.config.pad_id, vlm.config.start_id, vlm.config.end_id
    tokens = torch.tensor([[pad, 11, start], [end, pad, pad]])
    previous = torch.randn(2, 3, vlm.width)
    found = vlm.recast(tokens, previous)
    for row in range(2):
        for column in range(3):
            state, token = previous[row, column], int(tokens[row, column])
            fed = vlm.feedback.proj.weight @ state if name == "linear" else state
            expected = fed if token == pad else table[token]
            torch.testing.assert_close(found[row, column], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(vlm.recast(tokens[0, 0], previous[0, 0]), found[0, 0]) or name == "linear"


def test_the_feedback_takes_the_models_dtype(tiny):
    parts = copy.deepcopy(tiny)
    vlm = LatentVLM(
        parts.model.to(torch.bfloat16), parts.tokenizer, parts.image_processor, replace(tiny.config, feedback="linear")
    )
    assert {p.dtype for p in vlm.feedback.parameters()} == {torch.bfloat16}
    previous = torch.randn(1, vlm.width, dtype=torch.bfloat16)
    assert vlm.recast(torch.tensor([vlm.config.pad_id]), previous).dtype == torch.bfloat16

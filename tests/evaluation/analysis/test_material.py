"""What the analyses look at is what the decoder saw: tokens, latents, patches, states, and the roles of all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import dialogue, distance, picture, ragged, replayed, slow_embeddings, slow_rollout, split

from mirage_vlm.decoding import GenerationConfig, generate
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis.material import (
    LATENT,
    MARK,
    PATCH,
    PROMPT,
    TEXT,
    Example,
    answer_tokens,
    block,
    gather,
    language_pass,
    read,
)
from mirage_vlm.training.own import forward_own
from mirage_vlm.trajectory import LatentSpan, Trajectory, assistant_turn

GENERATION = GenerationConfig(max_new_tokens=40)


def prompts_with_helpers():
    """Prompts with 0, 1 and 2 pictures; references with two spans, one, or none."""
    questions = [*ragged(), dialogue(["Which way?", picture(3, 2, 9)], ["x"])]
    spans = [LatentSpan(picture(3, 2, 50)), LatentSpan(picture(2, 2, 51))]
    return [
        Trajectory((*question.prompt, assistant_turn("Go", *spans[: (2, 2, 1, 0, 1, 2)[i]], "x")))
        for i, question in enumerate(questions)
    ]


@pytest.fixture(scope="module")
def prompts():
    return prompts_with_helpers()


@pytest.fixture(scope="module")
def examples(tiny, prompts):
    return gather(tiny, prompts, GENERATION)


def test_the_pass_with_latents_in_place_is_the_decoding(tiny, prompts, examples):
    """Against decoding, against stage 2's rollout, and against the slow rollout."""
    assert 2 < len(examples) <= len(prompts)
    batch = replayed(tiny, [example.trajectory for example in examples])
    with torch.no_grad():
        hidden, rolled = forward_own(tiny, batch)
        slow = [slow_rollout(tiny, row) for row in split(tiny, batch)]
    counts = (batch.input_ids == tiny.config.pad_id).sum(dim=1).tolist()
    for i, (example, latents) in enumerate(zip(examples, rolled.split(counts), strict=True)):
        k, t = len(example.latents), len(example.ids)
        decoded = torch.cat([s.latents for s in example.trajectory.spans if s.latents is not None])
        assert torch.equal(example.latents, decoded)
        assert distance(latents[:k], decoded) < 1e-4
        assert distance(example.hidden, hidden[i, :t]) < 1e-4
        assert distance(example.hidden, slow[i][0][:t]) < 1e-4
        before = [p - 1 for start, end in example.runs for p in range(start, end)]
        assert distance(tiny.feedback(example.hidden[before]), example.latents) < 1e-4


def test_inputs_and_pictures(tiny, examples):
    for example, row in zip(examples, split(tiny, replayed(tiny, [e.trajectory for e in examples])), strict=True):
        with torch.no_grad():
            slow = slow_embeddings(tiny, row)
        for t in (example.roles != LATENT).nonzero().flatten().tolist():
            assert torch.allclose(example.inputs[t], slow[t], atol=1e-5)
        patches = [p.features for p in example.pictures]
        assert sum(map(len, patches)) == int((example.roles == PATCH).sum())
        assert all(len(p.features) == p.grid[0] * p.grid[1] for p in example.pictures)
        if patches:
            assert torch.equal(torch.cat(patches), example.inputs[example.roles == PATCH])
        assert [p.image for p in example.pictures] == list(example.trajectory.images())
    assert {len(example.pictures) for example in examples} > {1, 2}


def test_roles(tiny, examples):
    config = tiny.config
    for example in examples:
        start = len(tiny.encoder.prompt(example.trajectory.prompt)[0])
        for t, token in enumerate(example.ids.tolist()):
            role = TEXT if t >= start else PROMPT
            if token == tiny.family.image_token_id:
                role = PATCH
            elif token in (config.start_id, config.end_id):
                role = MARK
            elif token == config.pad_id:
                role = LATENT
            assert example.roles[t] == role
        assert all(example.ids[a - 1] == config.start_id for a, _ in example.runs)
        assert sum(b - a for a, b in example.runs) == len(example.latents)


def test_a_response_that_was_cut_in_a_span(tiny, prompts):
    """What it consumed is there, be it one latent of three; the span has no end."""
    cut = set()
    for prompt in prompts:
        (whole,) = generate(tiny, [prompt], GENERATION)
        for most in [i + 1 for i, token in enumerate(whole.decoding.token_ids) if token == tiny.config.pad_id][:3]:
            (short,) = generate(tiny, [prompt], replace(GENERATION, max_new_tokens=most))
            if any(span.latents is not None for span in short.spans):
                found = read(tiny, short)
                consumed = torch.cat([s.latents for s in short.spans if s.latents is not None])
                assert torch.equal(found.latents, consumed)
                cut.add(found.ids[-1].item() == tiny.config.pad_id)
    assert True in cut


def test_helpers_and_targets(tiny, prompts, examples):
    """Of each own span the helper image of the reference's, from the first again, pooled to its own length."""
    by_prompt = {str(p.prompt): p for p in prompts}
    taught = reused = 0
    for example in examples:
        helpers = [s.helper for s in by_prompt[str(example.trajectory.prompt)].spans]
        if not helpers:
            assert not example.helpers and not example.targets
            continue
        taught += 1
        reused += len(example.runs) > len(helpers)
        assert len(example.helpers) == len(example.targets) == len(example.runs)
        for i, (shown, target, (start, end)) in enumerate(
            zip(example.helpers, example.targets, example.runs, strict=True)
        ):
            assert shown.image is helpers[i % len(helpers)]
            encoded = tiny.encoder.pictures([shown.image])
            with torch.no_grad():
                (features,) = tiny.image_features(encoded.pixel_values, encoded.grid_thw)
            assert distance(shown.features, features) < 1e-5
            size = len(features) // (end - start)
            slow = torch.stack([features[j * size : (j + 1) * size].mean(dim=0) for j in range(end - start)])
            assert distance(target, slow) < 1e-4
    assert taught > 2 and reused
    bare = gather(tiny, prompts, GENERATION, helpers=False)
    assert not any(example.helpers or example.targets for example in bare)


def test_answer_tokens(tiny):
    def marked(text, silent=()):
        tokens = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = [*tokens[:2], *silent, *tokens[2:]]
        found = answer_tokens(tiny.tokenizer, tokens, [token in silent for token in tokens])
        return tiny.tokenizer.decode([t for t, inside in zip(tokens, found, strict=True) if inside])

    assert "R,R,D" in marked(r"Go up. \boxed{U} then \boxed{R,R,D}") and "U" not in marked(r"\boxed{U} \boxed{R,R,D}")
    assert len(marked(r"\boxed{R,R,D}")) <= len("{R,R,D}"), "a token may hold a brace too"
    assert "L,R" in marked(r"\boxed{L,R") and marked("Go up.") == ""
    assert "R,R,D" in marked(r"Go \boxed{R,R,D} left", silent=[tiny.config.pad_id])
    assert r"\text{D}" in marked(r"\boxed{\text{D}} the gift")


def test_weights_are_had_for_one_pass_and_change_nothing(fresh, examples):
    config = fresh.language_model.config
    config._attn_implementation = "sdpa"
    example = examples[0]
    inputs, positions = example.inputs[None], example.positions[:, None]
    plain, weighed = (language_pass(fresh, inputs, positions, weights=w) for w in (False, True))
    assert config._attn_implementation == "sdpa" and plain.attentions is None
    assert distance(weighed.last_hidden_state, plain.last_hidden_state) < 1e-4
    t = len(example.ids)
    assert [tuple(w.shape) for w in weighed.attentions] == [(1, config.num_attention_heads, t, t)] * 2
    with pytest.raises(RuntimeError):
        language_pass(fresh, inputs[..., :-1], positions, weights=True)
    assert config._attn_implementation == "sdpa"


def test_nothing_to_look_at(tiny, prompts):
    with pytest.raises(MirageError, match="no latent in its responses to 6 examples: there is nothing to analyse"):
        gather(tiny, prompts, replace(GENERATION, max_spans=0))
    with pytest.raises(MirageError, match="no latent in its responses"):
        gather(tiny, prompts, replace(GENERATION, latent_size=0))
    with pytest.raises(MirageError, match="no examples"):
        gather(tiny, [], GENERATION)


def planted(latents):
    k, width = latents.shape
    roles = torch.tensor([PROMPT, MARK] + [LATENT] * k)
    inputs = torch.cat([torch.zeros(2, width), latents])
    return Example(None, roles, roles, roles > 9, [(2, 2 + k)], inputs, inputs, torch.zeros(3, k + 2), ())


@pytest.mark.parametrize(
    ("counts", "k", "chosen"),
    [([4, 4, 4], 4, [0, 1, 2]), ([1, 4, 4, 2], 4, [1, 2]), ([2, 2, 2, 3], 2, [0, 1, 2, 3]), ([1, 2], 2, [1])],
)
def test_a_block_keeps_the_most_latents(counts, k, chosen):
    vectors = [torch.randn(count, 5, generator=torch.Generator().manual_seed(count)) for count in counts]
    found, places = block([planted(x) for x in vectors])
    assert places == chosen and found.shape == (len(chosen), k, 5)
    assert all(torch.equal(own, vectors[i][:k]) for own, i in zip(found, chosen, strict=True))

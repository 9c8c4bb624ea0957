"""Attention masses against a softmax written out, and against a loop over all pairs of positions."""

from __future__ import annotations

import pytest
import torch
from support import dialogue, picture, ragged

from mirage_vlm.decoding import GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis import attention
from mirage_vlm.evaluation.analysis.material import LATENT, MARK, PATCH, PROMPT, ROLES, TEXT, gather, language_pass


@pytest.fixture(scope="module")
def examples(tiny):
    found = gather(tiny, ragged(), GenerationConfig(max_new_tokens=40), helpers=False)
    for example in found:  # the tiny model boxes nothing
        texts = (example.roles == TEXT).nonzero().flatten()
        example.answer[texts[-2:]] = True
    return found


@pytest.fixture(scope="module")
def numbers(tiny, examples):
    return attention.measure(tiny, examples)


def first_layer(vlm, example):
    """[H, T, T] the softmax of the first layer, written out: norm, projections, rotation, scores."""
    model = vlm.language_model
    layer, config = model.layers[0], model.config
    x = example.inputs
    x = layer.input_layernorm.weight * x / (x.square().mean(dim=1, keepdim=True) + config.rms_norm_eps).sqrt()
    t, size = len(x), config.hidden_size // config.num_attention_heads
    query = (layer.self_attn.q_proj.weight @ x.T + layer.self_attn.q_proj.bias[:, None]).T.view(t, -1, size)
    key = (layer.self_attn.k_proj.weight @ x.T + layer.self_attn.k_proj.bias[:, None]).T.view(t, -1, size)
    axes = torch.arange(3).repeat_interleave(torch.tensor(config.rope_parameters["mrope_section"]))  # of each frequency
    angles = (example.positions[axes].T * model.rotary_emb.inv_freq).repeat(1, 2)  # [T, size]
    cos, sin = angles.cos(), angles.sin()

    def rotated(v):  # [size]
        return torch.cat([-v[size // 2 :], v[: size // 2]])

    shared = config.num_attention_heads // config.num_key_value_heads
    found = torch.zeros(config.num_attention_heads, t, t)
    for h in range(config.num_attention_heads):
        for i in range(t):
            q = query[i, h] * cos[i] + rotated(query[i, h]) * sin[i]
            scores = []
            for j in range(i + 1):
                k = key[j, h // shared] * cos[j] + rotated(key[j, h // shared]) * sin[j]
                scores.append(q @ k / size**0.5)
            found[h, i, : i + 1] = torch.stack(scores).softmax(dim=0)
    return found


def looped(weights, example, group):
    """[R] mass and [R] positions seen by a query, by a loop over pairs; None without queries."""
    opened = example.runs[0][1]
    rows = []
    for i in range(len(example.ids)):
        wanted = example.answer[i] if group == "answer" else example.roles[i] == TEXT
        if i < opened or not wanted:
            continue
        mass, seen = [0.0] * len(ROLES), [0] * len(ROLES)
        for j in range(i + 1):
            if example.blind is not None and example.blind[i] and example.roles[j] == PATCH:
                continue
            mass[example.roles[j]] += float(weights[i, j])
            seen[example.roles[j]] += 1
        rows.append((mass, seen))
    if not rows:
        return None
    return [torch.tensor([row[part] for row in rows], dtype=torch.double).mean(dim=0) for part in (0, 1)]


@pytest.mark.parametrize("group", ["text", "answer"])
def test_the_first_layer_by_hand(tiny, examples, numbers, group):
    with torch.no_grad():
        weights = [first_layer(tiny, example) for example in examples]
    for h in range(tiny.language_model.config.num_attention_heads):
        each = [looped(w[h], example, group) for w, example in zip(weights, examples, strict=True)]
        each = [found for found in each if found is not None]
        mass = torch.stack([found[0] for found in each]).mean(dim=0)
        assert numbers["groups"][group]["heads"][0][h] == pytest.approx(mass.tolist(), abs=1e-5)
    assert numbers["groups"][group]["examples"] == len(each)


@pytest.mark.parametrize("group", ["text", "answer"])
def test_every_layer_against_a_loop(tiny, examples, numbers, group):
    found = numbers["groups"][group]
    per_example = []
    for example in examples:
        weights = language_pass(tiny, example.inputs[None], example.positions[:, None], weights=True).attentions
        layers = [looped(layer[0].mean(dim=0), example, group) for layer in weights]
        if layers[0] is not None:
            per_example.append(layers)
    tokens = torch.stack([layers[0][1] for layers in per_example]).mean(dim=0)
    assert found["tokens"] == pytest.approx(tokens.tolist())
    for number in range(len(per_example[0])):
        masses = torch.stack([layers[number][0] for layers in per_example])
        mass = masses.mean(dim=0)
        assert found["mass"][number] == pytest.approx(mass.tolist(), abs=1e-6) and sum(mass) == pytest.approx(1)
        assert found["spread"][number] == pytest.approx(masses.std(dim=0, correction=0).tolist(), abs=1e-6)
        for r, role in enumerate(ROLES):
            even = mass[r] / tokens[r] * tokens.sum()
            assert found["per_token"][number][r] == pytest.approx(float(mass[r] / tokens[r]), abs=1e-6), role
            assert found["against_even"][number][r] == pytest.approx(float(even), abs=1e-5), role


def test_evicted_pictures_are_not_looked_at(tiny, examples):
    """The masses of what still can be seen, those of a loop over the scores' softmax without the patches."""
    found = gather(tiny, ragged(), GenerationConfig(max_new_tokens=40, evict_images=True), helpers=False)
    shown = [example for example in found if example.pictures]
    numbers = attention.measure(tiny, shown)["groups"]["text"]
    assert numbers["tokens"][PATCH] == 0 and all(layer[PATCH] == 0 for layer in numbers["mass"])
    assert all(sum(layer) == pytest.approx(1) for layer in numbers["mass"])
    with torch.no_grad():
        weights = [first_layer(tiny, example) for example in shown]
    each = []
    for layer, example in zip(weights, shown, strict=True):
        hidden = example.blind[:, None] & (example.roles == PATCH)[None]
        layer = layer.masked_fill(hidden, 0)
        each.append(looped((layer / layer.sum(dim=-1, keepdim=True)).mean(dim=0), example, "text"))
    mass = torch.stack([one[0] for one in each if one is not None]).mean(dim=0)
    assert numbers["mass"][0] == pytest.approx(mass.tolist(), abs=1e-5)


def test_an_even_spread_is_even():
    roles = torch.tensor([PROMPT, PATCH, PATCH, TEXT, MARK, LATENT, LATENT, MARK, TEXT, TEXT])
    weights = torch.ones(10, 10).tril() / torch.arange(1, 11)[:, None]
    queries = torch.tensor([False] * 9 + [True])
    mass, seen = attention.masses(weights[None], roles, queries)[0], attention.visible(roles, queries)
    assert seen.tolist() == [1, 2, 3, 2, 2]
    assert torch.allclose(mass / seen * seen.sum(), torch.ones(5))


def test_the_picture_and_the_table(numbers):
    figure = attention.draw(numbers)
    left, right = figure.axes[:2]
    group = numbers["groups"]["text"]
    layers = len(group["mass"])
    heights = torch.tensor([bar.get_height() for bar in left.patches], dtype=torch.double).view(len(ROLES), layers)
    assert torch.allclose(heights.T, 100 * torch.tensor(group["mass"], dtype=torch.double)) and len(figure.axes) == 4
    assert torch.allclose(heights.sum(dim=0), torch.full((layers,), 100.0).double())
    latents = [row[LATENT] for row in group["against_even"]]
    assert right.lines[LATENT].get_ydata() == pytest.approx(latents)
    rows = attention.table(numbers)
    assert len(rows) == 1 + 2 * (layers + 1) and {len(row) for row in rows} == {len(rows[0])}
    assert rows[1][6] == f"{100 * group['mass'][0][LATENT]:.1f}" and rows[1][7] == f"{latents[0]:.2f}"


def test_nothing_of_a_role_and_no_text_after_the_span(tiny):
    prompts = [dialogue(["Go"], ["x"]), dialogue([picture(1, 1, 10), picture(2, 1, 11), "Go"], ["x"])]
    found = gather(tiny, [*prompts, *ragged()], GenerationConfig(max_new_tokens=40), helpers=False)
    blind = [example for example in found if not example.pictures]
    assert blind, "some prompt without a picture opens a span"
    numbers = attention.measure(tiny, blind)
    text = numbers["groups"]["text"]
    assert numbers["groups"]["answer"] is None and text["tokens"][PATCH] == 0
    assert text["mass"][0][PATCH] == 0 and text["per_token"][0][PATCH] is None
    assert len(attention.draw(numbers).axes) == 2
    assert {row[0] for row in attention.table(numbers)} == {"from", "text"}
    for example in blind:
        example.roles[example.runs[0][1] :] = MARK
    with pytest.raises(MirageError, match="no response has text after a latent span"):
        attention.measure(tiny, blind)

"""The nearest patch and word are those that were planted; what the LM head says is what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import replayed, slow_rollout, split
from test_material import prompts_with_helpers

from mirage_vlm.decoding import GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis import nearest
from mirage_vlm.evaluation.analysis.material import gather


@pytest.fixture(scope="module")
def examples(tiny):
    """Those with a picture and a helper image."""
    found = gather(tiny, prompts_with_helpers(), GenerationConfig(max_new_tokens=40))
    return [example for example in found if example.pictures and example.helpers]


def with_latents(example, vectors):
    """The example with other vectors where its first latents are."""
    inputs = example.inputs.clone()
    places = [p for start, end in example.runs for p in range(start, end)]
    inputs[places[: len(vectors)]] = torch.stack(vectors)
    return replace(example, inputs=inputs)


def test_planted_patches_and_words(tiny, examples):
    own, other = examples[:2]
    table = tiny.model.get_input_embeddings().weight.detach()
    word = tiny.tokenizer("gift", add_special_tokens=False)["input_ids"][0]
    patch = len(own.pictures[0].features) - 1
    helper = len(own.helpers[0].features) - 1
    vectors = [
        3 * own.pictures[0].features[patch] + 0.01,
        0.5 * own.helpers[0].features[helper],
        7 * table[word],
    ]
    numbers = nearest.measure(tiny, [with_latents(own, vectors), other])
    first, second, third, *_ = numbers["latents"][0]
    width = own.pictures[0].grid[1]
    found = first["prompt"][0]
    assert (found["row"], found["column"]) == divmod(patch, width) and found["cosine"] > 0.999
    found = second["helper"][0]
    assert (found["row"], found["column"]) == divmod(helper, own.helpers[0].grid[1])
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert third["words"][0]["id"] == word and third["words"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert third["words"][0]["token"] == tiny.tokenizer.decode([word])
    assert first["norm"] == pytest.approx(float(vectors[0].norm()))


def test_every_number_against_a_loop(tiny, examples):
    numbers = nearest.measure(tiny, examples)
    table = tiny.model.get_input_embeddings().weight.detach()
    rows = split(tiny, replayed(tiny, [example.trajectory for example in examples]))
    best, elsewhere = [], []
    for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
        with torch.no_grad():
            hidden, _ = slow_rollout(tiny, row)
        places = [(s, j, start + j) for s, (start, end) in enumerate(example.runs) for j in range(end - start)]
        after = examples[(i + 1) % len(examples)].pictures[0].features
        for entry, latent, (s, j, p) in zip(numbers["latents"][i], example.latents, places, strict=True):
            assert (entry["span"], entry["step"]) == (s, j)
            for name, pic in (("prompt", example.pictures[0]), ("helper", example.helpers[s])):
                cosines = [float(latent @ f / latent.norm() / f.norm()) for f in pic.features]
                order = sorted(range(len(cosines)), key=lambda n: -cosines[n])[: nearest.TOP]
                assert [divmod(n, pic.grid[1]) for n in order] == [(e["row"], e["column"]) for e in entry[name]]
                assert [e["cosine"] for e in entry[name]] == pytest.approx([cosines[n] for n in order], abs=1e-5)
                if name == "prompt":
                    assert entry["prompt_mean"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
            words = torch.stack([latent @ e / latent.norm() / e.norm().clamp(min=1e-12) for e in table])
            assert [w["id"] for w in entry["words"]] == words.topk(nearest.TOP).indices.tolist()
            chances = (tiny.model.lm_head.weight @ hidden[p - 1]).detach().softmax(dim=0)
            assert entry["said"][0]["id"] == int(chances.argmax())
            assert entry["said"][0]["probability"] == pytest.approx(float(chances.max()), abs=1e-4)
            if (s, j) == (0, 0):
                best.append(entry["prompt"][0]["cosine"])
                elsewhere.append(max(float(F.cosine_similarity(latent, f, dim=0)) for f in after))
    step = numbers["steps"][0]
    assert step["n"] == len(examples)
    assert step["prompt"] == pytest.approx(sum(best) / len(best), abs=1e-5)
    assert step["other"] == pytest.approx(sum(elsewhere) / len(elsewhere), abs=1e-5)
    counts = [len(example.latents) for example in examples]
    assert [s["n"] for s in numbers["steps"]] == [sum(c > j for c in counts) for j in range(max(counts))]


def test_the_picture_has_a_frame_around_each_nearest_patch(tiny, examples):
    numbers = nearest.measure(tiny, examples)
    figure = nearest.draw(numbers, examples)
    columns = min(nearest.SHOWN, len(examples))
    assert len(figure.axes) == 2 * columns
    for column in range(columns):
        own = [entry for entry in numbers["latents"][column] if entry["span"] == 0]
        for axes, name in ((figure.axes[column], "prompt"), (figure.axes[columns + column], "helper")):
            height, width = (examples[column].pictures if name == "prompt" else examples[column].helpers)[0].grid
            assert axes.images[0].get_array().shape[:2] == (28 * height, 28 * width)
            assert len(axes.patches) == len(own)
            for frame, entry in zip(axes.patches, own, strict=True):
                x, y = frame.get_xy()
                centre = (y + frame.get_height() / 2 + 0.5) / 28, (x + frame.get_width() / 2 + 0.5) / 28
                assert centre == pytest.approx((entry[name][0]["row"] + 0.5, entry[name][0]["column"] + 0.5))
    rows = nearest.table(numbers)
    assert len(rows) == 1 + len(numbers["steps"]) and {len(row) for row in rows} == {len(rows[0])}


def test_prompts_without_pictures_or_helpers(tiny, examples):
    bare = replace(examples[0], helpers=(), targets=())
    blind = replace(examples[1], pictures=())
    numbers = nearest.measure(tiny, [bare, blind])
    assert numbers["latents"][0][0]["helper"] is None and numbers["latents"][1][0]["prompt"] is None
    assert numbers["steps"][0]["other"] is not None, "of the one that is followed by a picture"
    assert nearest.table(numbers)[1][0] == "1"
    nearest.draw(numbers, [bare, blind])
    with pytest.raises(MirageError, match="no prompt has a picture"):
        nearest.measure(tiny, [blind])

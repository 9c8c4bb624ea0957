"""Collapse, rank and variance of vectors that were made to have them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from scipy.stats import entropy
from test_material import planted

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis import similarity
from mirage_vlm.evaluation.analysis.material import Example

N, K, D = 12, 3, 16


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def test_collapsed_latents_are_alike_in_all():
    found = similarity.alike(random(D).expand(N, K, D))
    assert found["across_mean"] == pytest.approx(1) and found["within_mean"] == pytest.approx(1)
    assert found["effective_rank"] == pytest.approx(1) and found["variance"] is None
    assert found["across_histogram"][-1] == 1


def test_collapsed_across_examples_alone():
    """One vector for each place, whatever the example: the cosine is blind to their lengths."""
    places = torch.eye(D)[:K] * torch.tensor([1.0, 5.0, 0.1])[:, None]
    found = similarity.alike(places.expand(N, K, D))
    assert found["across"] == pytest.approx([1, 1, 1]) and found["within_mean"] == pytest.approx(0)
    assert found["variance"]["places"] == pytest.approx(1) and found["variance"]["examples"] == pytest.approx(0)
    other = similarity.alike(torch.eye(D)[:N, None].expand(N, K, D))
    assert other["across_mean"] == pytest.approx(0) and other["within_mean"] == pytest.approx(1)
    assert other["variance"]["examples"] == pytest.approx(1) and other["effective_rank"] == pytest.approx(N)


def test_every_number_against_a_loop():
    x = 0.5 + random(N, K, D)
    found = similarity.alike(x)
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    for p in range(K):
        assert found["across"][p] == pytest.approx(sum(cosine(x[i, p], x[j, p]) for i, j in pairs) / len(pairs))
        for q in range(K):
            assert found["within"][p][q] == pytest.approx(sum(cosine(e[p], e[q]) for e in x) / N)
    cosines = [cosine(x[i, p], x[j, p]) for i, j in pairs for p in range(K)]
    edges = [-1 + 2 * b / similarity.BINS for b in range(similarity.BINS + 1)]
    counted = [sum(low <= c < high for c in cosines) / len(cosines) for low, high in pairwise(edges)]
    assert found["across_histogram"] == pytest.approx(counted)
    mean = sum(x[i, p] for i in range(N) for p in range(K)) / (N * K)
    total = sum(float((x[i, p] - mean).square().sum()) for i in range(N) for p in range(K))
    between = K * sum(float((x[i].mean(dim=0) - mean).square().sum()) for i in range(N))
    places = N * sum(float((x[:, p].mean(dim=0) - mean).square().sum()) for p in range(K))
    rest = sum(
        float((x[i, p] - x[i].mean(dim=0) - x[:, p].mean(dim=0) + mean).square().sum())
        for i in range(N)
        for p in range(K)
    )
    wanted = {"examples": between / total, "places": places / total, "rest": rest / total}
    assert found["variance"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_effective_rank_of_planted_rank(rank):
    rows = torch.linalg.qr(random(40, rank))[0] @ torch.linalg.qr(random(D, rank, seed=1))[0].T
    assert similarity.effective_rank(7 * rows) == pytest.approx(rank, rel=1e-5)
    uneven = random(40, D)
    values = torch.linalg.svdvals(uneven.double()).numpy()
    assert similarity.effective_rank(uneven) == pytest.approx(float(torch.tensor(entropy(values)).exp()))
    assert similarity.effective_rank(torch.zeros(4, 3)) == 0


def with_targets(latents, targets):
    example = planted(latents)
    fields = {name: getattr(example, name) for name in example.__dataclass_fields__}
    return Example(**fields | {"targets": (targets[:1], targets[1:])})


def test_to_targets():
    latents, targets = random(N, K, D), random(N, K, D, seed=1)
    targets[:, 0] = 3 * latents[:, 0]
    numbers = similarity.measure([with_targets(x, y) for x, y in zip(latents, targets, strict=True)])
    own = [cosine(latents[i, p], targets[i, p]) for i in range(N) for p in range(K)]
    other = [cosine(latents[i, p], targets[j, p]) for i in range(N) for j in range(N) if i != j for p in range(K)]
    found = numbers["to_target"]
    assert found["own"] == pytest.approx(sum(own) / len(own)) and found["other"] == pytest.approx(
        sum(other) / len(other)
    )
    assert found["matrix"][0][0] == pytest.approx(1)
    assert found["matrix"][1][2] == pytest.approx(
        sum(cosine(x[1], y[2]) for x, y in zip(latents, targets, strict=True)) / N
    )
    assert numbers["targets"]["across_mean"] == pytest.approx(similarity.alike(targets)["across_mean"])
    assert json.loads(json.dumps(numbers)) == numbers
    assert len(similarity.draw(numbers).axes) == 5
    rows = similarity.table(numbers)
    assert [row[0] for row in rows] == ["", "latents", "targets"] and {len(row) for row in rows} == {len(rows[0])}
    assert rows[1][4:6] == [f"{found['own']:.3f}", f"{found['other']:.3f}"]


def test_lengths_that_differ_and_too_few():
    examples = [planted(random(k, D, seed=i)) for i, k in enumerate([3, 3, 3, 1])]
    numbers = similarity.measure(examples)
    assert (numbers["examples"], numbers["left_out"], numbers["latents_each"]) == (3, 1, 3)
    assert numbers["targets"] is None and numbers["to_target"] is None
    similarity.draw(numbers)
    assert len(similarity.table(numbers)) == 2
    one_each = similarity.measure([planted(random(1, D, seed=i)) for i in range(3)])
    assert one_each["latents"]["within_mean"] is None and similarity.table(one_each)[1][3] == "–"
    with pytest.raises(MirageError, match="at least two responses"):
        similarity.measure(examples[:1])

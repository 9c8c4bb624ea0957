"""Choosing a token, against candidates counted one by one."""

import math

import pytest
import torch

from mirage_vlm.decoding.sampling import Sampling, allowed, choose


def naive(logits: list[float], top_k: int, top_p: float) -> list[int]:
    """The tokens that may be drawn, most likely first."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    total = sum(math.exp(logits[i]) for i in order)
    kept, mass = [], 0.0
    for i in order:
        if top_p < 1 and mass >= top_p:
            break
        kept.append(i)
        mass += math.exp(logits[i]) / total
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_candidates_are_those_counted_one_by_one(top_k, top_p, temperature):
    for seed in range(10):
        logits = 3 * torch.randn(50, generator=torch.Generator().manual_seed(seed)) / temperature
        found = allowed(logits.clone(), Sampling(temperature, top_p, top_k))
        kept = naive(logits.tolist(), top_k, top_p)
        assert set(found.isfinite().nonzero().flatten().tolist()) == set(kept)
        assert torch.equal(found[kept], logits[kept]), "what stays keeps its logit"


def test_the_nucleus_reaches_its_mass():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for top_p, size in [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.99, 4)]:
        assert allowed(logits, Sampling(1.0, top_p)).isfinite().sum() == size


def test_tokens_are_drawn_as_often_as_they_are_likely():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, 1.5, -1.0, 0.5])
    sampling = Sampling(temperature=0.7, top_p=0.95, top_k=5)
    drawn = [choose(logits, [3], sampling, generator) for _ in range(3000)]
    kept = naive([x / 0.7 if i != 3 else -math.inf for i, x in enumerate(logits.tolist())], 5, 0.95)
    total = sum(math.exp(logits[i] / 0.7) for i in kept)
    for token in range(6):
        likely = math.exp(logits[token] / 0.7) / total if token in kept else 0.0
        assert drawn.count(token) / 3000 == pytest.approx(likely, abs=4 * math.sqrt(0.25 / 3000))
    assert drawn.count(3) == 0 and 2 < len(set(drawn)) < 6


def test_what_is_banned_does_not_count_towards_the_nucleus():
    """The candidates are chosen among what may be said, not around it."""
    logits = torch.tensor([10.0, 1.0, 0.9, 0.8])
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, [0], Sampling(1.0, 0.7, 3), generator) for _ in range(200)}
    assert drawn == {1, 2, 3}


def test_greedy_takes_the_best_and_leaves_chance_alone():
    generator = torch.Generator().manual_seed(4)
    before = generator.get_state()
    for seed in range(20):
        logits = torch.randn(30, generator=torch.Generator().manual_seed(seed))
        kept = logits.clone()
        order = sorted(range(30), key=lambda i: -float(logits[i]))
        assert choose(logits, [], Sampling(), generator) == order[0]
        assert choose(logits, order[:2], Sampling(), generator) == order[2]
        assert torch.equal(logits, kept), "the logits are not changed"
    assert torch.equal(generator.get_state(), before)


def test_a_generator_decides_alone():
    logits = torch.randn(100, generator=torch.Generator().manual_seed(1))

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [choose(logits, [], Sampling(1.0), generator) for _ in range(20)]

    torch.manual_seed(0)
    first = draw(3)
    torch.manual_seed(9)
    assert draw(3) == first != draw(4)


def test_hardly_any_temperature_is_greedy():
    logits = torch.tensor([0.0, 0.1, 0.05])
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, [], Sampling(1e-4), generator) for _ in range(50)} == {1}

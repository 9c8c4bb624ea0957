"""Choosing a token, against candidates counted one by one."""

import math

import pytest
import torch

from mirage_vlm.decoding.sampling import allowed, draw, uniforms


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


RULES = [(k, p) for k in (0, 1, 3, 40, 100) for p in (1.0, 0.95, 0.5, 0.01)]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_candidates_are_those_counted_one_by_one(temperature):
    """Rows of one call have rules of their own."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(len(RULES), 50, generator=generator) / temperature
        found = allowed(logits, torch.tensor([k for k, _ in RULES]), torch.tensor([p for _, p in RULES]))
        for row, (top_k, top_p) in enumerate(RULES):
            kept = naive(logits[row].tolist(), top_k, top_p)
            assert set(found[row].isfinite().nonzero().flatten().tolist()) == set(kept), (top_k, top_p)
            assert torch.equal(found[row, kept], logits[row, kept]), "what stays keeps its logit"


def test_the_nucleus_reaches_its_mass():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for top_p, size in [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.99, 4)]:
        assert allowed(logits, torch.tensor([0]), torch.tensor([top_p])).isfinite().sum() == size


def test_what_is_banned_does_not_count_towards_the_nucleus():
    """The candidates are chosen among what may be said, not around it."""
    logits = torch.tensor([[-math.inf, 1.0, 0.9, 0.8]])
    kept = allowed(logits, torch.tensor([3]), torch.tensor([0.7])).expand(200, -1)
    drawn = draw(kept, torch.arange(200) / 200)
    assert set(drawn.tolist()) == {1, 2, 3}


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([2.0, 1.0, 0.0, -math.inf, -1.0, 0.5])
    count = 4000
    drawn = draw(logits.expand(count, -1), uniforms(torch.full((count,), 7), torch.arange(count))).tolist()
    total = sum(math.exp(x) for x in logits.tolist())
    for token, logit in enumerate(logits.tolist()):
        likely = math.exp(logit) / total
        assert drawn.count(token) / count == pytest.approx(likely, abs=4 * math.sqrt(0.25 / count))
    assert drawn.count(3) == 0


def test_the_largest_number_draws_something_that_may_be_said():
    """Rounding must not carry a draw past the last candidate."""
    for seed in range(50):
        logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(seed))
        logits[:, 200:] = -math.inf
        for number in (0.0, 1 - 2.0**-24, 1.0):
            assert draw(logits, torch.tensor([number])).item() < 200


def splitmix(state: int) -> int:
    """splitmix64 in Python's whole numbers."""
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_numbers_are_those_of_splitmix64():
    seeds, counts = [0, 1, -1, 123456789, 2**62], [0, 1, 5, 1000, 77]
    found = uniforms(torch.tensor(seeds), torch.tensor(counts)).tolist()
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    for number, seed, count in zip(found, seeds, counts, strict=True):
        inner = splitmix(seed * golden & mask)
        assert number == (splitmix((inner + count * golden) & mask) >> 40) / 2**24


def test_numbers_are_even_and_differ_between_neighbours():
    grid = uniforms(torch.arange(100).repeat_interleave(100), torch.arange(100).repeat(100))
    assert grid.min() >= 0 and grid.max() < 1
    assert torch.histc(grid, 10, 0, 1).sub(1000).abs().max() < 150
    table = grid.view(100, 100)
    assert torch.corrcoef(table).fill_diagonal_(0).abs().max() < 0.5
    assert torch.corrcoef(table.T).fill_diagonal_(0).abs().max() < 0.5

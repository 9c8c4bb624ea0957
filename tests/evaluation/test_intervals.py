"""Intervals: Wilson's against its defining equation and published values, the bootstrap against theory."""

import math
from statistics import NormalDist

import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.intervals import paired_bootstrap, wilson


@pytest.mark.parametrize(("hits", "n"), [(1, 10), (50, 100), (379, 400), (3, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_at_both_ends_the_share_is_z_standard_errors_away(hits, n, level):
    z = NormalDist().inv_cdf((1 + level) / 2)
    for end in wilson(hits, n, level):
        assert abs(hits / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n))


def test_published_values():
    # Newcombe 1998, table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_all_and_none():
    low, high = wilson(30, 30)
    assert high == 1.0 and low == pytest.approx(1 - wilson(0, 30)[1])


def test_the_bootstrap_agrees_with_the_normal_interval():
    a = [i % 10 < 7 for i in range(4000)]
    b = [i % 10 < 3 or i % 10 == 9 for i in range(4000)]  # 0.7 and 0.4: 40 % better, 10 % worse
    difference, low, high = paired_bootstrap(a, b, rounds=40_000)
    spread = math.sqrt((0.5 - 0.3**2) / 4000)
    assert difference == pytest.approx(0.3)
    assert (low, high) == pytest.approx((0.3 - 1.96 * spread, 0.3 + 1.96 * spread), abs=1e-3)


def test_pairs_that_always_agree_differ_by_nothing():
    assert paired_bootstrap([True, False] * 9, [True, False] * 9) == (0.0, 0.0, 0.0)


def test_seeds():
    a, b = [True] * 30 + [False] * 20, [True] * 20 + [False] * 30
    assert paired_bootstrap(a, b, seed=1) == paired_bootstrap(a, b, seed=1)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts(hits, n):
    with pytest.raises(MirageError, match="hits"):
        wilson(hits, n)


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [])])
def test_outcomes_without_pairs(a, b):
    with pytest.raises(MirageError, match="one length"):
        paired_bootstrap(a, b)

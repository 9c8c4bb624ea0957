"""Intervals: Wilson's against scipy, its equation and published values; the bootstrap against scipy and theory."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.intervals import paired_bootstrap, sign_test, wilson


@pytest.mark.parametrize(("hits", "n"), [(1, 10), (50, 100), (379, 400), (3, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_at_both_ends_the_share_is_z_standard_errors_away(hits, n, level):
    z = NormalDist().inv_cdf((1 + level) / 2)
    for end in wilson(hits, n, level):
        assert abs(hits / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n))


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_is_scipys(level):
    cases = [(k, n) for n in (1, 2, 3, 7, 20, 61) for k in range(n + 1)]
    cases += [(k, n) for n in (400, 12345) for k in (0, 1, n // 3, n // 2, n - 1, n)]
    for k, n in cases:
        wanted = scipy.stats.binomtest(k, n).proportion_ci(confidence_level=level, method="wilson")
        assert wilson(k, n, level) == pytest.approx((wanted.low, wanted.high), abs=1e-12), (k, n)


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


@pytest.mark.parametrize(
    ("n", "shares", "level"), [(60, (0.3, 0.1), 0.95), (250, (0.02, 0.2), 0.9), (40, (0.0, 0.1), 0.95)]
)
def test_the_bootstrap_is_scipys(n, shares, level):
    """Paired, percentile, as many rounds. An end is a quantile of rounds, which come in steps of 1 / n."""
    better, worse = (round(n * share) for share in shares)
    a = [True] * better + [False] * worse + [i % 3 == 0 for i in range(n - better - worse)]
    b = [False] * better + [True] * worse + a[better + worse :]
    rounds = 20_000
    wanted = scipy.stats.bootstrap(
        (np.array(a, float), np.array(b, float)),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=rounds,
        confidence_level=level,
        rng=np.random.default_rng(1),
    )
    difference, low, high = paired_bootstrap(a, b, rounds=rounds, level=level)
    assert difference == pytest.approx((better - worse) / n)
    spread, tail = np.std(wanted.bootstrap_distribution), (1 - level) / 2
    density = NormalDist().pdf(NormalDist().inv_cdf(tail)) / spread  # of the rounds, at the quantile
    error = math.sqrt(2 * tail * (1 - tail) / rounds) / density  # standard error of the difference of two quantiles
    interval = wanted.confidence_interval
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=4 * error + 1 / n)
    assert np.std(wanted.bootstrap_distribution) == pytest.approx(
        (high - low) / 2 / NormalDist().inv_cdf(1 - tail), rel=0.2
    )


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


@pytest.mark.parametrize(
    ("first", "second", "same"), [(0, 4, 0), (4, 0, 3), (3, 12, 50), (20, 20, 0), (0, 0, 9), (40, 90, 470)]
)
def test_the_sign_test_is_scipys(first, second, same):
    a = [True] * first + [False] * second + [True, False] * same
    b = [False] * first + [True] * second + [True, False] * same
    n = first + second
    wanted = scipy.stats.binomtest(second, n, alternative="greater").pvalue if n else 1.0
    assert sign_test(a, b) == pytest.approx(wanted, rel=1e-9)


def test_a_few_pairs_prove_less_than_the_bootstrap_says():
    own, other = [True] * 24, [False] * 4 + [True] * 20
    assert paired_bootstrap(other, own)[2] < 0 < sign_test(other, own) - 0.06
    with pytest.raises(MirageError, match="paired outcomes must be of one length above 0, not 1 and 2"):
        sign_test([True], [True, False])

"""How sure an accuracy is: intervals for a share, and for the difference of two on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import NormalDist

import numpy as np

from mirage_vlm.errors import MirageError


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927); sound near 0 and 1 too, where ± standard errors are not.

    Args:
        hits: successes among n trials.
        level: coverage.

    Raises:
        MirageError: n is not positive, or hits is not within 0 … n.
    """
    if n < 1 or not 0 <= hits <= n:
        raise MirageError(f"an interval needs 0 <= hits <= n and n > 0, not {hits} hits of {n}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, scale = hits / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5 / scale
    low, high = centre - half, centre + half
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def paired_bootstrap(
    a: Sequence[bool], b: Sequence[bool], seed: int = 0, rounds: int = 10_000, level: float = 0.95
) -> tuple[float, float, float]:
    """mean(a) − mean(b) of paired outcomes, and its percentile bootstrap interval (Efron 1979).

    Examples are drawn again with their pair of outcomes. A pair differs by −1, 0 or 1, so a round is one draw of how
    many of each there are.

    Returns:
        The difference, and the lower and upper end of its interval.

    Raises:
        MirageError: the two are of different lengths, or empty.
    """
    _check_pairs(a, b)
    differences = np.asarray(a, dtype=int) - np.asarray(b, dtype=int)
    shares = np.array([(differences == value).mean() for value in (-1, 0, 1)])
    drawn = np.random.default_rng(seed).multinomial(len(differences), shares / shares.sum(), size=rounds)
    low, high = np.quantile((drawn[:, 2] - drawn[:, 0]) / len(differences), [(1 - level) / 2, (1 + level) / 2])
    return float(differences.mean()), float(low), float(high)


def sign_test(a: Sequence[bool], b: Sequence[bool]) -> float:
    """How likely so many pairs, or more, are right in `b` alone if neither is better: the exact test of McNemar (1947).

    Of the pairs that differ each is then as likely one way as the other. One-sided; the test of "they are equally good"
    against either has twice the smaller of the two ways round, at most 1. Unlike a bootstrap interval, which knows no
    other pairs than those that were seen, it is exact for few of them: after 4 of 4 it is 0.06.

    Returns:
        p, 1 where no pair differs.

    Raises:
        MirageError: the two are of different lengths, or empty.
    """
    _check_pairs(a, b)
    first = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    second = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    n = first + second
    return sum(comb(n, k) for k in range(second, n + 1)) / 2**n


def in_points(interval: Sequence[float]) -> str:
    """The interval of a difference in percentage points: `-46.7 to -13.3`."""
    low, high = interval
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def over_seeds(outcomes: Sequence[Sequence[float]], level: float = 0.95) -> tuple[float, float, float]:
    """Mean over training seeds and items, with an interval for other seeds and other items.

    The variance of the mean is that of the seeds' means over the number of seeds and that of the items' means over the
    number of items; what seeds and items do together is in both, so it is not too small. The interval is Student's,
    with the degrees of freedom of Welch and Satterthwaite: with three seeds that differ it is wide, as it must be. With
    one seed it is of the items alone.

    Args:
        outcomes: for each seed the outcome of each item, the same items for all; or the difference of two outcomes.

    Returns:
        The mean, and the lower and upper end of its interval.

    Raises:
        MirageError: there is nothing, or seeds have different numbers of items.
    """
    table = _table(outcomes)
    return _interval(float(table.mean()), [_of_means(table, axis=1), _of_means(table, axis=0)], level)


def ahead_over_seeds(
    one: Sequence[Sequence[float]], other: Sequence[Sequence[float]], level: float = 0.95
) -> tuple[float, float, float]:
    """mean(one) − mean(other) of two ways of training with seeds of their own, on the same items, as `over_seeds`.

    Raises:
        MirageError: as `over_seeds`, or the two have different numbers of items.
    """
    first, second = _table(one), _table(other)
    if first.shape[1] != second.shape[1]:
        raise MirageError(f"both must have the same items, not {first.shape[1]} and {second.shape[1]}")
    items = first.mean(axis=0) - second.mean(axis=0)
    parts = [_of_means(first, axis=1), _of_means(second, axis=1), _of_means(items[None], axis=0)]
    return _interval(float(items.mean()), parts, level)


def student(freedom: float, level: float = 0.95) -> float:
    """How many standard errors to each side hold `level` of Student's t distribution of so many degrees of freedom.

    With x = √ν · tan θ its density is in proportion to cos(θ)^(ν − 1), which is added up.

    Args:
        freedom: ν, 1 or more, need not be whole.
    """
    if freedom > 1e4:
        return NormalDist().inv_cdf((1 + level) / 2)
    angles = np.linspace(0, np.pi / 2, 20_001)
    middles = (angles[1:] + angles[:-1]) / 2
    share = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (freedom - 1))])
    return float(freedom**0.5 * np.tan(np.interp(level, share / share[-1], angles)))


def _check_pairs(a: Sequence[bool], b: Sequence[bool]) -> None:
    if len(a) != len(b) or not len(a):
        raise MirageError(f"paired outcomes must be of one length above 0, not {len(a)} and {len(b)}")


def _table(outcomes: Sequence[Sequence[float]]) -> np.ndarray:
    """[S, N]."""
    if not len(outcomes) or not len(outcomes[0]) or len({len(row) for row in outcomes}) > 1:
        raise MirageError("an interval over seeds needs the same items, at least one, for each seed")
    return np.asarray(outcomes, dtype=float)


def _of_means(table: np.ndarray, axis: int) -> tuple[float, int]:
    """Variance of the mean of the means along an axis, and its degrees of freedom; (0, 0) of a single one."""
    means = table.mean(axis=axis)
    return (float(means.var(ddof=1)) / len(means), len(means) - 1) if len(means) > 1 else (0.0, 0)


def _interval(mean: float, parts: Sequence[tuple[float, int]], level: float) -> tuple[float, float, float]:
    """Of independent parts of the variance of a mean, each with its degrees of freedom."""
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return mean, mean, mean
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts if variance)
    half = student(freedom, level) * total**0.5
    return mean, mean - half, mean + half

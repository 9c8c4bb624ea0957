"""How sure an accuracy is: intervals for a share, and for the difference of two on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
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
    if len(a) != len(b) or not len(a):
        raise MirageError(f"paired outcomes must be of one length above 0, not {len(a)} and {len(b)}")
    differences = np.asarray(a, dtype=int) - np.asarray(b, dtype=int)
    shares = np.array([(differences == value).mean() for value in (-1, 0, 1)])
    drawn = np.random.default_rng(seed).multinomial(len(differences), shares / shares.sum(), size=rounds)
    low, high = np.quantile((drawn[:, 2] - drawn[:, 0]) / len(differences), [(1 - level) / 2, (1 + level) / 2])
    return float(differences.mean()), float(low), float(high)


def in_points(interval: Sequence[float]) -> str:
    """The interval of a difference in percentage points: `-46.7 to -13.3`."""
    low, high = interval
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def bootstrap_over_seeds(
    outcomes: Sequence[Sequence[float]], seed: int = 0, rounds: int = 2_000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean over training seeds and items, with an interval that knows of both.

    Seeds are drawn again, and in each of them the items, which all seeds share, by one draw for all (a two-way
    bootstrap, Owen 2007). With one seed the interval is of the items alone.

    Args:
        outcomes: for each seed the outcome of each item, or the difference of two.

    Returns:
        The mean, and the lower and upper end of its interval.

    Raises:
        MirageError: there is nothing, or seeds have different numbers of items.
    """
    if not outcomes or not len(outcomes[0]) or len({len(row) for row in outcomes}) > 1:
        raise MirageError("a bootstrap over seeds needs the same items, at least one, for each seed")
    table = np.asarray(outcomes, dtype=float)  # [S, N]
    rng = np.random.default_rng(seed)
    seeds, n = table.shape
    means = np.empty(rounds)
    for i in range(rounds):
        weights = np.bincount(rng.integers(seeds, size=seeds), minlength=seeds) / seeds
        items = rng.multinomial(n, np.full(n, 1 / n)) / n
        means[i] = weights @ table @ items
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(table.mean()), float(low), float(high)

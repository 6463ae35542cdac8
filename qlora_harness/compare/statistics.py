"""Intervals and tests for the difference of two arms; each test inverts its interval.

Questions and seeds are crossed: other questions and other seeds would both move a difference, and
their variances add (the interaction counts twice, which is cautious). Intervals over questions hold
for questions like these or, if clustered, for subjects like these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from qlora_harness.compare.record import Estimate

Floats = NDArray[np.float64]
LEVEL = 0.05
NORMAL = 1e9  # degrees of freedom of the normal distribution


class Variance(NamedTuple):
    """One source of error: a variance of the difference, and its degrees of freedom."""

    value: float
    freedom: float


def over_items(
    differences: Floats, weights: Floats | None = None, *, clusters: NDArray[np.intp] | None = None
) -> tuple[float, Variance]:
    """Returns a weighted mean of differences [n] and its variance over items.

    With weights [n] it is a ratio of sums, whose variance is that of its linearisation (Cochran,
    Sampling Techniques, chapter 6). With clusters (the number of each item's cluster, [n]), items
    of one cluster may depend on each other (Miller 2024, "Adding error bars to evals").
    """
    n = len(differences)
    w = np.full(n, 1 / n) if weights is None else weights / weights.sum()
    mean = float(w @ differences)
    parts = w * (differences - mean)
    if clusters is not None:
        parts = np.bincount(clusters, weights=parts)
    groups = len(parts)
    if groups < 2:
        return mean, Variance(math.nan, 0)
    return mean, Variance(float(groups / (groups - 1) * (parts @ parts)), groups - 1)


def over_strata(differences: Floats, strata: NDArray[np.intp]) -> tuple[float, Variance]:
    """Returns the mean of the means of strata [n], and its variance within strata."""
    sizes = np.bincount(strata).astype(np.float64)
    means = np.bincount(strata, weights=differences) / sizes
    squares = np.bincount(strata, weights=(differences - means[strata]) ** 2)
    freedom = len(differences) - len(sizes)
    if freedom < 1:
        return float(means.mean()), Variance(math.nan, 0)
    pooled = squares.sum() / freedom
    own = np.divide(squares, sizes - 1, out=np.full(len(sizes), pooled), where=sizes > 1)
    return float(means.mean()), Variance(float((own / sizes).sum() / len(sizes) ** 2), freedom)


def over_seeds(
    first: Floats, second: Floats, *, blocks: bool, fixed: tuple[bool, bool] = (False, False)
) -> list[Variance]:
    """Returns the variances over seeds of the difference of two arms' means, one value a seed.

    With `blocks`, both arms have the same seeds in the same order, and runs of one seed move
    together: losses share batches, initial weights and dropout. That gives one variance. Otherwise
    each arm has its own (Welch); an arm of one seed is assumed to vary as the other does, which
    again gives one. `fixed` arms have no seed, such as an untrained base. The list is empty if no
    arm has two seeds.
    """
    arms = [arm for arm, no_seed in zip((first, second), fixed, strict=True) if not no_seed]
    if max((len(arm) for arm in arms), default=0) < 2:
        return []
    if blocks and len(first) == len(second) and len(arms) == 2:
        return [Variance(float(np.var(first - second, ddof=1)) / len(first), len(first) - 1)]
    known = [arm for arm in arms if len(arm) > 1]
    if len(known) < len(arms):
        pooled = float(np.var(known[0], ddof=1)) * sum(1 / len(arm) for arm in arms)
        return [Variance(pooled, len(known[0]) - 1)]
    return [Variance(float(np.var(arm, ddof=1)) / len(arm), len(arm) - 1) for arm in arms]


def combine(
    difference: float, items: Variance | None, seeds: list[Variance], *, level: float = LEVEL
) -> Estimate:
    """Returns the interval at a two-sided level from the variances over items and over seeds.

    The inner interval has twice the level. The degrees of freedom are Satterthwaite's. Those are
    too many for variances over items and over few seeds (88% coverage at worst); the quantile is
    then Cochran's weighted mean of the parts' own (Biometrics 20, 1964).
    """
    parts = ([] if items is None else [items]) + seeds
    parts = [part for part in parts if part.freedom > 0 and math.isfinite(part.value)]
    if not parts:
        return Estimate(difference=difference)
    total = sum(part.value for part in parts)
    if total == 0:
        return _estimate(difference, 0.0, 0.0, 0.0, p=float(difference == 0))
    freedom = total**2 / sum(part.value**2 / part.freedom for part in parts)
    weighted = len(seeds) == 1 and len(parts) == 2

    def quantile(tail: float) -> float:
        if weighted:
            return sum(p.value * float(stdtrit(p.freedom, 1 - tail)) for p in parts) / total
        return float(stdtrit(freedom, 1 - tail))

    stderr = math.sqrt(total)
    size = abs(difference) / stderr
    p = _tail(quantile, size) if weighted else float(stdtr(freedom, -size))
    outer, inner = quantile(level / 2) * stderr, quantile(level) * stderr
    return _estimate(difference, stderr, outer, inner, p=2 * p, freedom=freedom)


def _estimate(
    difference: float, stderr: float, outer: float, inner: float, **more: float
) -> Estimate:
    return Estimate(
        difference=difference,
        stderr=stderr,
        low=difference - outer,
        high=difference + outer,
        inner_low=difference - inner,
        inner_high=difference + inner,
        **more,
    )


def _tail(quantile: Callable[[float], float], size: float) -> float:
    """The tail probability whose quantile is a size, by bisection."""
    low, high = 1e-300, 0.5
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if quantile(middle) < size else (middle, high)
    return low


def tango_score(lost: ArrayLike, won: ArrayLike, n: ArrayLike, difference: ArrayLike) -> Floats:
    """Returns the score statistic of paired proportions for an assumed difference.

    Tango, Statistics in Medicine 17 (1998). At 0 it is McNemar's (won - lost) / √(won + lost).
    """
    b, c, size, delta = (np.asarray(x, dtype=np.float64) for x in (lost, won, n, difference))
    # The share of `lost` by maximum likelihood under the assumed difference.
    linear = b + c + delta * (c - b) - 2 * size * delta
    root = np.sqrt(np.maximum(0.0, linear**2 + 8 * size * b * delta * (1 - delta)))
    share = (linear + root) / (4 * size)
    variance = np.maximum(size * (2 * share + delta * (1 - delta)), 0.0)
    gap = c - b - size * delta
    with np.errstate(divide="ignore", invalid="ignore"):
        score = gap / np.sqrt(variance)
    return np.asarray(np.where(gap == 0, 0.0, score))


def tango_interval(
    lost: ArrayLike, won: ArrayLike, n: ArrayLike, level: float
) -> tuple[Floats, Floats]:
    """Returns the differences that the score test at a two-sided level doesn't reject.

    `lost` and `won` count the pairs that one arm alone got right, `n` all pairs; any shape.
    """
    b, c, size = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (lost, won, n)))
    z = float(ndtri(1 - level / 2))
    # In one orientation, so that swapping the arms mirrors every digit.
    less, more = np.minimum(b, c), np.maximum(b, c)
    middle = (more - less) / size

    def bound(target: float, edge: float) -> Floats:
        inner, outer = middle.copy(), np.full_like(middle, edge)
        for _ in range(60):
            half = (inner + outer) / 2
            accepted = np.abs(tango_score(less, more, size, half)) <= target
            inner, outer = np.where(accepted, half, inner), np.where(accepted, outer, half)
        return np.asarray(inner)

    low, high = bound(z, -1.0), bound(z, 1.0)
    low = np.where(b == c, -high, low)
    mirrored = b > c
    return np.where(mirrored, -high, low), np.where(mirrored, -low, high)


def no_difference(lost: ArrayLike, won: ArrayLike, n: ArrayLike) -> Floats:
    """Returns the two-sided p of the score test of no difference, which is McNemar's."""
    return np.asarray(2 * ndtr(-np.abs(tango_score(lost, won, n, 0.0))))


def pair_counts(total: ArrayLike, squares: ArrayLike) -> tuple[Floats, Floats]:
    """Returns how many questions only the second and only the first arm got right; any shape.

    Partial credit of ties counts so that sum and sum of squares of the differences are right.
    """
    net = np.asarray(total, dtype=np.float64)
    changed = np.maximum(np.asarray(squares, dtype=np.float64), np.abs(net))
    return (changed - net) / 2, (changed + net) / 2


def paired_proportions(differences: Floats, *, level: float = LEVEL) -> Estimate:
    """Returns the difference of two accuracies on the same questions, one run each.

    Takes credit differences, first less second, [n], from -1 to 1. The interval is Tango's, which
    also holds if hardly any answer changed; it inverts McNemar's test without correction.
    """
    n = len(differences)
    lost, won = (float(x) for x in pair_counts(differences.sum(), (differences**2).sum()))
    low, high = (float(end) for end in tango_interval(lost, won, n, level))
    inner_low, inner_high = (float(end) for end in tango_interval(lost, won, n, 2 * level))
    mean = (won - lost) / n
    return Estimate(
        difference=mean,
        stderr=math.sqrt(max(0.0, (won + lost) / n - mean**2) / n),
        low=low,
        high=high,
        inner_low=inner_low,
        inner_high=inner_high,
        p=float(no_difference(lost, won, n)),
    )


def holm(values: Floats) -> Floats:
    """Returns p-values after Holm's step-down correction, in the order given."""
    order = np.argsort(values)
    steps = (len(values) - np.arange(len(values))) * values[order]
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def wilson(share: float, n: int) -> tuple[float, float]:
    """Returns Wilson's 95% interval of a share of n."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return min(share, middle - half), max(share, middle + half)

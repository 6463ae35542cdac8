"""What two runs that answered the same questions show: tests, intervals, and what could be seen.

Each question falls into one of four cells (right in both, in one, in neither), and every number
here is a function of these counts, by subject:

- exact McNemar test: of the questions that changed, as many better as worse? (binomial, two-sided)
- paired bootstrap: questions are drawn anew with replacement, pairs stay together; for the macro
  mean within each subject. Drawing questions is drawing cells, so counts are drawn (multinomial).
- equivalence: two one-sided tests (Schuirmann 1987) that the difference lies within a margin, each
  Tango's score test (Statistics in Medicine 17, 1998), which holds where hardly any answer changed.
- detectable difference: what a two-sided 5% test of this many questions, with this share of
  changed answers, finds in 80% of samples (Connor, Biometrics 43, 1987, with p_b + p_c as seen).
- Holm's correction over subjects, over categories, and of McNemar's tests over the runs that are
  compared with the same baseline (Scandinavian Journal of Statistics 6, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_harness.compare.statistics import Difference, PairedCounts, paired_difference

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEVEL = 0.95
POWER = 0.8
_FEWEST = 10  # changed answers, below which a bootstrap says little
DEFAULT_DRAWS = 10_000
DEFAULT_MARGIN = 0.01
DEFAULT_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A 95% interval of a difference of accuracies, as shares.

    Attributes:
        low: Its lower end.
        high: Its upper end.
    """

    low: float
    high: float


@dataclass(frozen=True)
class GroupTest:
    """The test of one subject or category.

    Attributes:
        name: Of the group.
        counts: Its questions.
        difference: Second accuracy minus first.
        p: Of the exact McNemar test.
        adjusted: The same after Holm's correction over all groups of its kind.
    """

    name: str
    counts: PairedCounts
    difference: Difference
    p: float
    adjusted: float


@dataclass(frozen=True)
class PairedStatistics:
    """A comparison of two runs, second minus first; accuracies are shares from 0 to 1.

    Attributes:
        counts: All questions.
        difference: Of the micro accuracies.
        interval: Its bootstrap interval; None where fewer than ten answers changed.
        macro: Difference of the macro accuracies.
        macro_interval: Its bootstrap interval, or None.
        mcnemar_p: Of the exact McNemar test, as it is.
        mcnemar_holm: The same after Holm's correction over the runs compared with the baseline;
            None for a run that is no comparison of interest (see `correct`).
        tests: The number of these runs; with one the two p are equal. 0 for a run left out.
        agreement: Share of questions with the same predicted letter.
        detectable: Smallest difference that would have been found in 80% of samples.
        margin: Of the equivalence test.
        equivalence_p: Of the equivalence test; below 0.05 the runs are equivalent.
        subjects: By subject, in alphabetical order.
        categories: By category.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """

    counts: PairedCounts
    difference: Difference
    interval: Interval | None
    macro: float
    macro_interval: Interval | None
    mcnemar_p: float
    agreement: float
    detectable: float
    margin: float
    equivalence_p: float
    subjects: tuple[GroupTest, ...]
    categories: tuple[GroupTest, ...]
    draws: int
    seed: int
    mcnemar_holm: float | None
    tests: int = 1

    @property
    def equivalent(self) -> bool:
        """Whether the difference is shown to be within the margin, at 5%."""
        return self.equivalence_p < 1 - LEVEL

    @property
    def different(self) -> bool:
        """Whether a difference is shown, at 5% over all runs of the correction together."""
        p = self.mcnemar_p if self.mcnemar_holm is None else self.mcnemar_holm
        return p < 1 - LEVEL


def mcnemar(counts: PairedCounts) -> float:
    """Returns the two-sided p of the exact McNemar test; 1 where no answer changed.

    Args:
        counts: The questions.
    """
    from scipy.stats import binomtest

    changed = counts.only_first + counts.only_second
    if changed == 0:
        return 1.0
    return float(binomtest(counts.only_second, changed, 0.5).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Returns p-values after Holm's step-down correction, in the order given.

    Args:
        values: p-values of a family of tests.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def bootstrap(
    by_subject: Sequence[PairedCounts], *, draws: int, seed: int
) -> tuple[Interval, Interval]:
    """Returns percentile intervals of the micro and of the macro difference.

    Args:
        by_subject: The questions of each subject; at least one question each.
        draws: Samples.
        seed: Of the random numbers.
    """
    import numpy as np

    generator = np.random.default_rng(seed)

    def net(counts: PairedCounts) -> NDArray[np.float64]:
        """(right only in the second - right only in the first) / questions, of each draw."""
        total = counts.total
        shares = [counts.only_first / total, counts.only_second / total]
        cells = generator.multinomial(total, [*shares, max(0.0, 1.0 - sum(shares))], size=draws)
        difference: NDArray[np.float64] = (cells[:, 1] - cells[:, 0]) / total
        return difference

    micro = net(add(by_subject))
    macro = np.mean([net(counts) for counts in by_subject], axis=0)
    return percentile_interval(micro), percentile_interval(macro)


def percentile_interval(values: NDArray[np.float64]) -> Interval:
    """Returns the middle 95% of bootstrap draws.

    Args:
        values: [draws].
    """
    import numpy as np

    low, high = np.percentile(values, [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def equivalence(counts: PairedCounts, margin: float) -> float:
    """Returns the p of two one-sided score tests that the difference lies within ± margin.

    Args:
        counts: The questions.
        margin: As a share, above 0.
    """
    from scipy.stats import norm

    lost, won, total = counts.only_first, counts.only_second, counts.total

    def beyond(less: int, more: int) -> float:
        """P of Tango's score test that more - less is above -margin."""
        # The share of `less` where the difference is -margin, by maximum likelihood:
        # 2n q² - (less (1 + m) + more (1 - m) + 2nm) q + less m (1 + m) = 0.
        a, c = 2 * total, less * margin * (1 + margin)
        b = less * (1 + margin) + more * (1 - margin) + 2 * total * margin
        share = (b + math.sqrt(max(0.0, b * b - 4 * a * c))) / (2 * a)
        variance = total * (2 * share - margin - margin**2)
        return float(norm.sf((more - less + total * margin) / math.sqrt(variance)))

    return max(beyond(lost, won), beyond(won, lost))


def detectable(counts: PairedCounts) -> float:
    """Returns the smallest difference that a 5% test would have found in 80% of samples.

    With no difference the standard error is sqrt(p) / sqrt(n), with one of d it is
    sqrt(p - d²) / sqrt(n), where p is the share of changed answers; d is the solution of
    d sqrt(n) = z₀.₉₇₅ sqrt(p) + z₀.₈ sqrt(p - d²). As d is at most p, and the exact test needs six
    changes to one side, it is never less than eight questions.

    Args:
        counts: The questions.
    """
    from scipy.stats import norm

    total = counts.total
    changed = (counts.only_first + counts.only_second) / total
    significance, power = norm.ppf((1 + LEVEL) / 2), norm.ppf(POWER)
    found = 0.0
    for _ in range(100):
        share = max(changed, found)
        spread = math.sqrt(max(0.0, share - found**2))
        step = float((significance * math.sqrt(share) + power * spread) / math.sqrt(total))
        found = min(1.0, (found + step) / 2)
    return min(1.0, max(found, 8 / total))


def add(parts: Sequence[PairedCounts]) -> PairedCounts:
    """Returns the sum of counts.

    Args:
        parts: Counts of groups without a question in common.
    """
    return PairedCounts(
        sum(p.both for p in parts),
        sum(p.only_first for p in parts),
        sum(p.only_second for p in parts),
        sum(p.neither for p in parts),
    )


def analyse(
    by_subject: Mapping[str, PairedCounts],
    category_of: Mapping[str, str],
    *,
    same_letter: int,
    margin: float = DEFAULT_MARGIN,
    draws: int = DEFAULT_DRAWS,
    seed: int = DEFAULT_SEED,
) -> PairedStatistics:
    """Analyses two runs that answered the same questions.

    Args:
        by_subject: The questions of each subject.
        category_of: The category of each subject that has one.
        same_letter: Questions with the same predicted letter in both.
        margin: Of the equivalence test, as a share.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: There is no question.
    """
    counts = add(list(by_subject.values()))
    difference = paired_difference(counts)
    interval = macro_interval = None
    if counts.only_first + counts.only_second >= _FEWEST:
        interval, macro_interval = bootstrap(list(by_subject.values()), draws=draws, seed=seed)
    categories: dict[str, list[PairedCounts]] = {}
    for subject, found in by_subject.items():
        if subject in category_of:
            categories.setdefault(category_of[subject], []).append(found)
    macro = [paired_difference(found).value for found in by_subject.values()]
    p = mcnemar(counts)
    return PairedStatistics(
        counts=counts,
        difference=difference,
        interval=interval,
        macro=sum(macro) / len(macro),
        macro_interval=macro_interval,
        mcnemar_p=p,
        mcnemar_holm=p,
        agreement=same_letter / counts.total,
        detectable=detectable(counts),
        margin=margin,
        equivalence_p=equivalence(counts, margin),
        subjects=_tests(dict(sorted(by_subject.items()))),
        categories=_tests({name: add(parts) for name, parts in categories.items()}),
        draws=draws,
        seed=seed,
    )


def correct(
    found: Mapping[int, PairedStatistics], apart: Collection[int] = ()
) -> dict[int, PairedStatistics]:
    """Corrects McNemar's tests of several runs against one baseline among each other, by Holm.

    Args:
        found: By index of the run.
        apart: Indices of runs that are no comparison of interest, such as other seeds of the
            baseline: they stay as they are and don't count.

    Returns:
        The same with `mcnemar_holm` and `tests` of the others together.
    """
    family = [index for index in found if index not in apart]
    adjusted = dict(zip(family, holm([found[index].mcnemar_p for index in family]), strict=True))
    return {
        index: replace(
            item,
            mcnemar_holm=adjusted.get(index),
            tests=len(family) if index in adjusted else 0,
        )
        for index, item in found.items()
    }


def _tests(groups: Mapping[str, PairedCounts]) -> tuple[GroupTest, ...]:
    values = [mcnemar(counts) for counts in groups.values()]
    return tuple(
        GroupTest(name, counts, paired_difference(counts), p, adjusted)
        for (name, counts), p, adjusted in zip(groups.items(), values, holm(values), strict=True)
    )

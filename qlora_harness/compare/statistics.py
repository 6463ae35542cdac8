"""Standard errors of a difference between two accuracies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Two-sided 95% point of the normal distribution.
Z95 = 1.96


@dataclass(frozen=True)
class Difference:
    """Second accuracy minus first, both as shares from 0 to 1.

    Attributes:
        value: The difference, -1 to 1.
        stderr: Its standard error, or None where one of the inputs has none.
        paired: Whether the same questions were matched one by one.
    """

    value: float
    stderr: float | None
    paired: bool

    @property
    def shown(self) -> bool | None:
        """Whether the difference is at least 1.96 standard errors; None where that is unknown."""
        if self.stderr is None:
            return None
        return self.value != 0 and abs(self.value) >= Z95 * self.stderr


@dataclass(frozen=True)
class PairedCounts:
    """Questions by who answered them right.

    Attributes:
        both: Right in both runs.
        only_first: Right in the first run only.
        only_second: Right in the second run only.
        neither: Wrong in both runs.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def total(self) -> int:
        """The number of questions."""
        return self.both + self.only_first + self.only_second + self.neither


def unpaired_difference(
    first: float, first_stderr: float | None, second: float, second_stderr: float | None
) -> Difference:
    """Returns second minus first as if the runs had answered unrelated questions.

    Args:
        first: Accuracy of the first run, 0 to 1.
        first_stderr: Its standard error, if known.
        second: Accuracy of the second run, 0 to 1.
        second_stderr: Its standard error, if known.
    """
    stderr = None
    if first_stderr is not None and second_stderr is not None:
        stderr = math.hypot(first_stderr, second_stderr)
    return Difference(second - first, stderr, paired=False)


def count_pairs(pairs: Iterable[tuple[bool, bool]]) -> PairedCounts:
    """Counts questions by who answered them right.

    Args:
        pairs: For each question, whether the first and the second run were right.
    """
    both = only_first = only_second = neither = 0
    for first, second in pairs:
        both += first and second
        only_first += first and not second
        only_second += second and not first
        neither += not first and not second
    return PairedCounts(both, only_first, only_second, neither)


def paired_difference(counts: PairedCounts) -> Difference:
    """Returns second minus first over the same questions.

    With b and c questions right in one run only and n in all, the standard error of (c - b)/n is
    sqrt(b + c - (b - c)²/n)/n; questions on which the runs agree add nothing to it.

    Args:
        counts: The table of the two runs; at least one question.

    Raises:
        ValueError: There is no question.
    """
    total = counts.total
    if total == 0:
        raise ValueError("no question to pair")
    net = counts.only_second - counts.only_first
    discordant = counts.only_second + counts.only_first
    # n(b + c) - (b - c)² in whole numbers: exactly 0, never -1e-17, when all pairs fall one way.
    variance = (discordant * total - net * net) / total
    return Difference(net / total, math.sqrt(variance) / total, paired=True)

"""How many questions and seeds it takes to show that two arms differ, or that they don't."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import gammaincinv, ndtr, ndtri, stdtrit

from qlora_harness.compare.record import ComparisonRecord, Contrast
from qlora_harness.compare.statistics import LEVEL

_POWER = 0.8
_MOST = 10**8
_GRID = (np.arange(40) + 0.5) / 40  # quantiles of a distribution


class QuestionCount(NamedTuple):
    """Questions that a study needs; None if no number is enough.

    `equivalence` shows that arms are the same within the margin, `detection` that they differ.
    """

    equivalence: int | None
    detection: int | None


def questions_needed(
    margin: float, discordance: float, seed_sd: float, seeds: int
) -> QuestionCount:
    """Returns how many questions are needed at the 5% level for 80% power.

    The first three are shares: the margin of accuracies, the questions that only one arm gets right
    (at least the margin, for the arms to differ by it), and the SD of an arm's accuracy between
    seeds. A difference of two arms has the variance discordance / questions + 2 seed_sd² / seeds.
    With one seed per arm the answer is about those two adapters, and seeds add nothing.
    """

    def fewest(share: float, same: bool) -> int | None:
        return _fewest(lambda n: _power(margin, share, seed_sd, seeds, n, same=same))

    # Equal answers to fewer questions are no proof: Tango's interval would still be wider.
    least = math.ceil(ndtri(1 - LEVEL) ** 2 * (1 - margin) / margin)
    equivalence = fewest(discordance, same=True)
    return QuestionCount(
        None if equivalence is None else max(equivalence, least),
        fewest(max(margin, discordance), same=False),
    )


def _power(
    margin: float, discordance: float, seed_sd: float, seeds: int, questions: int, *, same: bool
) -> float:
    """The share of studies that show equivalence, or else a difference, over seeds' variances."""
    items = discordance / questions
    each = seed_sd**2 / seeds if seeds > 1 else 0.0
    spread = 2 * gammaincinv((seeds - 1) / 2, _GRID) / (seeds - 1) if each else np.zeros(1)
    a, b = np.meshgrid(each * spread, each * spread)
    freedom = (items + a + b) ** 2 / (items**2 / questions + (a**2 + b**2) / max(1, seeds - 1))
    width = stdtrit(freedom, 1 - (LEVEL if same else LEVEL / 2)) * np.sqrt(items + a + b)
    true = math.sqrt(items + 2 * each)
    if same:
        return float(np.maximum(0, 2 * ndtr((margin - width) / true) - 1).mean())
    return float(ndtr((margin - width) / true).mean())


def _fewest(power_of: Callable[[int], float]) -> int | None:
    """The fewest questions with enough power; with few seeds, more don't always have more."""
    below, questions = 1, 10
    while questions < _MOST:
        if power_of(questions) >= _POWER:
            while questions - below > 1:
                middle = (below + questions) // 2
                enough = power_of(middle) >= _POWER
                below, questions = (below, middle) if enough else (middle, questions)
            return questions
        below, questions = questions, int(questions * 1.3) + 1
    return None


def discordance(item: Contrast) -> float | None:
    """Returns the share of questions that only one arm got right; None without answers."""
    accuracy = item.endpoints.get("accuracy")
    if item.detail is None or accuracy is None or not accuracy.n:
        return None
    return (item.detail.won + item.detail.lost) / accuracy.n


def seed_deviation(comparison: ComparisonRecord, item: Contrast) -> float | None:
    """Returns the SD of an arm's accuracy between seeds; None without a second seed."""
    spreads = []
    for arm in (item.arm, item.baseline):
        values = [r.value for r in comparison.runs if r.arm == arm and r.value is not None]
        spreads += [statistics.variance(values)] if len(values) > 1 else []
    return math.sqrt(statistics.fmean(spreads)) if spreads else None

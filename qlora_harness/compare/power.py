"""How many questions and seeds it takes to show that two arms differ, or that they don't."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.special import gammaincinv, ndtr, ndtri, stdtrit

from qlora_harness.compare.record import ComparisonRecord, Contrast
from qlora_harness.compare.statistics import LEVEL, POWER

_MOST = 10**8
_GRID = (np.arange(40) + 0.5) / 40  # of a distribution


class Need(NamedTuple):
    """Questions that a study with a number of seeds per arm needs; None where no number is enough.

    `equivalence` shows that arms are the same within the margin if they don't differ, `detection`
    a difference as large as the margin.
    """

    seeds: int
    equivalence: int | None
    detection: int | None


def questions_needed(
    margin: float, discordance: float, seed_sd: float, seeds: Sequence[int]
) -> list[Need]:
    """Returns how many questions are needed, at 5% and in 80% of studies, for numbers of seeds.

    A difference of two arms has the variance discordance / questions + 2 seed_sd² / seeds. With
    one seed per arm the answer is about those two adapters, and seeds add nothing. All three are
    shares: the margin of accuracies, the questions that one arm gets right and the other wrong (to
    differ by the margin, at least so many must), and the SD of an arm's accuracy between seeds.
    """
    needs = []
    # Equal answers to fewer questions are no proof: Tango's interval would still be wider.
    least = math.ceil(ndtri(1 - LEVEL) ** 2 * (1 - margin) / margin)
    for count in seeds:
        same, differ = (
            _fewest(partial(_power, margin, share, seed_sd, count, same=kind))
            for share, kind in ((discordance, True), (max(margin, discordance), False))
        )
        needs.append(Need(count, None if same is None else max(same, least), differ))
    return needs


def _power(
    margin: float, discordance: float, seed_sd: float, seeds: int, questions: int, *, same: bool
) -> float:
    """The share of studies that show that two arms are the same, or that they differ.

    The variances between seeds are themselves estimated: the power is averaged over their
    distribution, with the interval that `compare` gives for each.
    """
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
        if power_of(questions) >= POWER:
            while questions - below > 1:
                middle = (below + questions) // 2
                enough = power_of(middle) >= POWER
                below, questions = (below, middle) if enough else (middle, questions)
            return questions
        below, questions = questions, int(questions * 1.3) + 1
    return None


def discordance(item: Contrast) -> float | None:
    """Returns the share of questions that only one arm got right, where answers are known."""
    accuracy = item.endpoints.get("accuracy")
    if item.detail is None or accuracy is None or not accuracy.n:
        return None
    return (item.detail.won + item.detail.lost) / accuracy.n


def seed_deviation(comparison: ComparisonRecord, item: Contrast) -> float | None:
    """Returns the SD of an arm's accuracy between seeds; None without a second seed."""
    values = [comparison.values_of(arm) for arm in (item.arm, item.baseline)]
    spreads = [statistics.variance(part) for part in values if len(part) > 1]
    return math.sqrt(statistics.fmean(spreads)) if spreads else None

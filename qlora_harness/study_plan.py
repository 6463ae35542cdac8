"""`qlora-harness plan-study`: how many questions and seeds a margin takes, before the run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.special import gammaincinv, ndtr, ndtri, stdtrit

from qlora_harness.compare.statistics import LEVEL, POWER
from qlora_harness.errors import SettingsError

_MOST = 10**8
_GRID = (np.arange(40) + 0.5) / 40  # of a distribution
SEEDS = (1, 2, 3, 5, 10)


@dataclass(frozen=True)
class Need:
    """How many questions a study with a given number of seeds per arm needs.

    Attributes:
        seeds: Of each arm.
        equivalence: Questions that show equivalence within the margin, if there is no difference;
            None where no number does.
        detection: Questions that show a difference as large as the margin; None where none does.
    """

    seeds: int
    equivalence: int | None
    detection: int | None


def plan(margin: float, discordance: float, seed_sd: float, seeds: Sequence[int]) -> list[Need]:
    """Returns how many questions are needed, at 5% and in 80% of studies.

    A difference of two arms has the variance discordance / questions + 2 seed_sd² / seeds. With
    one seed an arm the answer is about those two adapters, and seeds add nothing.

    Args:
        margin: Difference of accuracies, a share.
        discordance: Share of questions that one arm gets right and the other wrong; to differ by
            the margin, at least so many must.
        seed_sd: Standard deviation of an arm's accuracy between seeds, a share.
        seeds: Numbers of seeds.
    """
    needs = []
    # Equal answers to fewer questions are no proof: Tango's interval would still be wider.
    least = math.ceil(ndtri(1 - LEVEL) ** 2 * (1 - margin) / margin)
    for count in seeds:
        same, differ = (
            _fewest(partial(power, margin, share, seed_sd, count, same=kind))
            for share, kind in ((discordance, True), (max(margin, discordance), False))
        )
        needs.append(Need(count, None if same is None else max(same, least), differ))
    return needs


def power(
    margin: float, discordance: float, seed_sd: float, seeds: int, questions: int, *, same: bool
) -> float:
    """Returns the share of studies that show that two arms are the same, or that they differ.

    The variances between seeds are themselves estimated: over their distribution the power is
    summed, with the interval that `compare` gives for each.

    Args:
        margin: A share.
        discordance: A share.
        seed_sd: A share.
        seeds: Of each arm.
        questions: How many.
        same: Whether there is no difference, or one as large as the margin.
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


def report(
    runs: Sequence[Path], margin: float, discordance: float | None, seed_sd: float | None
) -> str:
    """Returns the plan as text.

    Args:
        runs: Pilot runs, two or more, or none.
        margin: Percentage points.
        discordance: A share; None for that of the pilot, or else 0.1.
        seed_sd: Percentage points; None for that of the pilot, or else 0.2.

    Raises:
        SettingsError: A number is out of its range.
        ComparisonError: The pilot runs can't be compared.
    """
    source = ""
    if runs:
        from qlora_harness.compare.comparison import compare

        pilot = compare(runs)
        item = pilot.primary[0]
        accuracy = item.endpoints.get("accuracy")
        if discordance is None and item.detail is not None and accuracy and accuracy.n:
            discordance = ((item.detail.won or 0) + (item.detail.lost or 0)) / accuracy.n
        deviations = [
            [run.value for run in pilot.runs if run.arm == arm and run.value is not None]
            for arm in (item.arm, item.baseline)
        ]
        spreads = [statistics.variance(part) for part in deviations if len(part) > 1]
        if seed_sd is None and spreads:
            seed_sd = 100 * math.sqrt(statistics.fmean(spreads))
        source = " (from the pilot where not given)"
    discordance = 0.1 if discordance is None else discordance
    seed_sd = 0.2 if seed_sd is None else seed_sd
    if not 0 < margin < 100:
        raise SettingsError(f"--margin {margin:g}", "Give points above 0 and below 100")
    if not 0 < discordance <= 1 or not 0 <= seed_sd < 100:
        raise SettingsError(
            f"--discordance {discordance:g} --seed-sd {seed_sd:g}",
            "Give a share above 0 and at most 1, and points from 0",
        )
    lines = [
        f"Margin ±{margin:g} points, {100 * discordance:.1f}% of answers differ, seed SD "
        f"{seed_sd:.2f} points{source}; 5%, 80% power.",
        "",
        "seeds an arm   questions to show they are the same   to show they differ by the margin",
    ]
    for need in plan(margin / 100, discordance, seed_sd / 100, SEEDS):
        same, differ = (
            "no number is enough" if n is None else f"{n:,}"
            for n in (need.equivalence, need.detection)
        )
        lines.append(f"{need.seeds:>12}   {same:>35}   {differ:>34}")
    lines += ["", "MMLU has 14,042 questions. One seed per arm compares those two adapters only."]
    return "\n".join(lines)

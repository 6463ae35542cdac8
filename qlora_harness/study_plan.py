"""`qlora-harness plan-study`: how many questions and seeds a margin takes, before the run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.special import ndtri, stdtrit

from qlora_harness.compare.statistics import LEVEL, POWER
from qlora_harness.errors import SettingsError

_MOST = 10**8
SEEDS = (1, 2, 3, 5, 10)


@dataclass(frozen=True)
class Need:
    """What a number of seeds an arm takes.

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
        discordance: Share of questions that one arm gets right and the other wrong.
        seed_sd: Standard deviation of an arm's accuracy between seeds, a share.
        seeds: Numbers of seeds.
    """
    return [
        Need(
            count,
            _questions(margin, discordance, seed_sd, count, equivalence=True),
            _questions(margin, discordance, seed_sd, count, equivalence=False),
        )
        for count in seeds
    ]


def _questions(
    margin: float, discordance: float, seed_sd: float, seeds: int, *, equivalence: bool
) -> int | None:
    def enough(questions: int) -> bool:
        items = discordance / questions
        each = seed_sd**2 / seeds if seeds > 1 else 0.0
        total = items + 2 * each
        freedom = total**2 / (items**2 / questions + (2 * each**2 / (seeds - 1) if each else 0.0))
        if equivalence:
            quantiles = stdtrit(freedom, 1 - LEVEL) + ndtri((1 + POWER) / 2)
        else:
            quantiles = stdtrit(freedom, 1 - LEVEL / 2) + ndtri(POWER)
        return bool(quantiles * math.sqrt(total) <= margin)

    low, high = 1, _MOST
    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    # Zero differences of so many questions are no proof, however few answers change.
    return (
        max(low, math.ceil(ndtri(1 - LEVEL) ** 2 * (1 - margin) / margin)) if equivalence else low
    )


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
        source = " (from the pilot where it tells)"
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
    lines += ["", "MMLU has 14,042 questions. One seed an arm is about those two adapters only."]
    return "\n".join(lines)

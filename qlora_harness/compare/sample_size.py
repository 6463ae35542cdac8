"""`qlora-harness plan-study`: how many questions and seeds a margin takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_harness.compare import power
from qlora_harness.compare.comparison import compare
from qlora_harness.errors import SettingsError

_SEEDS = (1, 2, 3, 5, 10)


def report(
    runs: Sequence[Path], margin: float, discordance: float | None, seed_sd: float | None
) -> str:
    """Returns the plan as text; raises SettingsError and, for pilot runs, ComparisonError.

    `margin` and `seed_sd` are points, `discordance` a share; the last two default to the pilots'.
    """
    source = ""
    if runs:
        pilot = compare(runs)
        item = pilot.primary[0]
        if discordance is None:
            discordance = power.discordance(item)
        deviation = power.seed_deviation(pilot, item)
        if seed_sd is None and deviation is not None:
            seed_sd = 100 * deviation
        source = " (from the pilot runs where not given)"
    discordance = 0.1 if discordance is None else discordance
    seed_sd = 0.2 if seed_sd is None else seed_sd
    if not 0 < margin < 100:
        raise SettingsError(f"--margin {margin:g}", "Give points above 0 and below 100")
    if not 0 < discordance <= 1 or not 0 <= seed_sd < 100:
        raise SettingsError(
            f"--discordance {discordance:g} --seed-sd {seed_sd:g}",
            "Give a share above 0 and at most 1, and 0 or more points",
        )
    lines = [
        f"Margin ±{margin:g} points, {100 * discordance:.1f}% of answers differ, seed SD "
        f"{seed_sd:.2f} points{source}; 5% level, 80% power.",
        "",
        "seeds per arm   questions to show they are the same   to show they differ by the margin",
    ]
    for seeds in _SEEDS:
        need = power.questions_needed(margin / 100, discordance, seed_sd / 100, seeds)
        same, differ = (
            "no number is enough" if n is None else f"{n:,}"
            for n in (need.equivalence, need.detection)
        )
        lines.append(f"{seeds:>13}   {same:>35}   {differ:>34}")
    lines += ["", "MMLU has 14,042 questions. One seed per arm compares those two adapters only."]
    return "\n".join(lines)

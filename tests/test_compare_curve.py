"""The held-out loss during training: curve, trend, note, table and figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_runs import step_log, summary, write
from scipy import stats

from qlora_harness.compare.comparison import Comparison, compare
from qlora_harness.compare.figures import figures
from qlora_harness.compare.tables import tables

N, TOKENS, LAST = 30, 4, 20
# By conversation, mean 0 and, with n - 1, variance 1.
NOISE = stats.zscore(np.random.default_rng(0).normal(size=N), ddof=1)
SHAPE = {0: 3.0, 5: 1.5, 10: 1.2, 15: 1.2, LAST: 1.2}


def run(
    folder: Path,
    quant: str,
    losses: Mapping[int, float],
    seed: int = 0,
    noise: float = 0.0,
    **changes: Any,
) -> Path:
    """A run with the held-out losses of some steps; those of the last vary by `noise`."""
    nll = {step: np.full(N, TOKENS * loss) for step, loss in losses.items()}
    nll[LAST] = nll[LAST] + TOKENS * noise * NOISE
    evaluation = {
        "nll": nll[LAST].tolist(),
        "nll_before": nll[0].tolist(),
        "tokens": [TOKENS] * N,
        "during": [
            {"step": step, "nll": values.tolist()}
            for step, values in nll.items()
            if 0 < step < LAST
        ],
    }
    record = summary(quant, settings__seed=seed, results__eval_loss=losses[LAST], **changes)
    path = folder / f"{quant}_{seed}"
    write(path / "training_summary.json", record)
    write(path / "training_logs.json", step_log([2.0] * LAST, evaluation=evaluation))
    return path


def compared(folder: Path, *runs: Path) -> Comparison:
    """A comparison with a run that was not evaluated during training."""
    return compare([*runs, run(folder, "bf16", {0: 3.0, LAST: 1.2})])


@pytest.mark.parametrize(
    ("shape", "tests", "trend", "since", "against"),
    [
        # Against the last evaluation in two thirds of 20 steps, and nothing else.
        ({15: 1.3}, 1, "falling", 10, -1),
        # Against four earlier evaluations, of which the lowest decides.
        ({5: 1.2 - 1e-6}, 4, "rising", 5, 1),
    ],
)
@pytest.mark.parametrize("times", [0.99, 1.01])
def test_trend_is_what_the_interval_over_conversations_shows(
    tmp_path: Path, shape: dict[int, float], tests: int, trend: str, since: int, against: int,
    times: float,
) -> None:  # fmt: skip
    noise = 0.02
    bound = float(stats.t.ppf(1 - 0.05 / tests / 2, N - 1)) * noise / math.sqrt(N)
    losses = SHAPE | shape
    losses[LAST] = losses[since] + against * times * bound
    (curve,) = compared(tmp_path, run(tmp_path, "nf4", losses, noise=noise)).curves
    assert curve.trend == (trend if times > 1 else "flat")
    assert curve.since == (since if times > 1 else 10)


def test_curve_of_an_arm_is_that_of_its_seeds(tmp_path: Path) -> None:
    """Seeds that disagree show no trend; steps that one of them lacks are left out."""
    runs = [
        run(tmp_path, "nf4", SHAPE | {LAST: 1.1}, seed=0),
        run(tmp_path, "nf4", {0: 3.0, 5: 1.3, 10: 1.2, LAST: 1.15}, seed=1),
    ]
    result = compared(tmp_path, *runs)
    (curve,) = result.curves
    assert (curve.arm, curve.seeds, curve.steps) == ("NF4", 2, [0, 5, 10, 20])
    assert curve.mean == pytest.approx([3.0, 1.4, 1.2, 1.125])
    assert curve.low == pytest.approx([3.0, 1.3, 1.2, 1.1])
    assert curve.high == pytest.approx([3.0, 1.5, 1.2, 1.15])
    assert (curve.trend, curve.since) == ("flat", 10)  # 0.075 ± 0.025 of two seeds

    (table,) = [table for table in tables(result) if table.columns[0] == "step"]
    assert table.columns == ("step", "NF4")
    assert table.rows == [("0", "3.0000"), ("5", "1.4000"), ("10", "1.2000"), ("20", "1.1250")]
    (figure,) = [one for one in figures(result) if one.heading.startswith("Held-out loss")]
    band, line = figure.plot.data
    assert list(band.x) == [5, 10, 20, 20, 10, 5]
    assert list(band.y) == pytest.approx([1.5, 1.2, 1.15, 1.1, 1.2, 1.3])
    assert list(line.x) == [5, 10, 20]
    assert list(line.y) == pytest.approx([1.4, 1.2, 1.125])


def test_notes_name_arm_steps_and_losses(tmp_path: Path) -> None:
    falling = run(tmp_path, "nf4", SHAPE | {LAST: 1.1})
    rising = run(tmp_path, "fp4", SHAPE | {15: 1.1}, settings__quant="fp4")
    result = compared(tmp_path, falling, rising)
    assert [curve.trend for curve in result.curves] == ["falling", "rising"]
    notes = [note for note in result.notes if "held-out loss" in note]
    assert ["1.2000 at step 10, 1.1000" in note for note in notes] == [True, False]
    assert ["1.1000 at step 15, 1.2000" in note for note in notes] == [False, True]


@pytest.mark.parametrize("reason", ["no evaluations", "other conversations", "few steps"])
def test_without_comparable_evaluations_there_is_no_curve(tmp_path: Path, reason: str) -> None:
    losses = {0: 3.0, LAST: 1.1} if reason == "no evaluations" else SHAPE | {LAST: 1.1}
    if reason == "few steps":
        losses = {0: 3.0, 15: 1.2, LAST: 1.1}
    other: dict[str, Any] = {}
    if reason == "other conversations":
        other["data__eval__fingerprint"] = "sha256:3"
    runs = [run(tmp_path, "nf4", losses, **other), run(tmp_path, "bf16", {0: 3.0, LAST: 1.2})]
    result = compare(runs, allow_different_data=True)
    if reason == "few steps":  # a curve, but nothing to compare its end with
        assert [curve.trend for curve in result.curves] == [None]
        return
    assert result.curves == []
    assert not [table for table in tables(result) if table.columns[0] == "step"]
    assert not [one for one in figures(result) if one.heading.startswith("Held-out loss")]


def test_interrupted_run_has_a_curve_without_a_trend(tmp_path: Path) -> None:
    path = run(tmp_path, "nf4", SHAPE | {LAST: 1.1}, status="interrupted")
    log = {"tokens": [1] * N, "nll_before": [3.0] * N, "during": [{"step": 5, "nll": [2.0] * N}]}
    write(path / "training_logs.json", step_log([2.0] * LAST, evaluation=log))
    (curve,) = compared(tmp_path, path).curves
    assert (curve.steps, curve.mean, curve.trend) == ([0, 5], [3.0, 2.0], None)


@pytest.mark.parametrize(("eval_seed", "arms"), [(0, 2), (1, 3)])
def test_run_of_an_earlier_version_has_eval_seed_0(
    tmp_path: Path, eval_seed: int, arms: int
) -> None:
    """So that a later seed of its arm joins it, and one with other held-out trees does not."""
    runs = [
        run(tmp_path, "nf4", SHAPE),
        run(tmp_path, "nf4", SHAPE, seed=1, settings__eval_seed=eval_seed, settings__eval_steps=5),
    ]
    result = compared(tmp_path, *runs)
    assert len(result.arms) == arms
    differs = "training.settings.eval_seed" in [setting.name for setting in result.different]
    assert differs is (eval_seed != 0)

"""The held-out loss during training: curve, table and figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from compare_runs import step_log, summary, write

from qlora_harness.compare.comparison import Comparison, compare
from qlora_harness.compare.figures import figures
from qlora_harness.compare.tables import tables

N, TOKENS, LAST = 30, 4, 20
SHAPE = {0: 3.0, 5: 1.5, 10: 1.2, 15: 1.2, LAST: 1.2}


def run(
    folder: Path,
    quant: str,
    losses: Mapping[int, float],
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A run with the held-out losses of some steps."""
    nll = {step: [TOKENS * loss] * N for step, loss in losses.items()}
    evaluation = {
        "nll": nll[LAST],
        "nll_before": nll[0],
        "tokens": [TOKENS] * N,
        "during": [{"step": step, "nll": nll[step]} for step in nll if 0 < step < LAST],
    }
    record = summary(quant, settings__seed=seed, results__eval_loss=losses[LAST], **changes)
    path = folder / f"{quant}_{seed}"
    write(path / "training_summary.json", record)
    write(path / "training_logs.json", step_log([2.0] * LAST, evaluation=evaluation))
    return path


def compared(folder: Path, *runs: Path) -> Comparison:
    """A comparison with a run that was not evaluated during training."""
    return compare([*runs, run(folder, "bf16", {0: 3.0, LAST: 1.2})])


def test_curve_of_an_arm_is_that_of_its_seeds(tmp_path: Path) -> None:
    """Steps that one of them lacks are left out."""
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
    (table,) = [table for table in tables(result) if table.columns[0] == "step"]
    assert table.columns == ("step", "NF4")
    assert table.rows == [("0", "3.0000"), ("5", "1.4000"), ("10", "1.2000"), ("20", "1.1250")]
    (figure,) = [one for one in figures(result) if one.heading.startswith("Held-out loss")]
    band, line = figure.plot.data
    assert list(band.x) == [5, 10, 20, 20, 10, 5]
    assert list(band.y) == pytest.approx([1.5, 1.2, 1.15, 1.1, 1.2, 1.3])
    assert list(line.x) == [5, 10, 20]
    assert list(line.y) == pytest.approx([1.4, 1.2, 1.125])


@pytest.mark.parametrize("reason", ["no evaluations", "other conversations"])
def test_without_comparable_evaluations_there_is_no_curve(tmp_path: Path, reason: str) -> None:
    losses = {0: 3.0, LAST: 1.1} if reason == "no evaluations" else SHAPE | {LAST: 1.1}
    other: dict[str, Any] = {}
    if reason == "other conversations":
        other["data__eval__fingerprint"] = "sha256:3"
    runs = [run(tmp_path, "nf4", losses, **other), run(tmp_path, "bf16", {0: 3.0, LAST: 1.2})]
    result = compare(runs, allow_different_data=True)
    assert result.curves == []
    assert not [table for table in tables(result) if table.columns[0] == "step"]
    assert not [one for one in figures(result) if one.heading.startswith("Held-out loss")]


def test_interrupted_run_has_a_curve(tmp_path: Path) -> None:
    path = run(tmp_path, "nf4", SHAPE | {LAST: 1.1}, status="interrupted")
    log = {"tokens": [1] * N, "nll_before": [3.0] * N, "during": [{"step": 5, "nll": [2.0] * N}]}
    write(path / "training_logs.json", step_log([2.0] * LAST, evaluation=log))
    (curve,) = compared(tmp_path, path).curves
    assert (curve.steps, curve.mean) == ([0, 5], [3.0, 2.0])

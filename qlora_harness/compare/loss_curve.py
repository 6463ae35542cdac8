"""The held-out loss during training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_harness.compare.arms import Arm
from qlora_harness.compare.record import LossCurve


def loss_curves(arms: Sequence[Arm]) -> list[LossCurve]:
    """Returns the curves of arms whose runs were all evaluated on the same conversations."""
    held_out = {
        run.training.data.eval.fingerprint
        for arm in arms
        for run in arm.runs
        if run.training is not None and run.training.data.eval is not None
    }
    curves = [_curve(arm) for arm in arms] if len(held_out) == 1 else []
    return [curve for curve in curves if curve is not None]


def _curve(arm: Arm) -> LossCurve | None:
    """The losses at the steps at which all runs of an arm were evaluated."""
    logs = [run.log for run in arm.runs if run.log is not None and run.log.evaluation.during]
    if len(logs) < len(arm.runs) or len({tuple(log.evaluation.tokens) for log in logs}) > 1:
        return None
    points = [{point.step: log.evaluation.mean(point.nll) for point in log.curve} for log in logs]
    steps = [step for step in points[0] if all(step in other for other in points)]
    if len(steps) < 2:
        return None
    losses = np.array([[one[step] for step in steps] for one in points])
    return LossCurve(
        arm=arm.name,
        seeds=len(logs),
        steps=steps,
        mean=losses.mean(axis=0).tolist(),
        low=losses.min(axis=0).tolist(),
        high=losses.max(axis=0).tolist(),
    )

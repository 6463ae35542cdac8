"""The held-out loss during training, and whether it was still falling at the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_harness.compare import statistics as st
from qlora_harness.compare.arms import Arm
from qlora_harness.compare.record import Estimate, LossCurve
from qlora_harness.compare.statistics import Floats
from qlora_harness.schema.training_records import TrainingLog

_FEWEST = 10  # conversations; an interval over fewer says little


def loss_curves(arms: Sequence[Arm]) -> list[LossCurve]:
    """Returns the curves of the arms whose runs were all evaluated during training.

    Empty if the arms were evaluated on different conversations.
    """
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
    points = [{point.step: point.nll for point in log.curve} for log in logs]
    steps = [step for step in points[0] if all(step in other for other in points)]
    if len(steps) < 2:
        return None
    weights = np.array(logs[0].evaluation.tokens, dtype=np.float64)
    nll = np.array([[one[step] for step in steps] for one in points])
    losses = nll.sum(axis=2) / weights.sum()
    curve = LossCurve(
        arm=arm.name,
        seeds=len(logs),
        steps=steps,
        mean=losses.mean(axis=0).tolist(),
        low=losses.min(axis=0).tolist(),
        high=losses.max(axis=0).tolist(),
    )
    if len(weights) < _FEWEST or not all(_ended(log, steps[-1]) for log in logs):
        return curve
    return curve.model_copy(update=_trend(curve, nll / weights, weights))


def _ended(log: TrainingLog, last: int) -> bool:
    """Whether a curve ends with the evaluation after the last step."""
    return bool(log.evaluation.nll) and log.curve[-1].step == last


def _trend(curve: LossCurve, losses: Floats, weights: Floats) -> dict[str, object]:
    """How the loss moved towards the end; `losses` are [runs, steps, conversations].

    Each test pairs conversations and runs, with the intervals of `statistics`. The lowest loss is
    chosen after the fact, so a rise is tested against all earlier points together
    (Bonferroni). A fall is tested against one point that doesn't depend on the losses: the last
    evaluation in the first two thirds of the steps.
    """
    steps, last = curve.steps, len(curve.steps) - 1
    best = int(np.argmin(curve.mean))
    if best != last and (_change(losses, weights, best, st.LEVEL / last).low or 0.0) > 0:
        return {"trend": "rising", "since": steps[best]}
    earlier = [place for place, step in enumerate(steps) if 0 < step <= 2 / 3 * steps[last]]
    if not earlier:  # only the one before training, from which any loss falls
        return {}
    if (_change(losses, weights, earlier[-1], st.LEVEL).high or 0.0) < 0:
        return {"trend": "falling", "since": steps[earlier[-1]]}
    return {"trend": "flat", "since": steps[earlier[-1]]}


def _change(losses: Floats, weights: Floats, place: int, level: float) -> Estimate:
    """The change of the loss from a point of the curve to its end, nats per token."""
    change = losses[:, -1] - losses[:, place]
    mean, items = st.over_items(change.mean(axis=0), weights)
    by_run = change @ (weights / weights.sum())
    seeds = st.over_seeds(by_run, np.zeros(len(by_run)), blocks=True)
    return st.combine(mean, items, seeds, level=level)


def notes_on_curves(curves: Sequence[LossCurve]) -> list[str]:
    """Returns a note on each arm whose held-out loss was still falling, or rose again."""
    notes = []
    for curve in curves:
        if curve.trend not in ("falling", "rising"):
            continue
        place = curve.steps.index(curve.since or 0)
        sizes = f"{curve.mean[place]:.4f} at step {curve.since}, {curve.mean[-1]:.4f} at the last"
        meaning = (
            "the held-out loss was still falling at the end"
            if curve.trend == "falling"
            else "the held-out loss rose again before the end, which is overfitting"
        )
        notes.append(f"{curve.arm}: {meaning} ({sizes}).")
    return notes

"""What training costs: memory, time and losses of two arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import combinations

import numpy as np

from qlora_harness.compare import statistics as st
from qlora_harness.compare.arms import Arm, matched
from qlora_harness.compare.endpoint import SPECS, absent, measured
from qlora_harness.compare.record import Endpoint, Estimate, Word
from qlora_harness.compare.statistics import Floats
from qlora_harness.results.runs import Run
from qlora_harness.schema.training_records import TrainingLog, TrainingSummary

_FIRST_STEPS = 3  # not timed: kernels are chosen in them
_FEWEST = 10  # conversations; an interval over fewer says little
_STEPS_TOGETHER, _FEWEST_GROUPS = 10, 5  # neighbouring steps share stalls
# Device memory, bytes, that drivers and desktops hold while no other program runs.
_NEGLIGIBLE = 2**30


def costs(arm: Arm, baseline: Arm, level: float) -> list[Endpoint]:
    """Returns memory, time and losses, arm less baseline, with intervals at a two-sided level."""
    trained = [run.training is not None for run in (*arm.runs, *baseline.runs)]
    if not any(trained):
        return []
    if not all(trained):
        return [absent(key, "not trained here") for key in ("memory", "time", "eval_loss")]
    one, other = matched(arm, baseline)
    paired = [_time(one, other, level), *_losses(one, other, level)]
    if len(one.runs) < len(arm.runs) or len(other.runs) < len(baseline.runs):
        note = f"over the {len(one.runs)} seeds of both"
        paired = [e if e.reason else e.model_copy(update={"reason": note}) for e in paired]
    return [_memory(arm, baseline, level), *paired]


def _summaries(arm: Arm) -> list[TrainingSummary]:
    return [run.training for run in arm.runs if run.training]


def _values(arm: Arm, value: Callable[[TrainingSummary], float | None]) -> Floats:
    """A recorded number of each run; NaN if it is missing."""
    return np.array([value(summary) for summary in _summaries(arm)], np.float64)


def _logs(arm: Arm, baseline: Arm) -> tuple[list[TrainingLog], list[TrainingLog]] | None:
    """The step logs of both arms; None if one is missing."""
    one, two = ([run.log for run in a.runs if run.log] for a in (arm, baseline))
    complete = (len(one), len(two)) == (len(arm.runs), len(baseline.runs))
    return (one, two) if complete else None


def _memory(arm: Arm, baseline: Arm, level: float) -> Endpoint:
    a, b = (_values(part, lambda summary: summary.peak_bytes or None) for part in (arm, baseline))
    kinds = {run.memory.device_type for run in (*_summaries(arm), *_summaries(baseline))}
    if len(kinds) > 1 or np.isnan([*a, *b]).any():
        return absent("memory", "different devices" if len(kinds) > 1 else "not recorded")
    estimate = _ratio(a, b, level)
    difference = estimate.difference or 0.0
    if 1 in (len(a), len(b)):  # one arm's spread says nothing about the other's
        estimate = Estimate(difference=difference)
    spec = SPECS["memory"]
    if kinds == {"cpu"}:
        return measured("memory", (a, b), estimate, spec=spec._replace(name="peak CPU memory"))
    endpoint = measured("memory", (a, b), estimate)
    if estimate.low is not None:
        return endpoint
    # A run allocates the same each time, so one is enough.
    same = abs(difference) < math.log1p(spec.margin or 0)
    word: Word = "same" if same else "better" if difference < 0 else "worse"
    return endpoint.model_copy(update={"word": word, "within": same})


def _ratio(one: Floats, two: Floats, level: float) -> Estimate:
    """The logarithm of the ratio of geometric means, over seeds."""
    a, b = np.log(one), np.log(two)
    seeds = st.over_seeds(a, b, blocks=False)
    return st.combine(float(a.mean() - b.mean()), None, seeds, level=level)


def _same_seeds(arm: Arm, baseline: Arm) -> bool:
    return None not in arm.seeds and arm.seeds == baseline.seeds


def _time(arm: Arm, baseline: Arm, level: float) -> Endpoint:
    reason = _disturbance([*arm.runs, *baseline.runs])
    if reason is not None:
        return absent("time", reason)
    one, two = (_values(a, lambda summary: summary.runtime.train_seconds) for a in (arm, baseline))
    if not one.all() or not two.all():
        return absent("time", "no step was taken")
    pairs = zip(arm.runs, baseline.runs, strict=False) if _same_seeds(arm, baseline) else ()
    ratios = [_step_ratios(mine.log, theirs.log) for mine, theirs in pairs]
    size = min((len(ratio) for ratio in ratios), default=0)
    if size < _FEWEST_GROUPS:
        estimate = _ratio(one, two, level)
        few = "too few steps to pair, and one run each" if estimate.low is None else None
        return measured("time", (one, two), estimate, reason=few)
    table = np.array([ratio[:size] for ratio in ratios])
    difference, items = st.over_items(table.mean(axis=0))
    seeds = st.over_seeds(table.mean(axis=1), np.zeros(len(table)), blocks=True)
    return measured("time", (one, two), st.combine(difference, items, seeds, level=level), n=size)


def _disturbance(runs: Sequence[Run]) -> str | None:
    """Why the times of runs can't be compared; None if they can."""
    trained = [(run.label, run.training) for run in runs if run.training is not None]
    alone = [_of_one(label, one) for label, one in trained]
    together = [_of_two(*one, *other) for one, other in combinations(trained, 2)]
    return next((reason for reason in (*alone, *together) if reason), None)


def _of_one(label: str, run: TrainingSummary) -> str | None:
    if run.status != "completed":
        return f"{label} was interrupted"
    if run.runtime.resumed:
        return f"{label} was resumed from a checkpoint"
    if run.memory.other_processes:
        return f"the GPU of {label} was shared"
    others = run.memory.other_bytes or 0
    if others > _NEGLIGIBLE:
        return f"others held {others / 2**30:.1f} GiB of the GPU of {label}"
    return None


def _of_two(label: str, one: TrainingSummary, name: str, other: TrainingSummary) -> str | None:
    threads = one.environment.cpu_threads, other.environment.cpu_threads
    if None not in threads and threads[0] != threads[1]:
        return f"{threads[0]} vs {threads[1]} CPU threads ({label}, {name})"
    if _device(one) != _device(other):
        return f"different devices ({label}, {name})"
    if _same_host(one, other) and _overlap(one, other):
        return f"{label}, {name} overlapped"
    return None


def _device(run: TrainingSummary) -> object:
    return (run.environment.device or {}).get("name")


def _same_host(one: TrainingSummary, other: TrainingSummary) -> bool:
    """Whether runs shared a host; even on two GPUs they then share its cores."""
    return one.process.host is not None and one.process.host == other.process.host


def _overlap(one: TrainingSummary, other: TrainingSummary) -> bool:
    try:
        begins = [datetime.fromisoformat(str(run.started)) for run in (one, other)]
        ends = [datetime.fromisoformat(str(run.finished)) for run in (one, other)]
        return max(begins) < min(ends)
    except (ValueError, TypeError):  # not recorded
        return False


def _step_ratios(one: TrainingLog | None, two: TrainingLog | None) -> Floats:
    """Log ratios of the seconds of the same steps, averaged over neighbours; empty if unpaired."""
    if one is None or two is None or len(one.steps) != len(two.steps):
        return np.zeros(0)
    pairs = list(zip(one.steps, two.steps, strict=True))[_FIRST_STEPS:]
    if any(a.tokens != b.tokens or not a.seconds or not b.seconds for a, b in pairs):
        return np.zeros(0)
    ratios = np.array([math.log((a.seconds or 1) / (b.seconds or 1)) for a, b in pairs])
    size = min(_STEPS_TOGETHER, len(ratios) // _FEWEST_GROUPS)
    if size == 0:
        return np.zeros(0)
    return np.asarray(ratios[: len(ratios) // size * size].reshape(-1, size).mean(axis=1))


def _losses(arm: Arm, baseline: Arm, level: float) -> list[Endpoint]:
    """Held-out losses before and after training, and the change."""
    reason = _no_loss(arm, baseline)
    if reason is not None:
        return [absent("eval_loss", reason)]
    after = _conversations(arm, baseline, "eval_loss", level)
    if after is None:
        one, two = (_values(a, lambda summary: summary.results.eval_loss) for a in (arm, baseline))
        seeds = st.over_seeds(one, two, blocks=_same_seeds(arm, baseline))
        estimate = st.combine(float(one.mean() - two.mean()), None, seeds, level=level)
        after = measured("eval_loss", (one, two), estimate, reason="no losses by conversation")
    # The difference of the changes is the interaction of quantisation and training on loss.
    others = [_conversations(arm, baseline, key, level) for key in ("loss_before", "loss_change")]
    return [after, *(other for other in others if other)]


def _no_loss(arm: Arm, baseline: Arm) -> str | None:
    """Why the evaluation losses of two arms can't be compared; None if they can."""
    records = [*_summaries(arm), *_summaries(baseline)]
    if any(record.status != "completed" for record in records):
        return "a run was interrupted"
    if len({record.data.eval.fingerprint if record.data.eval else None for record in records}) > 1:
        return "different evaluation data"
    if any(record.results.eval_loss is None for record in records):
        return "no held-out conversations"
    if any(run.random_weights for run in (*arm.runs, *baseline.runs)):
        return "random weights"
    return None


def _conversations(arm: Arm, baseline: Arm, key: str, level: float) -> Endpoint | None:
    """Paired by conversation, weighted by token, seeds as blocks; None if not recorded."""
    logs = _logs(arm, baseline)
    if logs is None:
        return None
    tokens = {tuple(log.evaluation.tokens) for part in logs for log in part}
    after = [[log.evaluation.nll for log in part] for part in logs]
    before = [[log.evaluation.nll_before for log in part] for part in logs]
    needed = {"eval_loss": [after], "loss_before": [before]}.get(key, [after, before])
    if len(tokens) > 1 or not all(nll for losses in needed for part in losses for nll in part):
        return None
    weights = np.array(tokens.pop(), dtype=np.float64)
    one, two = (np.array(part) / weights for part in needed[0])
    if len(needed) > 1:
        one, two = one - np.array(before[0]) / weights, two - np.array(before[1]) / weights
    share = weights / weights.sum()
    means = (one @ share, two @ share)
    difference, items = st.over_items(one.mean(axis=0) - two.mean(axis=0), weights)
    n = len(weights)
    if n < _FEWEST:
        few = Estimate(difference=difference)
        return measured(key, means, few, n=n, reason="too few conversations")
    seeds = st.over_seeds(*means, blocks=_same_seeds(arm, baseline))
    return measured(key, means, st.combine(difference, items, seeds, level=level), n=n)

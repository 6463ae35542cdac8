"""Whether the times of training runs may be compared: each must have had its device to itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import combinations

from qlora_harness.results.runs import Run
from qlora_harness.schema.training import TrainingSummary

# Device memory of others, bytes, that is no other program: a driver's own and a desktop's.
_NEGLIGIBLE = 2**30


def disturbance(runs: Sequence[Run]) -> str | None:
    """Returns why the times of runs can't be compared; None if nothing speaks against it."""
    trained = [(run.label, run.training) for run in runs if run.training is not None]
    if len(trained) < len(runs):
        return "not trained here"
    for label, one in trained:
        if one.status != "completed":
            return f"{label} was interrupted"
        if one.runtime.resumed:
            return f"{label} was resumed from a checkpoint"
        if one.memory.other_processes:
            return f"{one.memory.other_processes} other processes used the GPU of {label}"
        if (one.memory.other_bytes or 0) > _NEGLIGIBLE:
            held = (one.memory.other_bytes or 0) / 2**30
            return f"others held {held:.1f} GiB of the GPU of {label}"
    for (label, one), (name, other) in combinations(trained, 2):
        mine, theirs = one.environment, other.environment
        if None not in (mine.cpu_threads, theirs.cpu_threads) and (
            mine.cpu_threads != theirs.cpu_threads
        ):
            return f"{mine.cpu_threads} vs {theirs.cpu_threads} CPU threads ({label}, {name})"
        if _device(one, "name") != _device(other, "name"):
            return f"different devices ({label}, {name})"
        if _same_device(one, other) and _overlap(one, other):
            return f"{label}, {name} overlapped"
    return None


def _device(run: TrainingSummary, key: str) -> object:
    return (run.environment.device or {}).get(key)


def _same_device(one: TrainingSummary, other: TrainingSummary) -> bool:
    if one.process.host is None or one.process.host != other.process.host:
        return False
    # Older records name the kind of device only; then one of them may have been another.
    known = None not in (_device(one, "id"), _device(other, "id"))
    return not known or _device(one, "id") == _device(other, "id")


def _overlap(one: TrainingSummary, other: TrainingSummary) -> bool:
    try:
        begins = [datetime.fromisoformat(str(run.started)) for run in (one, other)]
        ends = [datetime.fromisoformat(str(run.finished)) for run in (one, other)]
        return max(begins) < min(ends)
    except (ValueError, TypeError):  # not recorded
        return False

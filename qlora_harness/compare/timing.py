"""Whether the times of training runs may be compared: each must have had its device to itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from itertools import combinations
from typing import Any

from qlora_harness.compare.runs import Run, TrainingSummary

# Device memory of others, bytes, that is no other program: a driver's own and a desktop's.
_NEGLIGIBLE = 2**30
# What other processes on the host or the device change.
_DISTURBED: dict[str, Any] = dict.fromkeys(
    ("train_seconds", "tokens_per_second", "peak_device_used_bytes")
)


def without_times(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Leaves the times out of runs that were not timed under the same conditions.

    Args:
        runs: The runs; those that were not trained here stay as they are.

    Returns:
        The runs, without training time and throughput if something disturbed one of them, and a
        note that says what, or none.
    """
    reason = _disturbance([(run.label, run.training) for run in runs if run.training is not None])
    if reason is None:
        return list(runs), []
    untimed = [
        run if run.training is None else replace(run, training=replace(run.training, **_DISTURBED))
        for run in runs
    ]
    return untimed, [
        f"Training time, throughput and the memory of the whole device are not compared: {reason}."
    ]


def _disturbance(trained: Sequence[tuple[str, TrainingSummary]]) -> str | None:
    for label, one in trained:
        if one.other_processes:
            return f"{one.other_processes:.0f} other processes used the GPU of {label}"
        if one.other_bytes is not None and one.other_bytes > _NEGLIGIBLE:
            return f"others held {one.other_bytes / 2**30:.1f} GiB of the GPU of {label}"
    for (label, one), (name, other) in combinations(trained, 2):
        threads = one.cpu_threads, other.cpu_threads
        if None not in threads and threads[0] != threads[1]:
            return f"{label} had {threads[0]:.0f} CPU threads, and {name} {threads[1]:.0f}"
        if _same_device(one, other) and _overlap(one, other):
            return f"{label} and {name} ran at the same time on the same host and device"
    return None


def _same_device(one: TrainingSummary, other: TrainingSummary) -> bool:
    if one.host is None or one.host != other.host:
        return False
    # Older records name the kind of device only; then one of them may have been another.
    known = None not in (one.device_id, other.device_id)
    return one.device_id == other.device_id if known else one.device_name == other.device_name


def _overlap(one: TrainingSummary, other: TrainingSummary) -> bool:
    try:
        begins = [datetime.fromisoformat(str(run.started)) for run in (one, other)]
        ends = [datetime.fromisoformat(str(run.finished)) for run in (one, other)]
        return max(begins) < min(ends)
    except (ValueError, TypeError):  # not recorded
        return False

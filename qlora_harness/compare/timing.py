"""Whether the times of training runs may be compared: each must have had its device to itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import combinations

from qlora_harness.results.runs import Run
from qlora_harness.schema.training import TrainingSummary
from qlora_harness.units import GIB

# Device memory of others, bytes, that is no other program: a driver's own and a desktop's.
_NEGLIGIBLE = GIB


def disturbance(runs: Sequence[Run]) -> str | None:
    """Returns why the times of runs can't be compared; None if nothing speaks against it."""
    trained = [(run.label, run.training) for run in runs if run.training is not None]
    if len(trained) < len(runs):
        return "not trained here"
    alone = [_of_one(label, one) for label, one in trained]
    together = [_of_two(*one, *other) for one, other in combinations(trained, 2)]
    return next((reason for reason in (*alone, *together) if reason), None)


def _of_one(label: str, run: TrainingSummary) -> str | None:
    if run.status != "completed":
        return f"{label} was interrupted"
    if run.runtime.resumed:
        return f"{label} was resumed from a checkpoint"
    if run.memory.other_processes:
        return f"{run.memory.other_processes} other processes used the GPU of {label}"
    others = run.memory.other_bytes or 0
    if others > _NEGLIGIBLE:
        return f"others held {others / GIB:.1f} GiB of the GPU of {label}"
    return None


def _of_two(label: str, one: TrainingSummary, name: str, other: TrainingSummary) -> str | None:
    threads = one.environment.cpu_threads, other.environment.cpu_threads
    if None not in threads and threads[0] != threads[1]:
        return f"{threads[0]} vs {threads[1]} CPU threads ({label}, {name})"
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
    # Older records name the kind of device only, so it may have been the same one.
    ids = _device(one, "id"), _device(other, "id")
    return None in ids or ids[0] == ids[1]


def _overlap(one: TrainingSummary, other: TrainingSummary) -> bool:
    try:
        begins = [datetime.fromisoformat(str(run.started)) for run in (one, other)]
        ends = [datetime.fromisoformat(str(run.finished)) for run in (one, other)]
        return max(begins) < min(ends)
    except (ValueError, TypeError):  # not recorded
        return False

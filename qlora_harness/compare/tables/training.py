"""The table of memory, time and loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora_harness.compare.runs import Run, TrainingSummary
from qlora_harness.compare.tables.number_text import decimals, duration, signed
from qlora_harness.compare.tables.table import Cell, Row, Table, columns_of

GIB = 2**30


@dataclass(frozen=True)
class _Measure:
    """One row of the training table: what it shows of a summary and how it is written."""

    key: str
    name: str
    unit: str
    read: Callable[[TrainingSummary], float | None]
    write: Callable[[float], str]
    ratio_digits: int = 2


def gpu_peak_bytes(summary: TrainingSummary) -> float | None:
    """Returns the peak GPU memory that a run needs, bytes; None for a run on the CPU.

    That is what its tensors take, and what a paged optimizer holds in managed memory.

    Args:
        summary: A training summary.
    """
    if summary.device_type == "cpu" or summary.peak_allocated_bytes is None:
        return None
    return summary.peak_allocated_bytes + (summary.peak_managed_bytes or 0.0)


def cpu_peak_bytes(summary: TrainingSummary) -> float | None:
    """Returns the peak resident memory of a run on the CPU, bytes; None for a run on a GPU.

    Args:
        summary: A training summary.
    """
    return summary.cpu_peak_rss_bytes if summary.device_type == "cpu" else None


def training_table(runs: Sequence[Run]) -> Table | None:
    """Builds the table of memory, time and loss; None if no run was trained here.

    Args:
        runs: The runs; those without a training summary get empty cells.
    """
    summaries = [run.training for run in runs]
    known = [summary for summary in summaries if summary is not None]
    if not known:
        return None
    rows = tuple(
        _training_row(measure, summaries)
        for measure in _MEASURES
        if measure.key not in _OPTIONAL or any(measure.read(item) is not None for item in known)
        # Both parts where there are two.
        if measure.key not in _PARTS or any(item.peak_managed_bytes for item in known)
    )
    columns = columns_of([run.label for run in runs], ("value", "difference", "ratio"))
    return Table("training", "Training", columns, rows)


def _gib(value: float | None) -> float | None:
    return None if value is None else value / GIB


def _on_gpu(summary: TrainingSummary, value: float | None) -> float | None:
    return None if summary.device_type == "cpu" else _gib(value)


_MEASURES = (
    _Measure(
        "peak_gpu_gib",
        "Peak GPU memory (GiB)",
        "GiB",
        lambda summary: _gib(gpu_peak_bytes(summary)),
        decimals(2),
    ),
    _Measure(
        "peak_gpu_allocated_gib",
        "– allocated (GiB)",
        "GiB",
        lambda summary: _on_gpu(summary, summary.peak_allocated_bytes),
        decimals(2),
    ),
    _Measure(
        "peak_gpu_managed_gib",
        "– managed, of a paged optimizer (GiB)",
        "GiB",
        lambda summary: _on_gpu(summary, summary.peak_managed_bytes),
        decimals(2),
    ),
    _Measure(
        "peak_gpu_reserved_gib",
        "Peak GPU memory, reserved (GiB)",
        "GiB",
        lambda summary: _on_gpu(summary, summary.peak_reserved_bytes),
        decimals(2),
    ),
    _Measure(
        "peak_gpu_device_gib",
        "Peak GPU memory, device, all processes (GiB)",
        "GiB",
        lambda summary: _on_gpu(summary, summary.peak_device_used_bytes),
        decimals(2),
    ),
    _Measure(
        "peak_cpu_gib",
        "Peak CPU memory (RSS, GiB)",
        "GiB",
        lambda summary: _gib(cpu_peak_bytes(summary)),
        decimals(2),
    ),
    _Measure(
        "train_seconds", "Training time (h:mm:ss)", "s", lambda item: item.train_seconds, duration
    ),
    _Measure(
        "tokens_per_second",
        "Throughput (tokens/s)",
        "tokens/s",
        lambda summary: summary.tokens_per_second,
        decimals(1),
    ),
    _Measure(
        "final_train_loss",
        "Final training loss (nats/token)",
        "nats/token",
        lambda summary: summary.final_train_loss,
        decimals(4),
        3,
    ),
    _Measure(
        "eval_loss",
        "Evaluation loss (nats/token)",
        "nats/token",
        lambda summary: summary.eval_loss,
        decimals(4),
        3,
    ),
    _Measure("perplexity", "Perplexity", "", lambda summary: summary.perplexity, decimals(3), 3),
)
# Rows that stand only where some run has a value.
_OPTIONAL = {
    "peak_gpu_allocated_gib",
    "peak_gpu_managed_gib",
    "peak_gpu_reserved_gib",
    "peak_gpu_device_gib",
    "peak_cpu_gib",
}
_PARTS = {"peak_gpu_allocated_gib", "peak_gpu_managed_gib"}


def _training_row(measure: _Measure, summaries: Sequence[TrainingSummary | None]) -> Row:
    values = [None if summary is None else measure.read(summary) for summary in summaries]
    first = values[0]
    cells = []
    for index, value in enumerate(values):
        cells.append(Cell() if value is None else Cell(measure.write(value), value))
        if index == 0:
            continue
        if first is None or value is None:
            cells += [Cell(), Cell()]
            continue
        cells.append(Cell(signed(value - first, measure.write), value - first))
        ratio = value / first if first else None
        shown = ratio is not None and math.isfinite(ratio)
        cells.append(Cell(f"{ratio:.{measure.ratio_digits}f}×", ratio) if shown else Cell())
    return Row(measure.key, measure.name, measure.unit, tuple(cells))

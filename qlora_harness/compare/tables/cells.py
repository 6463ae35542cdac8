"""Cells of accuracies, their differences, intervals and p-values, in percentage points."""

from __future__ import annotations

from qlora_harness.compare.paired import Interval
from qlora_harness.compare.statistics import Difference
from qlora_harness.compare.tables.number_text import decimals, interval_text, p_text, points, signed
from qlora_harness.compare.tables.table import Cell


def difference_cell(difference: Difference) -> Cell:
    """Returns a difference of accuracies with its standard error.

    Args:
        difference: As a share.
    """
    stderr = None if difference.stderr is None else 100 * difference.stderr
    return Cell(points(difference), 100 * difference.value, stderr)


def percent_cell(share: float) -> Cell:
    """Returns a share in percent.

    Args:
        share: 0 to 1, or more where a ratio is meant.
    """
    return Cell(f"{100 * share:.2f}", 100 * share)


def points_cell(share: float) -> Cell:
    """Returns a difference of accuracies without a standard error.

    Args:
        share: -1 to 1.
    """
    return Cell(signed(100 * share, decimals(2)), 100 * share)


def interval_cell(value: float, interval: Interval | None) -> Cell:
    """Returns the interval of a difference of accuracies; an empty cell without one.

    Args:
        value: The difference, as a share.
        interval: As shares.
    """
    if interval is None:
        return Cell()
    return Cell(
        interval_text(interval), 100 * value, None, (100 * interval.low, 100 * interval.high)
    )


def p_cell(p: float) -> Cell:
    """Returns a p-value.

    Args:
        p: 0 to 1.
    """
    return Cell(p_text(p), p)

"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Callable

from qlora_harness.compare.paired import Interval
from qlora_harness.compare.statistics import Difference


def decimals(digits: int) -> Callable[[float], str]:
    """Returns a function that writes a number with a fixed number of decimals.

    Args:
        digits: Decimals.
    """

    def write(value: float) -> str:
        text = f"{value:,.{digits}f}"
        return text.replace("-", "−") if _is_above_zero(text) else text.lstrip("-")

    return write


def _is_above_zero(text: str) -> bool:
    """Whether a written size has a digit other than 0."""
    return any(digit in text for digit in "123456789")


def duration(seconds: float) -> str:
    """Writes a time as h:mm:ss.

    Args:
        seconds: A time of at least 0, seconds.
    """
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


def signed(value: float, write: Callable[[float], str]) -> str:
    """Writes a difference with its sign; what is written as 0 has none.

    Args:
        value: The difference.
        write: Writes its size.
    """
    text = write(abs(value))
    if not _is_above_zero(text):
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def points(difference: Difference) -> str:
    """Writes a difference of accuracies in percentage points with its standard error.

    Args:
        difference: The difference, as a share.
    """
    text = signed(100 * difference.value, decimals(2))
    if difference.stderr is None:
        return text
    return f"{text} ± {100 * difference.stderr:.2f}"


def interval_text(interval: Interval) -> str:
    """Writes an interval of a difference in percentage points.

    Args:
        interval: As shares.
    """
    low, high = (signed(100 * end, decimals(2)) for end in (interval.low, interval.high))
    return f"{low} to {high}"


def p_text(p: float) -> str:
    """Writes a p-value.

    Args:
        p: 0 to 1.
    """
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"

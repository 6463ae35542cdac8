"""The numbers of endpoints as text, for every renderer."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_harness.compare.record import Endpoint
from qlora_harness.results.terminal import NOTHING, duration, gib


def signed(value: float, digits: int) -> str:
    """Returns a number with its sign and a true minus; without a sign if it rounds to 0."""
    text = f"{abs(value):,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def points(share: float, unit: str = "") -> str:
    """Returns a difference of shares in percentage points."""
    return signed(100 * share, 2) + unit


def value(endpoint: Endpoint, number: float | None) -> str:
    """Returns a value of an endpoint with its unit."""
    if number is None:
        return NOTHING
    if endpoint.unit == "bytes":
        return f"{gib(number)} GiB"
    if endpoint.unit == "seconds":
        return duration(number)
    return f"{100 * number:.2f}%" if endpoint.unit == "share" else f"{number:.3f}"


def difference(endpoint: Endpoint) -> str:
    """Returns the difference of an endpoint with its unit."""
    if endpoint.difference is None:
        return NOTHING
    unit = "%" if endpoint.relative else " pts" if endpoint.unit == "share" else ""
    return _difference(endpoint, endpoint.difference) + unit


def _difference(endpoint: Endpoint, number: float) -> str:
    if endpoint.relative:
        return signed(100 * number, 1)
    return points(number) if endpoint.unit == "share" else signed(number, 3)


def plus_minus(endpoint: Endpoint) -> str:
    """Returns the difference and the longer half of its 95% interval, "+0.118 ±0.015"."""
    if endpoint.difference is None:
        return NOTHING
    middle, low, high = endpoint.difference, endpoint.low, endpoint.high
    text = _difference(endpoint, middle) + ("%" if endpoint.relative else "")
    if low is None or high is None or low == high:
        return text
    return f"{text} ±{_difference(endpoint, max(high - middle, middle - low)).lstrip('+')}"


def interval(endpoint: Endpoint, *, inner: bool = False) -> str:
    """Returns the 95% interval as "+0.1 to +0.3", or the inner one of 90%; "" without one."""
    low, high = endpoint.low, endpoint.high
    if inner:
        low, high = endpoint.inner_low, endpoint.inner_high
    if low is None or high is None:
        return ""
    return f"{_difference(endpoint, low)} to {_difference(endpoint, high)}"


def word(endpoint: Endpoint) -> str:
    """Returns the word with its margin: "worse", "same within ±1" or "worse, within ±1"."""
    if endpoint.letters:
        return f"{endpoint.word} (letters)"
    if not endpoint.within or endpoint.margin is None:
        return endpoint.word
    margin = f"{100 * endpoint.margin:g}" if endpoint.unit != "nats" else f"{endpoint.margin:g}"
    unit = "%" if endpoint.relative else ""
    return f"{endpoint.word}{'' if endpoint.word == 'same' else ','} within ±{margin}{unit}"


def p_text(p: float | None) -> str:
    """Returns a p-value with four digits; "–" without one."""
    return NOTHING if p is None else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def listed(parts: Sequence[str]) -> str:
    """Returns one or more texts as "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

"""Formats the numbers of endpoints for every renderer."""

from __future__ import annotations

from qlora_harness.compare.endpoint import Endpoint
from qlora_harness.units import GIB, NOTHING, duration


def signed(value: float, digits: int) -> str:
    """Returns a number with its sign, a true minus for less, and none where it rounds to 0."""
    text = f"{abs(value):,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def value(endpoint: Endpoint, number: float | None) -> str:
    """Returns a value of an endpoint with its unit."""
    if number is None:
        return NOTHING
    if endpoint.unit == "bytes":
        return f"{number / GIB:.2f} GiB"
    if endpoint.unit == "seconds":
        return duration(number)
    return f"{100 * number:.2f}%" if endpoint.unit == "share" else f"{number:.3f}"


def difference(endpoint: Endpoint, number: float | None = None, *, unit: bool = True) -> str:
    """Returns a difference of an endpoint."""
    number = endpoint.difference if number is None else number
    if number is None:
        return NOTHING
    if endpoint.relative:
        return signed(100 * number, 1) + ("%" if unit else "")
    if endpoint.unit == "share":
        return signed(100 * number, 2) + (" pts" if unit else "")
    return signed(number, 3)


def interval(endpoint: Endpoint) -> str:
    """Returns an interval as "+0.1 to +0.3"; "" without one."""
    if endpoint.low is None or endpoint.high is None:
        return ""
    low, high = (difference(endpoint, end, unit=False) for end in (endpoint.low, endpoint.high))
    return f"{low} to {high}"


def inner_interval(endpoint: Endpoint) -> str:
    """Returns the 90% interval, by which equivalence is judged; "" without one."""
    ends = (endpoint.inner_low, endpoint.inner_high)
    if None in ends:
        return ""
    return " to ".join(difference(endpoint, end, unit=False) for end in ends)


def word(endpoint: Endpoint) -> str:
    """Returns what is shown, such as "worse", "same within ±1" or "worse, within ±1"."""
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

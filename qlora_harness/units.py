"""Sizes and times for people."""

from __future__ import annotations

NOTHING = "–"
GIB = 2**30


def duration(seconds: float) -> str:
    """Returns a time in its natural unit."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"

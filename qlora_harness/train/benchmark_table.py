"""What the training benchmark finds of each way, and the table of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StepMeasurement:
    """Training steps of one way.

    Attributes:
        way: Its name in `benchmark.WAYS`.
        quant: How the base is held.
        changes: What it changes from the published recipe.
        steps: Steps that were timed.
        tokens: Real tokens of all of them.
        seconds: Of all of them.
        tokens_per_second: tokens over seconds.
        median_tokens_per_second: Median of the steps.
        peak_allocated_bytes: On CUDA, else None.
        peak_reserved_bytes: On CUDA, else None.
        losses: Of every step, those before the timed ones as well, nats.
        ratio: tokens_per_second over that of the first way with the same quant.
        failure: Why there are no numbers, or None.
        versions: Packages of a peer's process; those of our own ways stand beside all measurements.
    """

    way: str
    quant: str
    changes: dict[str, Any]
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    median_tokens_per_second: float = 0.0
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    losses: list[float] = field(default_factory=list)
    ratio: float | None = None
    failure: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


def report(measurements: Sequence[StepMeasurement], title: str) -> str:
    """Returns the measurements as a Markdown table.

    Args:
        measurements: From `benchmark.run`.
        title: What was measured, on which device.
    """
    head = (
        "| way | base | tokens/step | tokens/s | median | ratio | peak allocated, GiB | "
        "peak reserved, GiB | last loss |"
    )
    lines = [title, "", head, "|---|---|" + "---:|" * 7, *map(row, measurements)]
    # Each peer once, as all its ways had the same packages.
    versions = {m.way.partition("-")[0]: m.versions for m in measurements if m.versions}
    for peer, packages in versions.items():
        lines += ["", f"{peer}: {', '.join(map(' '.join, packages.items()))}"]
    return "\n".join(lines)


def row(m: StepMeasurement) -> str:
    """Returns one line of the table.

    Args:
        m: One way.
    """
    if m.failure is not None:
        return f"| {m.way} | {m.quant} | {m.failure} |" + " |" * 6
    peaks = [
        "–" if peak is None else f"{peak / 2**30:.2f}"
        for peak in (m.peak_allocated_bytes, m.peak_reserved_bytes)
    ]
    cells = [
        m.way,
        m.quant,
        f"{m.tokens / m.steps:,.0f}",
        f"{m.tokens_per_second:,.0f}",
        f"{m.median_tokens_per_second:,.0f}",
        f"{m.ratio:.2f}" if m.ratio is not None else "–",
        *peaks,
        f"{m.losses[-1]:.4f}",
    ]
    return f"| {' | '.join(cells)} |"

"""The progress of a running study: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from qlora_harness.results.terminal import NOTHING, PrintableText, duration, gib, optional
from qlora_harness.schema.study_record import State
from qlora_harness.study.definition import Cell
from qlora_harness.study.worker import Report

_LINE_SECONDS = 30.0  # between lines about the steps of one cell
_OTHER_LINES = 3  # of the table: its head, its caption, the cursor
_COLUMNS = ("cell", "", "step", "loss", "tokens/s", "memory GiB", "time")


@dataclass(eq=False)
class _Row:
    """The progress of a cell; `values` are the newest of each kind that its reports had."""

    cell: Cell
    steps: int | None
    state: State = "planned"
    values: dict[str, Any] = field(default_factory=dict)
    began: float | None = None
    seconds: float | None = None
    said: float = 0.0  # when a line about it was last printed

    def take(self, report: Report) -> None:
        """Updates the row from a report."""
        if report.state in ("training", "scoring") and self.began is None:
            self.began = time.monotonic()
        if report.state in ("completed", "failed", "interrupted") and self.began is not None:
            self.seconds = time.monotonic() - self.began
        self.state = report.state
        self.values |= report.values

    def elapsed(self) -> float | None:
        """Seconds since its start, up to its end."""
        if self.seconds is not None or self.began is None:
            return self.seconds
        return time.monotonic() - self.began

    def cells(self) -> list[str]:
        """Returns the texts of its columns."""
        step, elapsed = self.values.get("step"), self.elapsed()
        peaks = map(self.values.get, ("peak_allocated_bytes", "cpu_peak_rss_bytes"))
        return [
            self.cell.name,
            self.state,
            NOTHING if step is None else f"{step}/{self.steps}",
            optional(self.values.get("loss"), "{:.3f}"),
            optional(self.values.get("tokens_per_second"), "{:,.0f}"),
            gib(next(filter(None, peaks), None)),
            NOTHING if elapsed is None or elapsed < 1 else duration(elapsed),
        ]


class Display:
    """Follows the cells of a study; `steps` are those of each arm."""

    def __init__(
        self, cells: Sequence[Cell], steps: dict[str, int], devices: int, console: Console
    ) -> None:
        self.rows = {cell.name: _Row(cell, steps.get(cell.arm)) for cell in cells}
        self._devices, self._console = devices, console
        self._live: Live | None = None
        self._began = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the table inside the `with` block, if there is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(self._table(), console=self._console, auto_refresh=False) as self._live:
            try:
                yield
            finally:
                self._live.update(self._table(every=True), refresh=True)

    def take(self, report: Report) -> None:
        """Shows a report."""
        row = self.rows[report.cell]
        before = row.state
        row.take(report)
        if self._live is None and (row.state != before or self._is_due(row)):
            self._say(row)

    def refresh(self) -> None:
        """Draws the table again."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def failures(self) -> list[str]:
        """Returns a line for each incomplete cell."""
        return [
            f"{row.cell.name} {row.state}: {row.values.get('failure') or 'not started'}"
            for row in self.rows.values()
            if row.state != "completed"
        ]

    def _is_due(self, row: _Row) -> bool:
        last = "step" in row.values and row.values["step"] == row.steps
        return last or time.monotonic() - row.said > _LINE_SECONDS

    def _say(self, row: _Row) -> None:
        row.said = time.monotonic()
        pairs = zip(_COLUMNS[2:], row.cells()[2:], strict=True)
        known = [f"{name} {text}" for name, text in pairs if text != NOTHING]
        if row.values.get("failure"):
            known.append(row.values["failure"])
        line = f"{row.cell.name}: {row.state}" + (f" ({', '.join(known)})" if known else "")
        self._console.print(PrintableText(line), soft_wrap=True)

    def _table(self, every: bool = False) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, caption=self._caption())
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name in ("cell", "") else "right")
        for row in self.rows.values() if every else self._in_view():
            style = {"failed": "red", "planned": "dim", "completed": "green"}.get(row.state, "bold")
            table.add_row(*map(PrintableText, row.cells()), style=style)
        return table

    def _in_view(self) -> list[_Row]:
        """The rows that fit on the terminal: first running and failed cells, then the next ones."""
        order = ("planned", "completed")
        rows = sorted(
            self.rows.values(), key=lambda r: order.index(r.state) if r.state in order else -1
        )
        shown = rows[: max(1, self._console.height - _OTHER_LINES)]
        return [row for row in self.rows.values() if row in shown]

    def _caption(self) -> str:
        done = sum(row.state == "completed" for row in self.rows.values())
        text = f"{done} of {len(self.rows)} cells, {duration(time.monotonic() - self._began)}"
        left = self._seconds_left()
        return text if left is None else f"{text}, about {duration(left)} left"

    def _seconds_left(self) -> float | None:
        """Estimated from finished cells; None before the first and after the last."""
        trained = [r.seconds for r in self.rows.values() if r.cell.seed is not None and r.seconds]
        bases = [r.seconds for r in self.rows.values() if r.cell.seed is None and r.seconds]
        if not trained:
            return None
        left = 0.0
        for row in self.rows.values():
            if row.state in ("planned", "training", "scoring"):
                times = bases if row.cell.seed is None and bases else trained
                left += max(0.0, sum(times) / len(times) - (row.elapsed() or 0.0))
        return left / self._devices or None

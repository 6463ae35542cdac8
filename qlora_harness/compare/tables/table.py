"""What a table is: rows of cells under columns, as data that every output shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NOTHING = "–"
ColumnKind = Literal["value", "difference", "ratio"]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: What a person reads.
        value: The number or text behind it, in the unit of the row; None where there is none.
        stderr: Its standard error in the same unit, where there is one.
        interval: Its 95% interval in the same unit, where there is one.
        label: Whose value it is, where that is not the run of its column: a label of a run, the
            name of an arm, or the minuend of a difference of differences.
    """

    text: str = NOTHING
    value: float | int | str | None = None
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    label: str | None = None


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        key: Its name for programs.
        name: Its name for people, with the unit.
        unit: The unit of its values, "" for none.
        cells: One cell per column.
    """

    key: str
    name: str
    unit: str
    cells: tuple[Cell, ...]

    @property
    def under(self) -> bool:
        """Whether it belongs to the row above, which the name shows by two spaces at its start."""
        return self.name.startswith("  ")


@dataclass(frozen=True)
class Column:
    """One column after the names of the rows.

    Attributes:
        heading: What stands above it.
        run: Index of the run it belongs to; a difference belongs to the later run.
        kind: "value", "difference" (to the first run) or "ratio" (to the first run).
    """

    heading: str
    run: int
    kind: ColumnKind


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        key: Its name for programs.
        title: Its name for people.
        columns: The columns after the names of the rows.
        rows: The rows.
        numeric: Whether its cells are numbers, to be aligned on the right.
        terminal_rows: How many of its rows the terminal shows; None for all.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    numeric: bool = True
    terminal_rows: int | None = None


def cell_label(column: Column, cell: Cell, labels: Sequence[str]) -> str:
    """Returns whose value a cell holds; of a difference, the later of the two.

    Args:
        column: Its column.
        cell: The cell.
        labels: The names of the runs.
    """
    return labels[column.run] if cell.label is None else cell.label


def columns_of(
    labels: Sequence[str], kinds: Sequence[ColumnKind], unit: str = ""
) -> tuple[Column, ...]:
    """Returns the columns of a table of runs: the first run, then the others with what is asked.

    Args:
        labels: The names of the runs.
        kinds: The columns of each later run.
        unit: What stands behind the heading of a difference.
    """
    columns = [Column(labels[0], 0, "value")]
    for index, label in enumerate(labels[1:], start=1):
        for kind in kinds:
            columns.append(Column(_heading(label, kind, unit, len(labels) == 2), index, kind))
    return tuple(columns)


def _heading(label: str, kind: ColumnKind, unit: str, only_pair: bool) -> str:
    if kind == "value":
        return label
    if only_pair:
        return f"{kind}{unit}"
    # Beside several pairs of runs the heading has to say whose difference it is.
    return f"Δ {label}{unit}" if kind == "difference" else f"{label} ×"

"""The table of the questions compared and dropped under `--intersect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_harness.compare.intersection import Intersection, Tally
from qlora_harness.compare.tables.table import Cell, Column, Row, Table


def common_table(shared: Mapping[int, Intersection]) -> Table:
    """Builds the table of the questions compared and dropped under --intersect.

    Args:
        shared: What each later run has in common with the first, by its index.

    Returns:
        A line for all questions, which the terminal shows alone, then one for each task that lost
        some.
    """
    columns = []
    for index, item in shared.items():
        columns += [
            Column(f"{item.run}: common", index, "value"),
            Column(f"dropped of {item.baseline}", index, "value"),
            Column(f"dropped of {item.run}", index, "value"),
        ]

    def row(key: str, name: str, tallies: Sequence[Tally]) -> Row:
        cells = []
        for tally, item in zip(tallies, shared.values(), strict=True):
            cells += [
                Cell(f"{tally.common:,}", tally.common),
                Cell(f"{tally.dropped_baseline:,}", tally.dropped_baseline, label=item.baseline),
                Cell(f"{tally.dropped_run:,}", tally.dropped_run),
            ]
        return Row(key, name, "questions", tuple(cells))

    none = Tally(0, 0, 0)
    rows = [row("common.all", "All tasks", [item.total for item in shared.values()])]
    for subject in sorted({name for item in shared.values() for name in item.by_subject}):
        tallies = [item.by_subject.get(subject, none) for item in shared.values()]
        if any(tally.dropped for tally in tallies):
            rows.append(row(f"common.{subject}", subject, tallies))
    title = "Questions that both runs answered (--intersect)"
    return Table("common", title, tuple(columns), tuple(rows), terminal_rows=1)

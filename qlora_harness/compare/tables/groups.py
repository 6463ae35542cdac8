"""The tables of paired differences by subject and by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from qlora_harness.compare.evaluation import CATEGORIES
from qlora_harness.compare.paired import GroupTest, PairedStatistics
from qlora_harness.compare.tables.cells import difference_cell, p_cell
from qlora_harness.compare.tables.table import Cell, Column, Row, Table


def groups_table(
    labels: Sequence[str],
    paired: Mapping[int, PairedStatistics],
    kind: Literal["subjects", "categories"],
    *,
    common: bool = False,
) -> Table:
    """Builds the table of paired differences by subject or category.

    Args:
        labels: The names of the runs.
        paired: For each later run whose answers are known, by index, its statistics against
            the first run.
        kind: Which groups.
        common: Whether they are over the common questions only.
    """
    groups: list[dict[str, GroupTest]] = [
        {group.name: group for group in getattr(item, kind)} for item in paired.values()
    ]
    names = list(dict.fromkeys(name for found in groups for name in found))
    if kind == "subjects":
        names.sort()
    columns = []
    for index in paired:
        heading = f"{labels[index]} against {labels[0]}"
        columns += [
            Column(f"{heading} (points)", index, "difference"),
            Column("right only in one (first, second)", index, "value"),
            Column("p, Holm", index, "value"),
        ]
    rows = []
    for name in names:
        cells: list[Cell] = []
        for found in groups:
            group = found.get(name)
            if group is None:  # no question of it is common to these two runs
                cells += [Cell(), Cell(), Cell()]
                continue
            counts = group.counts
            changed = f"{counts.only_first:,}, {counts.only_second:,}"
            cells += [
                difference_cell(group.difference),
                Cell(changed, changed),
                p_cell(group.adjusted),
            ]
        totals = [found[name].counts.total if name in found else 0 for found in groups]
        sizes = totals[:1] if len(set(totals)) == 1 else totals
        size = ", ".join(f"{total:,}" for total in sizes)
        shown = CATEGORIES.get(name, name)
        rows.append(Row(f"{kind}.{name}", f"{shown} (n = {size})", "points", tuple(cells)))
    title = "MMLU, paired, by " + ("subject" if kind == "subjects" else "category")
    title += ", common questions only" if common else ""
    return Table(kind, title, tuple(columns), tuple(rows))

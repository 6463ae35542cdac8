"""The table of two runs question by question, and what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from qlora_harness.compare.paired import PairedStatistics
from qlora_harness.compare.statistics import PairedCounts
from qlora_harness.compare.tables.cells import (
    difference_cell,
    interval_cell,
    p_cell,
    percent_cell,
    points_cell,
)
from qlora_harness.compare.tables.table import Cell, Column, Row, Table

_PairedMeasure = tuple[str, str, str, Callable[[PairedStatistics], Cell]]


def paired_table(
    labels: Sequence[str], paired: Mapping[int, PairedStatistics], *, common: bool = False
) -> Table:
    """Builds the table of right and wrong answers, question by question, and what it shows.

    Args:
        labels: The names of the runs.
        paired: For each later run whose answers are known, by index, its statistics against
            the first run.
        common: Whether they are over the common questions only, so that the accuracies of the
            runs' own evaluations are not those behind the differences.
    """
    first = labels[0]
    other = labels[next(iter(paired))] if len(paired) == 1 else "the other"
    margin = 100 * next(iter(paired.values())).margin
    counted = (
        ("both", "Right in both"),
        ("only_first", f"Right only in {first}"),
        ("only_second", f"Right only in {other}"),
        ("neither", "Wrong in both"),
    )
    rows = _common_rows(first, other, paired) if common else []
    rows += [
        Row(
            key,
            name,
            "questions",
            tuple(
                Cell(f"{getattr(item.counts, key):,}", getattr(item.counts, key))
                for item in paired.values()
            ),
        )
        for key, name in counted
    ]
    several: tuple[_PairedMeasure, ...] = ()
    tests = max(item.tests for item in paired.values())
    if tests > 1:
        name = f"  after Holm's correction over {tests} runs"
        several = (("mcnemar_p_holm", name, "", _holm_cell),)
    shown: tuple[_PairedMeasure, ...] = (
        ("agreement", "Same letter (%)", "%", lambda i: percent_cell(i.agreement)),
        (
            "difference",
            "Difference, paired (points)",
            "points",
            lambda i: difference_cell(i.difference),
        ),
        (
            "interval",
            "  95% interval, bootstrap",
            "points",
            lambda i: interval_cell(i.difference.value, i.interval),
        ),
        (
            "macro",
            "Difference of macro accuracy (points)",
            "points",
            lambda i: points_cell(i.macro),
        ),
        (
            "macro_interval",
            "  95% interval, bootstrap within subjects",
            "points",
            lambda i: interval_cell(i.macro, i.macro_interval),
        ),
        ("mcnemar_p", "p, test of no difference (McNemar)", "", lambda i: p_cell(i.mcnemar_p)),
        *several,
        (
            "equivalence_p",
            f"p, test of ±{margin:g} points or more",
            "",
            lambda i: p_cell(i.equivalence_p),
        ),
        (
            "detectable",
            "Difference found 4 times in 5 (points)",
            "points",
            lambda i: Cell(f"{100 * i.detectable:.2f}", 100 * i.detectable),
        ),
    )
    rows += [
        Row(key, name, unit, tuple(make(item) for item in paired.values()))
        for key, name, unit, make in shown
    ]
    columns = tuple(
        Column(f"{labels[index]} against {first}", index, "difference") for index in paired
    )
    title = "MMLU, question by question" + (", common questions only" if common else "")
    return Table("paired", title, columns, tuple(rows))


def _holm_cell(item: PairedStatistics) -> Cell:
    return Cell() if item.mcnemar_holm is None else p_cell(item.mcnemar_holm)


def _common_rows(first: str, other: str, paired: Mapping[int, PairedStatistics]) -> list[Row]:
    """The accuracies behind a paired difference, over the common questions."""

    def row(key: str, name: str, share: Callable[[PairedCounts], int], macro: bool) -> Row:
        cells = []
        for item in paired.values():
            groups = [group.counts for group in item.subjects] if macro else [item.counts]
            shares = [share(counts) / counts.total for counts in groups]
            cells.append(percent_cell(math.fsum(shares) / len(shares)))
        return Row(key, name, "%", tuple(cells))

    def one(counts: PairedCounts) -> int:
        return counts.both + counts.only_first

    def two(counts: PairedCounts) -> int:
        return counts.both + counts.only_second

    words = "common questions (%)"
    return [
        Row(
            "common",
            "Common questions",
            "questions",
            tuple(Cell(f"{i.counts.total:,}", i.counts.total) for i in paired.values()),
        ),
        row("common_acc_first", f"{first}: micro, {words}", one, False),
        row("common_acc_second", f"{other}: micro, {words}", two, False),
        row("common_acc_macro_first", f"{first}: macro, {words}", one, True),
        row("common_acc_macro_second", f"{other}: macro, {words}", two, True),
    ]

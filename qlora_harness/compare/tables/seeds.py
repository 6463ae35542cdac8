"""The table of a measure over several seeds an arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from qlora_harness.compare.design import ArmSeeds, seed_difference
from qlora_harness.compare.tables.cells import percent_cell
from qlora_harness.compare.tables.number_text import signed
from qlora_harness.compare.tables.table import Cell, Column, Row, Table


def seeds_table(
    key: str,
    name: str,
    unit: str,
    write: Callable[[float], str],
    arms: Sequence[ArmSeeds],
    over_questions: Callable[[ArmSeeds, ArmSeeds], float | None] | None = None,
) -> Table:
    """Builds the table of a measure over seeds: means, spread, and what it does to differences.

    Args:
        key: Its name for programs.
        name: Its name for people.
        unit: Of its values.
        write: Writes a value.
        arms: From `design.seeds`.
        over_questions: Gives the standard error that the questions cause in the difference of two
            arms, the first subtracted, in the unit of the values; None for a measure that is none
            of questions.

    Returns:
        Rows of means and differences; ranges; the standard deviation between seeds, pooled where it
        is that of a difference; the relative standard error of each difference; the degrees of
        freedom of its standard error; and, where they are known, the standard error that the
        questions cause, and that of both.
    """
    first = arms[0]
    columns = [
        Column(f"{arm.name}, {len(arm.values)} seed{'s' * (len(arm.values) > 1)}", 0, "value")
        for arm in arms
    ]
    means = [Cell(write(arm.mean), arm.mean, arm.stderr, label=arm.name) for arm in arms]
    ranges = [
        replace(_range_cell(arm, write) if len(arm.values) > 1 else Cell(), label=arm.name)
        for arm in arms
    ]
    spreads = [_error_cell(arm.sd, write, arm) for arm in arms]
    relative = [Cell(label=arm.name) for arm in arms]
    freedom = [Cell(label=arm.name) for arm in arms]
    questions = [Cell(label=arm.name) for arm in arms]
    both = [Cell(label=arm.name) for arm in arms]
    for arm in arms[1:]:
        columns.append(Column(f"{arm.name} less {first.name}, ± of the seeds", 0, "difference"))
        change = seed_difference(first, arm, arms)
        text = signed(change.value, write)
        text += "" if change.stderr is None else f" ± {write(change.stderr)}"
        means.append(Cell(text, change.value, change.stderr, label=arm.name))
        ranges.append(Cell(label=arm.name))
        spread = f"{write(change.pooled_sd)} (pooled)"
        spreads.append(Cell(spread, change.pooled_sd, label=arm.name))
        share = change.relative_stderr
        relative.append(replace(Cell() if share is None else percent_cell(share), label=arm.name))
        freedom.append(Cell(str(change.freedom), change.freedom, label=arm.name))
        error = None if over_questions is None else over_questions(first, arm)
        questions.append(_error_cell(error, write, arm))
        if error is not None:
            error = None if change.stderr is None else math.hypot(error, change.stderr)
        both.append(_error_cell(error, write, arm))
    rows = [
        Row(key, f"{name}, mean", unit, tuple(means)),
        Row(f"{key}.range", "  range", unit, tuple(ranges)),
        Row(f"{key}.sd", "  standard deviation between seeds", unit, tuple(spreads)),
        Row(f"{key}.relative_stderr", "  relative standard error (seeds, %)", "%", tuple(relative)),
        Row(f"{key}.freedom", "  degrees of freedom", "", tuple(freedom)),
    ]
    if any(cell.value is not None for cell in questions):
        rows += [
            Row(f"{key}.questions", "  standard error, questions (paired)", unit, tuple(questions)),
            Row(f"{key}.both", "  standard error, seeds and questions", unit, tuple(both)),
        ]
    return Table(key, f"{name} over seeds", tuple(columns), tuple(rows))


def _error_cell(error: float | None, write: Callable[[float], str], arm: ArmSeeds) -> Cell:
    return Cell(label=arm.name) if error is None else Cell(write(error), error, label=arm.name)


def _range_cell(arm: ArmSeeds, write: Callable[[float], str]) -> Cell:
    text = f"{write(min(arm.values))} to {write(max(arm.values))}"
    return Cell(text, text)

"""The tables of the settings in which runs differ, and of those in which they don't."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from qlora_harness.compare.conditions import Conditions, Setting
from qlora_harness.compare.tables.table import Cell, Column, Row, Table
from qlora_harness.record import scrub

_HASH_SHOWN = 12


def settings_table(labels: Sequence[str], conditions: Conditions) -> Table:
    """Builds the table of every setting in which the runs differ.

    Args:
        labels: The names of the runs.
        conditions: Their conditions.
    """
    columns = tuple(Column(label, index, "value") for index, label in enumerate(labels))
    return Table(
        *("settings", "Settings that differ", columns, _rows(conditions.different)), numeric=False
    )


def shared_table(conditions: Conditions) -> Table:
    """Builds the table of every recorded setting in which the runs agree.

    Args:
        conditions: Their conditions.
    """
    columns = (Column("all runs", 0, "value"),)
    return Table(*("shared", "Settings that agree", columns, _rows(conditions.same)), numeric=False)


def _rows(settings: Sequence[Setting]) -> tuple[Row, ...]:
    return tuple(
        Row(
            setting.name,
            setting.name,
            "",
            tuple(_setting_cell(value) for value in setting.values),
        )
        for setting in settings
    )


def _setting_cell(value: object) -> Cell:
    if value is None:
        return Cell()
    if isinstance(value, (bool, list)):
        text = json.dumps(value, ensure_ascii=False)
        return Cell(text, text)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return Cell(str(value), value)
    text = scrub(str(value))
    return Cell(_shorten_hash(text), text)


def _shorten_hash(text: str) -> str:
    kind, _, digits = text.rpartition(":")
    is_hash = len(digits) in (40, 64) and all(digit in "0123456789abcdef" for digit in digits)
    if not is_hash:
        return text
    return f"{kind}:{digits[:_HASH_SHOWN]}…" if kind else f"{digits[:_HASH_SHOWN]}…"

"""The table that separates quantisation from fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qlora_harness.compare.design import Effect
from qlora_harness.compare.intersection import common_words
from qlora_harness.compare.statistics import Difference
from qlora_harness.compare.tables.cells import difference_cell
from qlora_harness.compare.tables.table import Column, Row, Table


def design_table(found: Sequence[Effect], common: int | None = None) -> Table:
    """Builds the table that separates quantisation from fine-tuning.

    Args:
        found: From `design.effects`.
        common: The number of questions that all runs have in common, where they did not answer
            the same ones.
    """
    how = "paired" if all(effect.paired for effect in found) else "unpaired"
    rows = tuple(
        Row(
            effect.key,
            effect.name,
            "points",
            (
                replace(
                    difference_cell(Difference(effect.value, effect.stderr, effect.paired)),
                    label=effect.run,
                ),
            ),
        )
        for effect in found
    )
    columns = (Column(f"accuracy, micro (points, {how})", 0, "difference"),)
    title = f"What the 4 bits cost and what fine-tuning gains{common_words(common)}"
    return Table("design", title, columns, rows)

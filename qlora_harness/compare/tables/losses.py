"""The table of losses on the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_harness.compare.losses import LossDifference
from qlora_harness.compare.paired import Interval
from qlora_harness.compare.tables.number_text import decimals, signed
from qlora_harness.compare.tables.table import NOTHING, Cell, Column, Row, Table


def losses_table(
    labels: Sequence[str],
    differences: Mapping[int, LossDifference],
    perplexities: Mapping[int, Interval],
) -> Table:
    """Builds the table of loss differences with intervals over conversations.

    Args:
        labels: The names of the runs.
        differences: For each later run, by index, its losses against the first run.
        perplexities: Interval of the perplexity of each run, by index, where it is known.
    """

    def row(key: str, name: str, unit: str, cells: Mapping[int, Cell]) -> Row:
        return Row(key, name, unit, tuple(cells.get(i, Cell()) for i in (0, *differences)))

    write = decimals(4)
    nats = "nats/token"
    count = next(iter(differences.values())).conversations

    def change(value: float | None) -> Cell:
        return Cell() if value is None else Cell(signed(value, write), value)

    intervals = {
        i: Cell(
            f"{signed(d.interval.low, write)} to {signed(d.interval.high, write)}",
            d.evaluation,
            None,
            (d.interval.low, d.interval.high),
        )
        for i, d in differences.items()
        if d.interval is not None
    }
    rows = [
        row(
            "perplexity_interval",
            "Perplexity, 95% interval",
            "",
            {
                i: Cell(f"{p.low:.3f} to {p.high:.3f}", None, None, (p.low, p.high))
                for i, p in perplexities.items()
            },
        ),
        row(
            "eval_difference",
            "Evaluation loss, difference",
            nats,
            {i: change(d.evaluation) for i, d in differences.items()},
        ),
        row("eval_interval", "  95% interval, bootstrap", nats, intervals),
        row(
            "steps_difference",
            "Training loss, mean difference of steps",
            nats,
            {i: change(d.steps) for i, d in differences.items()},
        ),
        row(
            "last_steps_difference",
            "  of the last tenth",
            nats,
            {i: change(d.last_steps) for i, d in differences.items()},
        ),
    ]
    columns = [Column(labels[0], 0, "value")]
    columns += [Column(labels[i], i, "difference") for i in differences]
    title = "Losses on the same data" + (f", {count:,} conversations" if count else "")
    shown = tuple(r for r in rows if any(cell.text != NOTHING for cell in r.cells))
    return Table("losses", title, tuple(columns), shown)

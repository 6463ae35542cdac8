"""A comparison written for the terminal, as Markdown and as JSON, from the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from textwrap import fill
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from qlora_harness.compare.answers import Source
from qlora_harness.compare.column_widths import break_words, fit_columns, longest_word
from qlora_harness.compare.evidence import Evidence
from qlora_harness.compare.intersection import Intersection, Tally
from qlora_harness.compare.output import PrintableText
from qlora_harness.compare.tables.table import NOTHING, Cell, Column, Row, Table, cell_label
from qlora_harness.record import SCHEMA_VERSION

KIND = "comparison"
MARKDOWN_TITLE = "# Comparison of "
# What rich puts between two columns of a SIMPLE_HEAD table, characters.
_COLUMN_GAP = 3
# What the names of rows, and then every column, may be narrowed to, characters.
_NAMES_AT_LEAST = 32
_AT_LEAST = 6


@dataclass(frozen=True)
class RunInfo:
    """Which run a label stands for.

    Attributes:
        label: Its name in the tables.
        path: The folder or file it was read from.
        model: The model, if recorded.
        quant: "nf4", "fp4" or "bf16", if recorded.
        device: The device it was trained on, if recorded.
        status: Status of its training, None if it was not trained here.
        evaluation: The file its evaluation was read from, if any.
        answers: Where its answers question by question came from: "samples" or "mmlu_progress";
            None if there are none.
    """

    label: str
    path: str
    model: str | None
    quant: str | None
    device: str | None
    status: str | None
    evaluation: str | None
    answers: Source | None


@dataclass(frozen=True)
class Comparison:
    """Everything a comparison says.

    Attributes:
        created: When it was made, ISO 8601.
        runs: The runs; differences are against the first.
        family: The MMLU task family compared, if any.
        tables: The tables of numbers.
        details: Long tables, which the terminal does not show.
        settings: The table of settings that differ.
        shared: The table of settings in which all agree; only the page shows it.
        notes: What has to be known before quoting a number.
        verdict: One sentence for each run but the first.
        evidence: What lies behind the numbers, for figures; JSON and Markdown don't hold it.
        intersection: What each later run has in common with the first; None without --intersect.
    """

    created: str
    runs: tuple[RunInfo, ...]
    family: str | None
    tables: tuple[Table, ...]
    details: tuple[Table, ...]
    settings: Table
    shared: Table
    notes: tuple[str, ...]
    verdict: tuple[str, ...]
    evidence: Evidence
    intersection: tuple[Intersection, ...] | None = None


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Returns the comparison as JSON values.

    Args:
        comparison: The comparison.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "created": comparison.created,
        "runs": [vars(run) for run in comparison.runs],
        "task": comparison.family,
        "intersection": (
            None
            if comparison.intersection is None
            else [_intersection_to_json(item) for item in comparison.intersection]
        ),
        "tables": [
            _table_to_json(table, comparison.runs)
            for table in (*comparison.tables, *comparison.details)
        ],
        "settings_that_differ": _table_to_json(comparison.settings, comparison.runs),
        "settings_that_agree": len(comparison.shared.rows),
        "notes": list(comparison.notes),
        "verdict": list(comparison.verdict),
    }


def _intersection_to_json(item: Intersection) -> dict[str, Any]:
    def counts(tally: Tally) -> dict[str, int]:
        return vars(tally)

    return {
        "baseline": item.baseline,
        "run": item.run,
        **counts(item.total),
        "tasks": [
            {"task": f"{item.family}_{subject}", **counts(tally)}
            for subject, tally in item.by_subject.items()
        ],
    }


def _table_to_json(table: Table, runs: Sequence[RunInfo]) -> dict[str, Any]:
    labels = [run.label for run in runs]
    return {
        "key": table.key,
        "title": table.title,
        "rows": [
            {
                "key": row.key,
                "name": row.name,
                "unit": row.unit,
                "cells": [
                    {
                        "run": cell_label(column, cell, labels),
                        "kind": column.kind,
                        "value": cell.value,
                        "stderr": cell.stderr,
                        "interval": cell.interval,
                        "text": cell.text,
                    }
                    for column, cell in zip(table.columns, row.cells, strict=True)
                ],
            }
            for row in table.rows
        ],
    }


def to_markdown(comparison: Comparison) -> str:
    """Returns the comparison as GitHub Markdown.

    Args:
        comparison: The comparison.
    """
    labels = [_escape(run.label) for run in comparison.runs]
    lines = [f"{MARKDOWN_TITLE}{', '.join(labels)}", ""]
    lines += [f"- {_escape(line)}" for line in run_lines(comparison)]
    for table in (*comparison.tables, *comparison.details):
        lines += ["", f"## {_escape(table.title)}", "", *_markdown_table(table)]
    lines += ["", _against(labels[0])]
    lines += ["", f"## {comparison.settings.title}", ""]
    if comparison.settings.rows:
        lines += [*_markdown_table(comparison.settings), ""]
    lines.append(same_line(comparison))
    for title, texts in (("Notes", comparison.notes), ("In words", comparison.verdict)):
        if texts:
            lines += ["", f"## {title}", "", *(f"- {_escape(text)}" for text in texts)]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> Iterator[str]:
    align = "---:" if table.numeric else ":---"
    yield _markdown_row(["", *(column.heading for column in table.columns)])
    yield f"|{'|'.join([':---', *(align for _ in table.columns)])}|"
    for row in table.rows:
        line = _markdown_row([row.name, *(cell.text for cell in row.cells)])
        yield line.replace("| ", "| &emsp;", 1) if row.under else line


def _markdown_row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(_escape(text) for text in texts)} |"


def _escape(text: str) -> str:
    """Keeps a value from ending its cell or turning into markup."""
    for sign in "\\|`*_<>[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints the comparison.

    Args:
        console: Where to; its width decides how many runs stand side by side.
        comparison: The comparison.
    """
    for line in run_lines(comparison):
        console.print(PrintableText(line))
    for table in comparison.tables:
        _print_table(table, console)
    console.print()
    console.print(PrintableText(_against(comparison.runs[0].label)))
    if comparison.settings.rows:
        _print_table(comparison.settings, console)
    console.print()
    console.print(PrintableText(same_line(comparison)))
    for title, texts in (("Notes", comparison.notes), ("In words", comparison.verdict)):
        if texts:
            console.print()
            console.print(PrintableText(title, style="bold"))
            for text in texts:
                console.print(PrintableText(f"- {text}"))


def _print_table(table: Table, console: Console) -> None:
    hidden = 0
    if table.terminal_rows is not None:
        hidden = len(table.rows) - table.terminal_rows
        table = replace(table, rows=table.rows[: table.terminal_rows])
    for part in split_table(table, console.width):
        shown = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        names, *widths = _widths(part, console.width)
        # Long dotted names and paths are folded, never cut: a cut value can't be told from another.
        shown.add_column("", width=names, overflow="fold")
        for column, width in zip(part.columns, widths, strict=True):
            shown.add_column(
                PrintableText(break_words(column.heading, width)),
                width=width,
                justify="right" if part.numeric else "left",
                overflow="fold",
            )
        for row in part.rows:
            cells = zip(row.cells, widths, strict=True)
            shown.add_row(
                PrintableText(_name_text(row, names)),
                *(PrintableText(break_words(cell.text, width)) for cell, width in cells),
            )
        console.print()
        console.print(PrintableText(part.title, style="bold"))
        console.print(shown)
    if hidden > 0:
        console.print(PrintableText(f"({hidden} more rows, by task, in the files)"))


def _widths(table: Table, width: int) -> list[int]:
    """Returns the width of the names and of each column, so that words and cells stay whole."""
    names = [row.name for row in table.rows]
    columns = [
        (column.heading, [row.cells[i].text for row in table.rows])
        for i, column in enumerate(table.columns)
    ]
    longest = max(map(len, names), default=0)
    natural = [longest, *(max(map(len, (heading, *cells))) for heading, cells in columns)]
    whole_cells = [_column_width(table, i) - _COLUMN_GAP for i in range(len(columns))]
    words = [longest_word([heading, *cells]) for heading, cells in columns]
    short_names = _names_width(table)
    name_words = longest_word(names)
    stages = (
        [longest, *whole_cells],
        [short_names, *whole_cells],
        [name_words, *whole_cells],
        [name_words, *words],
        [min(size, _AT_LEAST) for size in (name_words, *words)],
    )
    return fit_columns(natural, stages, width - _COLUMN_GAP * len(columns))


def _name_text(row: Row, width: int) -> str:
    """Returns the name of a row; of one under another, also its further lines are indented."""
    if not row.under or len(row.name) <= width or width < 12:
        return break_words(row.name, width)
    return fill(row.name.strip(), width, initial_indent="  ", subsequent_indent="    ")


def _names_width(table: Table) -> int:
    names = [row.name for row in table.rows]
    longest = max(map(len, names), default=0)
    return max(longest_word(names), min(longest, _NAMES_AT_LEAST))


def split_table(table: Table, width: int) -> Iterator[Table]:
    """Splits a table so that each part fits the terminal; the first run stands in each part.

    Args:
        table: The table.
        width: Width of the terminal, characters.

    Yields:
        Tables with the rows of the given one and a part of its runs, at least one beside the first.
        Runs without a number in the table are left out.
    """
    fixed = [index for index, column in enumerate(table.columns) if column.run == 0]
    groups: dict[int, list[int]] = {}
    for index, column in enumerate(table.columns):
        if column.run != 0:
            groups.setdefault(column.run, []).append(index)
    if table.numeric:
        groups = {run: group for run, group in groups.items() if not _is_empty(table, group)}
    taken = _names_width(table) + sum(_column_width(table, index) for index in fixed)
    part, used = list(fixed), taken
    for group in groups.values():
        needed = sum(_column_width(table, index) for index in group)
        if part != fixed and used + needed > width:
            yield _select(table, part)
            part, used = list(fixed), taken
        part += group
        used += needed
    yield _select(table, part)


def _is_empty(table: Table, columns: Sequence[int]) -> bool:
    return all(row.cells[index].text == NOTHING for row in table.rows for index in columns)


def _column_width(table: Table, index: int) -> int:
    words = table.columns[index].heading.split()
    texts = [row.cells[index].text for row in table.rows]
    return max(map(len, [*words, *texts])) + _COLUMN_GAP


def _select(table: Table, indices: Sequence[int]) -> Table:
    columns: tuple[Column, ...] = tuple(table.columns[index] for index in indices)

    def cells(row: Row) -> tuple[Cell, ...]:
        return tuple(row.cells[index] for index in indices)

    rows = tuple(Row(row.key, row.name, row.unit, cells(row)) for row in table.rows)
    if not table.numeric:
        # A setting that differs somewhere need not differ between the runs of this part.
        rows = tuple(row for row in rows if len({cell.text for cell in row.cells}) > 1)
    return Table(table.key, table.title, columns, rows, table.numeric)


def run_lines(comparison: Comparison) -> Iterator[str]:
    """Returns a line for each run: where it is, and what it is.

    Args:
        comparison: The comparison.
    """
    for run in comparison.runs:
        details = [run.path, run.model, run.quant, run.device]
        if run.status is not None:
            details.append(f"training {run.status}")
        if run.evaluation is not None:
            details.append(f"evaluation from {run.evaluation}")
        yield f"{run.label}: {'; '.join(detail for detail in details if detail)}"


def _against(label: str) -> str:
    return f"Differences (Δ) and ratios (×) are against {label}."


def same_line(comparison: Comparison) -> str:
    """Returns how many recorded settings do not differ.

    Args:
        comparison: The comparison.
    """
    count = f"{len(comparison.shared.rows):,} recorded settings"
    if comparison.settings.rows:
        return f"The same otherwise ({count})."
    return f"No recorded setting differs ({count})."

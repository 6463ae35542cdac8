"""The answer and its details for a terminal, and both as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from qlora_harness.compare.numbers import difference, interval, value, word
from qlora_harness.compare.record import ComparisonRecord, Contrast, Endpoint
from qlora_harness.compare.tables import Table, tables
from qlora_harness.compare.verdict import sentences, verdict
from qlora_harness.results.scored import DEFAULT_TASK
from qlora_harness.results.terminal import NOTHING

LINES, COLUMNS = 12, 80
_DETAILS = 120  # columns
MARKDOWN_TITLE = "# What do the 4 bits cost?"
_HEADLINES = ("memory", "time", "eval_loss", "accuracy", "nll")
_MARKS = {"better": "✓", "worse": "✗", "same": "≈", "unclear": "?", "no measurement": ""}


def title(comparison: ComparisonRecord) -> str:
    """Returns what was compared, in a line."""
    primary = comparison.primary
    names = "nothing"
    if len(primary) == 1:
        names = f"{primary[0].arm} vs {primary[0].baseline}"
    elif primary:
        several = len({item.baseline for item in primary}) > 1
        baseline = "their bf16 arms" if several else primary[0].baseline
        names = f"{len(primary)} arms vs {baseline}"
    dataset = (comparison.dataset or "").rpartition("/")[2].partition(".")[0]
    parts = [names, (comparison.model or "").rpartition("/")[2], dataset]
    seeds = {count for item in primary for count in item.seeds}
    if seeds and max(seeds) > 1:
        parts.append(f"{'–'.join(map(str, sorted({min(seeds), max(seeds)})))} seeds per arm")
    if comparison.questions is not None:
        task = "" if comparison.task == DEFAULT_TASK else f"{comparison.task}, "
        parts.append(f"{task}{comparison.questions:,} questions")
    return " · ".join(part for part in parts if part)


def answer(comparison: ComparisonRecord) -> str:
    """Returns the answer: at most 12 lines of 80 columns."""
    lines = [_cut(title(comparison))]
    primary = comparison.primary
    if len(primary) == 1:
        lines += _one(primary[0])
    elif primary:
        lines += _many(primary)
    # Whole sentences only, the most important first.
    for sentence in sentences(comparison):
        wrapped = textwrap.wrap(sentence, COLUMNS, break_long_words=True)
        if len(lines) + len(wrapped) <= LINES:
            lines += wrapped
    return "\n".join(lines)


def differences_line(comparison: ComparisonRecord) -> str:
    """Returns what differs besides quantisation, in a line."""
    if not comparison.besides:
        return "Nothing recorded differs besides quantisation and seed."
    return _cut(f"Besides quantisation, these differ: {', '.join(comparison.besides)}.")


def _cut(line: str, columns: int = COLUMNS) -> str:
    return line if len(line) <= columns else f"{line[: columns - 1]}…"


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Rows as lines; columns align right unless in `left`, and the first is cut if need be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], max(8, COLUMNS - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for row in rows:
        cells = [
            f"{_cut(text, width):<{width}}" if column in left else f"{text:>{width}}"
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(_cut("  ".join(cells).rstrip()))
    return lines


def _one(item: Contrast) -> list[str]:
    """The two arms side by side."""
    endpoints = [item.endpoints[key] for key in _HEADLINES if key in item.endpoints]
    lines = _side_by_side(item, endpoints, [word(one) for one in endpoints])
    if max(map(len, lines)) == COLUMNS:  # probably cut: leave the margins out
        lines = _side_by_side(item, endpoints, [one.word for one in endpoints])
    for row, one in enumerate(endpoints, start=1):
        if one.word == "no measurement":
            start = lines[row][: lines[0].index("difference")]
            lines[row] = _cut(f"{start}no measurement: {one.reason}")
    return lines


def _side_by_side(item: Contrast, endpoints: Sequence[Endpoint], words: Sequence[str]) -> list[str]:
    rows = [["", _cut(item.arm, 11), _cut(item.baseline, 11), "difference", "95% interval", ""]]
    for one, shown in zip(endpoints, words, strict=True):
        values = [value(one, one.arm), value(one, one.baseline)]
        last = "" if one.word == "no measurement" else shown
        rows.append([one.name, *values, difference(one), interval(one), last])
    return _aligned(rows, (0, 4, 5))


def _many(items: Sequence[Contrast]) -> list[str]:
    """One line for each arm."""
    known = {key: [item[key] for item in items if key in item.endpoints] for key in _HEADLINES}
    known = {key: endpoints for key, endpoints in known.items() if endpoints}
    rows = [["", *(endpoints[0].name.removeprefix("peak ") for endpoints in known.values())]]
    if len({item.baseline for item in items}) == 1:
        values = [
            next((value(e, e.baseline) for e in endpoints if e.baseline is not None), NOTHING)
            for endpoints in known.values()
        ]
        rows.append([items[0].baseline, *values])
    room = LINES - 4
    for item in items[: room if len(items) <= room else room - 1]:
        rows.append([item.arm, *(_cell(item.measured(key)) for key in known)])
    lines = _aligned(rows, (0,))
    if len(items) > room:
        lines.append(f"… and {len(items) - room + 1} more arms (see --details)")
    return [*lines, "✓ better  ✗ worse  ≈ same within the margin  ? unclear  – no measurement"]


def _cell(endpoint: Endpoint | None) -> str:
    if endpoint is None:
        return NOTHING
    return f"{difference(endpoint)} {_MARKS[endpoint.word]}".rstrip()


def markdown(comparison: ComparisonRecord) -> str:
    """Returns everything as Markdown."""
    lines = answer(comparison).replace("```", "'''")
    parts = [MARKDOWN_TITLE, f"```text\n{lines}\n```", _escaped(verdict(comparison)),
             _escaped(differences_line(comparison))]  # fmt: skip
    if comparison.notes:
        parts.append("\n".join(f"- {_escaped(note)}" for note in comparison.notes))
    for table in tables(comparison):
        parts += [f"## {_escaped(table.title)}", _markdown_table(table)]
    runs = "\n".join(f"- {_escaped(run.label)}: {_escaped(run.path)}" for run in comparison.runs)
    parts += [runs, f"Made by `qlora-harness compare`, {comparison.created}."]
    return "\n\n".join(parts) + "\n"


def details(comparison: ComparisonRecord) -> str:
    """Returns notes and all tables for a terminal."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    stream = StringIO()
    console = Console(file=stream, width=max(_DETAILS, Console().width), highlight=False)
    for note in comparison.notes:
        console.print(Text(f"Note: {note}"))
    for table in tables(comparison):
        console.print(Text(f"\n{table.title}"))
        shown = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for number, column in enumerate(table.columns):
            right = table.numeric and number > 0
            shown.add_column(Text(column), justify="right" if right else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
    return stream.getvalue().rstrip("\n")


def _markdown_table(table: Table) -> str:
    side = "--:" if table.numeric else "---"
    rules = ["---", *[side] * (len(table.columns) - 1)]
    rows = [map(_escaped, table.columns), rules, *(map(_escaped, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _escaped(text: str) -> str:
    """Escapes Markdown in texts from records."""
    for mark in "\\|`*_<[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())

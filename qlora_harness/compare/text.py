"""The answer for a terminal, and everything as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from qlora_harness.compare.methods import methods
from qlora_harness.compare.numbers import difference, interval, plus_minus, value, word
from qlora_harness.compare.record import ComparisonRecord, Contrast, Endpoint
from qlora_harness.compare.tables import Table, tables
from qlora_harness.compare.verdict import sentences, verdict
from qlora_harness.results.scored import DEFAULT_TASK
from qlora_harness.results.terminal import NOTHING

LINES, COLUMNS = 12, 80
MARKDOWN_TITLE = "# What do the 4 bits cost?"
_ROWS = 6  # of arms
_COLUMNS = ("memory", "eval_loss", "accuracy", "nll")
_HEADLINES = ("memory", "time", "eval_loss", "accuracy", "nll")
_MARKS = {"better": "✓", "worse": "✗", "same": "≈", "unclear": "?", "no measurement": ""}
_LEGEND = "✓ better  ✗ worse  ≈ same  ? unclear  – not measured"


def title(comparison: ComparisonRecord, columns: int | None = None) -> str:
    """Returns what was compared, in a line; without the data if it is longer than `columns`."""
    primary = comparison.primary
    names = "nothing"
    if len(primary) == 1:
        names = f"{primary[0].arm} vs {primary[0].baseline}"
    elif primary:
        several = len({item.baseline for item in primary}) > 1
        baseline = "their bf16 arms" if several else primary[0].baseline
        names = f"{len(primary)} arms vs {baseline}"
    parts = [names, _seeds(primary)]
    if comparison.questions is not None:
        task = "" if comparison.task == DEFAULT_TASK else f"{comparison.task}, "
        parts.append(f"{task}{comparison.questions:,} questions")
    parts.append((comparison.model or "").rpartition("/")[2].removesuffix(".gguf"))
    parts.append((comparison.dataset or "").rpartition("/")[2].partition(".")[0])
    shown = [part for part in parts if part]
    line = " · ".join(shown)
    if columns is not None and len(line) > columns and parts[-1]:
        return " · ".join(shown[:-1])
    return line


def _seeds(primary: Sequence[Contrast]) -> str:
    """How many seeds each arm has; "" for one each."""
    counts = {seeds for item in primary for seeds in item.seeds}
    if max(counts, default=1) == 1:
        return ""
    least, most = min(counts), max(counts)
    return f"{most if least == most else f'{least}–{most}'} seeds per arm"


def answer(comparison: ComparisonRecord) -> str:
    """Returns the answer: at most 12 lines of 80 columns, and one for each other task."""
    lines = [_cut(title(comparison, COLUMNS))]
    primary, most = comparison.primary, LINES + len(comparison.benchmarks)
    if len(primary) == 1:
        lines += _one(primary[0], comparison.benchmarks)
    elif primary:
        lines += _many(comparison)
    # Whole sentences only, the most important first.
    for sentence in sentences(comparison):
        wrapped = textwrap.wrap(sentence, COLUMNS, break_long_words=True)
        if len(lines) + len(wrapped) <= most:
            lines += wrapped
    return "\n".join(lines)


def differences_line(comparison: ComparisonRecord, columns: int | None = None) -> str:
    """Returns what differs besides quantisation, in a line; as many names as fit into `columns`."""
    names = comparison.besides
    if not names:
        return "Nothing recorded differs besides quantisation and seed."
    for count in range(len(names), 0, -1):
        more = "" if count == len(names) else f" and {len(names) - count} more"
        line = f"Besides quantisation, these differ: {', '.join(names[:count])}{more}."
        if columns is None or len(line) <= columns:
            break
    return line


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


def _one(item: Contrast, benchmarks: Sequence[str]) -> list[str]:
    """The two arms side by side."""
    endpoints = [item.endpoints[key] for key in _HEADLINES if key in item.endpoints]
    endpoints += [one.model_copy(update={"name": one.key}) for one in _on(item, benchmarks)]
    lines = _side_by_side(item, endpoints, [word(one) for one in endpoints])
    if max(map(len, lines)) == COLUMNS:  # probably cut: leave the margins out
        lines = _side_by_side(item, endpoints, [one.word for one in endpoints])
    for row, one in enumerate(endpoints, start=1):
        if one.word == "no measurement":
            start = lines[row][: lines[0].index("difference")]
            lines[row] = _cut(f"{start}no measurement: {one.reason}")
    return lines


def _on(item: Contrast, benchmarks: Sequence[str]) -> list[Endpoint]:
    return [one for key in benchmarks if (one := item.measured(key))]


def _side_by_side(item: Contrast, endpoints: Sequence[Endpoint], words: Sequence[str]) -> list[str]:
    rows = [["", _cut(item.arm, 11), _cut(item.baseline, 11), "difference", "95% interval", ""]]
    for one, shown in zip(endpoints, words, strict=True):
        values = [value(one, one.arm), value(one, one.baseline)]
        last = "" if one.word == "no measurement" else shown
        rows.append([one.name, *values, difference(one), interval(one), last])
    return _aligned(rows, (0, 4, 5))


def _many(comparison: ComparisonRecord) -> list[str]:
    """A line for each arm, by dose, and one for the baseline."""
    items, headline = comparison.primary, comparison.headline
    firsts = [next((i[key] for i in items if key in i.endpoints), None) for key in _COLUMNS]
    known = [one for one in firsts if one]
    heads = ["", *(f"{one.name}{', pts' if one.unit == 'share' else ''}" for one in known)]
    shown = items if len(items) <= _ROWS else items[: _ROWS - 1]
    last = []
    if len({item.baseline for item in items}) == 1:
        values = [headline.measured(one.key) for one in known]
        last = [[headline.baseline, *(value(e, e.baseline) if e else NOTHING for e in values)]]
    forms = {"± joint 95% interval  ": plus_minus, "": difference}  # the second is narrower
    cells = {
        legend: [[i.arm, *(_cell(i.measured(one.key), form) for one in known)] for i in shown]
        for legend, form in forms.items()
    }
    legend = next((name for name in forms if _width([heads, *cells[name], *last]) <= COLUMNS), "")
    lines = _aligned([heads, *cells[legend], *last], (0,))
    if len(shown) < len(items):
        lines.insert(1 + len(shown), f"… and {len(items) - len(shown)} more arms")
    for task in comparison.benchmarks:
        texts = [f"{i.arm} {_cell(one, difference)}" for i in shown for one in _on(i, [task])]
        lines += [_cut(f"{task}: {', '.join(texts)}")] if texts else []
    return [*lines, legend + _LEGEND]


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Columns of a table whose first column may be cut to 16."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return min(first, 16) + sum(others) + 2 * len(others)


def _cell(endpoint: Endpoint | None, shown: Callable[[Endpoint], str]) -> str:
    if endpoint is None:
        return NOTHING
    word = "unclear" if endpoint.letters else endpoint.word
    return f"{shown(endpoint)} {_MARKS[word]}".rstrip()


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
    if paragraph := methods(comparison.source.runs):
        parts += ["## Methods", _escaped(paragraph)]
    parts += [runs, f"Made by `qlora-harness compare`, {comparison.created}."]
    return "\n\n".join(parts) + "\n"


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

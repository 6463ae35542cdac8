"""`qlora-harness runs` and `qlora-harness show RUN`: what lies in the results folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from qlora_harness.compare import fields
from qlora_harness.compare.column_widths import break_words, fit_columns, longest_word
from qlora_harness.compare.evaluation import CATEGORIES, DEFAULT_FAMILY
from qlora_harness.compare.output import PrintableText
from qlora_harness.compare.tables.number_text import duration
from qlora_harness.compare.tables.table import NOTHING
from qlora_harness.compare.tables.training import GIB
from qlora_harness.errors import ResultsError
from qlora_harness.record import EVALUATION_FILE, SUMMARY_FILE

_RECORDS = (SUMMARY_FILE, EVALUATION_FILE)
_COLUMNS = ("run", "model", "data", "base", "status", "GiB", "loss", "MMLU %")
_NUMBERS = ("GiB", "loss", "MMLU %")
# What has to be an object in a record, where it is there.
_OBJECTS = (
    "model",
    "settings",
    "computation",
    "memory",
    "runtime",
    "throughput",
    "results",
    "environment",
    "tasks",
)
# What the columns get at least, characters, however narrow the terminal is.
_FEWEST = 6


@dataclass(frozen=True)
class _Record:
    """One record of a run: the file and what it holds; nothing where there is no file."""

    path: Path
    content: Mapping[str, Any]

    def text(self, *keys: str) -> str | None:
        return fields.optional_text(self.content, self.path, *keys)

    def amount(self, *keys: str) -> float | None:
        return fields.optional_amount(self.content, self.path, *keys)

    def number(self, *keys: str) -> float | None:
        return fields.optional_number(self.content, self.path, *keys)

    def count(self, *keys: str) -> int | None:
        return fields.optional_count(self.content, self.path, *keys)

    def mapping(self, *keys: str) -> Mapping[str, Any]:
        return fields.optional_mapping(self.content, self.path, *keys)

    def random_weights(self) -> bool:
        return self.mapping("model").get("random_weights") is True


def find_runs(folder: Path) -> list[Path]:
    """Returns the run folders below a folder, in the order of their paths.

    Args:
        folder: For example results.

    Raises:
        ResultsError: It does not exist, or holds no run.
    """
    if not folder.is_dir():
        raise ResultsError(f"{folder} does not exist", "Name the folder that holds the runs")
    found = sorted({path.parent for name in _RECORDS for path in folder.rglob(name)})
    if not found:
        raise ResultsError(
            f"{folder} holds no run (no {' or '.join(_RECORDS)})",
            "Train one with `accelerate launch launch/train.py`, or name another folder",
        )
    return found


def print_runs(folder: Path, console: Console) -> None:
    """Prints one line a run: model, data, base, status, peak memory, evaluation loss, accuracy.

    Args:
        folder: For example results.
        console: Where to.

    Raises:
        ResultsError: There is no run.
    """
    rows, broken = [], []
    for path in find_runs(folder):
        try:
            rows.append(_line(path, folder))
        except ResultsError as error:
            broken.append(str(error))
    if rows:
        console.print(_runs_table(rows, console.width))
    for problem in broken:
        console.print(PrintableText(f"Not listed: {problem}"))


def _runs_table(rows: list[list[str]], width: int) -> RichTable:
    """Builds the table: columns are narrowed at spaces first, and within words only at last."""
    columns = [[name, *(row[i] for row in rows)] for i, name in enumerate(_COLUMNS)]
    natural = [max(map(len, texts)) for texts in columns]
    words = [longest_word(texts) for texts in columns]
    # A narrow gap, before a word is broken for a wide one.
    gap = 2 if sum(words) + 2 * (len(columns) - 1) <= width else 1
    fewest = [min(_FEWEST, size) for size in words]
    widths = fit_columns(natural, (words, fewest), width - gap * (len(columns) - 1))
    shown = RichTable(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for name, size in zip(_COLUMNS, widths, strict=True):
        shown.add_column(
            name, width=size, justify="right" if name in _NUMBERS else "left", overflow="fold"
        )
    for row in rows:
        shown.add_row(
            *(
                PrintableText(break_words(text, size))
                for text, size in zip(row, widths, strict=True)
            )
        )
    return shown


def _line(path: Path, folder: Path) -> list[str]:
    summary, evaluation = _read(path)
    name = str(path.relative_to(folder)) if path != folder else path.name
    model = summary.text("model", "name") or evaluation.text("model", "base")
    random = summary.random_weights() or evaluation.random_weights()
    quant = summary.text("quant") or evaluation.text("model", "quant")
    return [
        name,
        f"{model or NOTHING}{' (random weights)' if random else ''}",
        summary.text("settings", "dataset") or NOTHING,
        quant or NOTHING,
        summary.text("status") or "scored",
        _peak(summary),
        _number(summary.number("results", "eval_loss"), "{:.3f}"),
        _accuracy(evaluation),
    ]


def _read(path: Path) -> tuple[_Record, _Record]:
    """Reads the records that are there, of this kind and schema."""
    found = []
    for name in _RECORDS:
        file = path / name
        kind = name.removesuffix(".json")
        record = _Record(file, fields.read_record(file, kind) if file.is_file() else {})
        for key in _OBJECTS:
            record.mapping(key)
        found.append(record)
    summary, evaluation = found
    for family in evaluation.mapping("tasks"):
        evaluation.mapping("tasks", family)
    return summary, evaluation


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _peak(summary: _Record) -> str:
    gpu = summary.amount("memory", "peak_needed_bytes")
    if gpu is None:  # of an earlier version
        gpu = summary.amount("memory", "peak_allocated_bytes")
    cpu = summary.amount("memory", "cpu_peak_rss_bytes")
    if gpu is not None:
        return f"{gpu / GIB:.2f}"
    return NOTHING if cpu is None else f"{cpu / GIB:.2f} CPU"


def _gib(summary: _Record, name: str) -> str:
    size = summary.amount("memory", name)
    return NOTHING if size is None else f"{size / GIB:.2f}"


def _accuracy(evaluation: _Record) -> str:
    tasks = evaluation.mapping("tasks")
    if not tasks:
        return NOTHING
    family = DEFAULT_FAMILY if DEFAULT_FAMILY in tasks else next(iter(tasks))
    acc = fields.share(evaluation.content, evaluation.path, "tasks", family, "acc")
    text = f"{100 * acc:.2f}"
    n, n_total = _questions(evaluation, family)
    part = "" if n == n_total else f", {n} of {n_total}"
    short = family.removeprefix("mmlu_qlora_")
    return text if family == DEFAULT_FAMILY and not part else f"{text} ({short}{part})"


def _questions(evaluation: _Record, family: str) -> tuple[int, int]:
    n, n_total = (
        fields.count(evaluation.content, evaluation.path, "tasks", family, name)
        for name in ("n", "n_total")
    )
    return n, n_total


def print_run(path: Path, console: Console) -> None:
    """Prints what is recorded of one run.

    Args:
        path: The run folder.
        console: Where to.

    Raises:
        ResultsError: It holds no record, or a broken one; nothing is printed then.
    """
    if not any((path / name).is_file() for name in _RECORDS):
        raise ResultsError(
            f"{path} holds no {' or '.join(_RECORDS)}",
            "Name a run folder; `qlora-harness runs` lists them",
        )
    summary, evaluation = _read(path)
    for title, rows in [*_training_sections(summary), *_evaluation_sections(evaluation)]:
        listed = [(name, value) for name, value in rows if value not in (None, NOTHING)]
        if not listed:
            continue
        width = max(len(name) for name, _ in listed)
        console.print()
        console.print(PrintableText(title, style="bold"))
        for name, value in listed:
            console.print(PrintableText(f"{name:<{width}}  {value}"), soft_wrap=True)


_Section = tuple[str, list[tuple[str, object]]]


def _training_sections(summary: _Record) -> Iterator[_Section]:
    if not summary.content:
        return
    seconds = summary.amount("runtime", "train_seconds")
    yield (
        "Training",
        [
            ("status", summary.text("status")),
            ("base", summary.text("quant")),
            ("model", summary.text("model", "name")),
            ("random weights", summary.random_weights() or None),
            ("device", summary.text("environment", "device", "name")),
            ("peak memory, GiB", _peak(summary)),
            ("- allocated", _gib(summary, "peak_allocated_bytes")),
            ("- managed, of a paged optimizer", _gib(summary, "peak_managed_bytes")),
            ("time", None if seconds is None else duration(seconds)),
            ("tokens/s", _number(summary.amount("throughput", "tokens_per_second"), "{:,.0f}")),
            *(
                (name.replace("_", " "), _result(summary, name))
                for name in summary.mapping("results")
            ),
            ("failure", summary.text("failure", "problem")),
        ],
    )
    yield "How it was computed", list(summary.mapping("computation").items())
    yield "Settings", list(summary.mapping("settings").items())


def _result(summary: _Record, name: str) -> str:
    value = summary.number("results", name)
    whole = isinstance(summary.mapping("results")[name], int)
    return _number(value, "{:.0f}" if whole else "{:.4f}")


def _evaluation_sections(evaluation: _Record) -> Iterator[_Section]:
    for family in evaluation.mapping("tasks"):
        keys = ("tasks", family)
        n, n_total = _questions(evaluation, family)
        rows: list[tuple[str, object]] = [
            ("questions", f"{n:,} of {n_total:,}"),
            ("accuracy, micro", _share(evaluation, *keys)),
            ("accuracy, macro", _number(evaluation.number(*keys, "acc_macro"), "{:.4f}")),
            ("ties", evaluation.count(*keys, "ties")),
            ("truncated prompts", evaluation.count(*keys, "truncated")),
        ]
        for name in evaluation.mapping(*keys, "categories"):
            key = name.removeprefix(f"{family}_")
            rows.append((CATEGORIES.get(key, key), _share(evaluation, *keys, "categories", name)))
        yield family, rows


def _share(evaluation: _Record, *keys: str) -> str:
    text = f"{fields.share(evaluation.content, evaluation.path, *keys, 'acc'):.4f}"
    error = evaluation.amount(*keys, "acc_stderr")
    return text if error is None else f"{text} ± {error:.4f}"

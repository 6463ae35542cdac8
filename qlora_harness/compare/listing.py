"""`qlora-harness runs` and `qlora-harness show RUN`: what lies in the results folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from qlora_harness.compare.evaluation import CATEGORIES, DEFAULT_FAMILY
from qlora_harness.compare.tables.number_text import duration
from qlora_harness.compare.tables.table import NOTHING
from qlora_harness.compare.tables.training import GIB
from qlora_harness.errors import ResultsError
from qlora_harness.record import EVALUATION_FILE, SUMMARY_FILE, nested, read_json

_RECORDS = (SUMMARY_FILE, EVALUATION_FILE)


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
    shown = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    shown.add_column("run", no_wrap=True)
    for name in ("model", "data"):
        shown.add_column(name, overflow="fold")
    for name in ("base", "status"):
        shown.add_column(name, no_wrap=True)
    for name in ("GiB", "loss", "MMLU %"):
        shown.add_column(name, justify="right", no_wrap=True)
    broken = []
    for path in find_runs(folder):
        try:
            shown.add_row(*map(Text, _line(path, folder)))
        except ResultsError as error:
            broken.append(str(error))
    console.print(shown)
    for problem in broken:
        console.print(Text(f"Not listed: {problem}"))


def _line(path: Path, folder: Path) -> list[str]:
    summary, evaluation = _read(path)
    name = str(path.relative_to(folder)) if path != folder else path.name
    model = nested(summary, "model", "name") or nested(evaluation, "model", "base")
    random = nested(summary, "model", "random_weights") or nested(
        evaluation, "model", "random_weights"
    )
    quant = nested(summary, "quant") or nested(evaluation, "model", "quant")
    return [
        name,
        f"{model or NOTHING}{' (random weights)' if random else ''}",
        str(nested(summary, "settings", "dataset") or NOTHING),
        str(quant or NOTHING),
        str(nested(summary, "status") or "scored"),
        _peak(summary),
        _number(nested(summary, "results", "eval_loss"), "{:.3f}"),
        _accuracy(evaluation),
    ]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = [read_json(path / name) if (path / name).is_file() else {} for name in _RECORDS]
    return found[0], found[1]


def _number(value: object, form: str) -> str:
    return form.format(value) if isinstance(value, (int, float)) else NOTHING


def _time(value: object) -> str:
    return duration(value) if isinstance(value, (int, float)) else NOTHING


def _peak(summary: dict[str, Any]) -> str:
    gpu = nested(summary, "memory", "peak_allocated_bytes")
    cpu = nested(summary, "memory", "cpu_peak_rss_bytes")
    if isinstance(gpu, (int, float)):
        return f"{gpu / GIB:.2f}"
    return f"{cpu / GIB:.2f} CPU" if isinstance(cpu, (int, float)) else NOTHING


def _accuracy(evaluation: dict[str, Any]) -> str:
    tasks = nested(evaluation, "tasks")
    if not isinstance(tasks, dict) or not tasks:
        return NOTHING
    family = DEFAULT_FAMILY if DEFAULT_FAMILY in tasks else next(iter(tasks))
    acc = nested(tasks, family, "acc")
    text = _number(100 * acc if isinstance(acc, (int, float)) else None, "{:.2f}")
    n, n_total = nested(tasks, family, "n"), nested(tasks, family, "n_total")
    part = "" if n == n_total else f", {n} of {n_total}"
    short = family.removeprefix("mmlu_qlora_")
    return text if family == DEFAULT_FAMILY and not part else f"{text} ({short}{part})"


def print_run(path: Path, console: Console) -> None:
    """Prints what is recorded of one run.

    Args:
        path: The run folder.
        console: Where to.

    Raises:
        ResultsError: It holds no record, or a broken one.
    """
    if not any((path / name).is_file() for name in _RECORDS):
        raise ResultsError(
            f"{path} holds no {' or '.join(_RECORDS)}",
            "Name a run folder; `qlora-harness runs` lists them",
        )
    summary, evaluation = _read(path)
    for title, rows in _sections(summary, evaluation):
        listed = [(name, value) for name, value in rows if value not in (None, NOTHING)]
        if not listed:
            continue
        width = max(len(name) for name, _ in listed)
        console.print()
        console.print(Text(title, style="bold"))
        for name, value in listed:
            console.print(Text(f"{name:<{width}}  {value}"), soft_wrap=True)


def _sections(
    summary: dict[str, Any], evaluation: dict[str, Any]
) -> Iterator[tuple[str, list[tuple[str, object]]]]:
    if summary:
        results = nested(summary, "results") or {}
        yield (
            "Training",
            [
                ("status", summary.get("status")),
                ("base", summary.get("quant")),
                ("model", nested(summary, "model", "name")),
                ("random weights", nested(summary, "model", "random_weights") or None),
                ("device", nested(summary, "environment", "device", "name")),
                ("peak memory, GiB", _peak(summary)),
                ("time", _time(nested(summary, "runtime", "train_seconds"))),
                (
                    "tokens/s",
                    _number(nested(summary, "throughput", "tokens_per_second"), "{:,.0f}"),
                ),
                *((name.replace("_", " "), _shown(value)) for name, value in results.items()),
                ("failure", nested(summary, "failure", "problem")),
            ],
        )
        yield "How it was computed", list((summary.get("computation") or {}).items())
        yield "Settings", list((summary.get("settings") or {}).items())
    for family, task in (nested(evaluation, "tasks") or {}).items():
        rows: list[tuple[str, object]] = [
            ("questions", f"{task.get('n'):,} of {task.get('n_total'):,}"),
            ("accuracy, micro", _share(task)),
            ("accuracy, macro", _number(task.get("acc_macro"), "{:.4f}")),
            ("ties", task.get("ties")),
            ("truncated prompts", task.get("truncated")),
        ]
        for name, score in (task.get("categories") or {}).items():
            key = name.removeprefix(f"{family}_")
            rows.append((CATEGORIES.get(key, key), _share(score)))
        yield family, rows


def _shown(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else value


def _share(score: dict[str, Any]) -> str:
    text = _number(score.get("acc"), "{:.4f}")
    error = score.get("acc_stderr")
    return f"{text} ± {error:.4f}" if isinstance(error, (int, float)) else text

"""`qlora-harness runs` and `qlora-harness show RUN`: the runs in a results folder, and one run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from qlora_harness.errors import ResultsError
from qlora_harness.record import EVALUATION_FILE, SUMMARY_FILE
from qlora_harness.results.terminal import NOTHING, PrintableText, duration, gib
from qlora_harness.results.runs import find_runs
from qlora_harness.results.scored import DEFAULT_TASK
from qlora_harness.schema.scoring_records import EvaluatedModel, Evaluation, TaskScores
from qlora_harness.schema.section import read_record
from qlora_harness.schema.training_records import TrainingSummary, read_summary

_COLUMNS = ("run", "model", "data", "quant", "status", "GiB", "loss", "MMLU %")
_NUMBERS = ("GiB", "loss", "MMLU %")


def print_runs(folder: Path, console: Console) -> None:
    """Prints one line for each run; raises ResultsError if there is no run."""
    table = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in _COLUMNS:
        side = "right" if name in _NUMBERS else "left"
        table.add_column(name, justify=side, overflow="fold", min_width=4)  # type: ignore[arg-type]
    problems = []
    for path in find_runs(folder):
        try:
            table.add_row(*map(PrintableText, _line(path, folder)))
        except ResultsError as error:
            problems.append(str(error))
    if table.row_count:
        console.print(table)
    for problem in problems:
        console.print(PrintableText(f"Not listed: {problem}"))


def _read(path: Path) -> tuple[TrainingSummary | None, Evaluation | None]:
    evaluation = path / EVALUATION_FILE
    known = read_record(evaluation, Evaluation) if evaluation.is_file() else None
    return read_summary(path), known


def _line(path: Path, folder: Path) -> list[str]:
    summary, evaluation = _read(path)
    scored = EvaluatedModel() if evaluation is None else evaluation.model
    model, quant, random = scored.base, scored.quant, scored.random_weights
    data = loss = None
    status = "scored"
    if summary is not None:
        model, quant = summary.model.name or model, _base(summary) or quant
        random = random or summary.model.random_weights
        data, loss = summary.data.dataset, summary.results.eval_loss
        status = summary.status
    return [
        str(path.relative_to(folder)) if path != folder else path.name,
        f"{model or NOTHING}{' (random weights)' if random else ''}",
        data or NOTHING,
        quant or NOTHING,
        status,
        _peak(summary),
        NOTHING if loss is None else f"{loss:.3f}",
        _accuracy(evaluation),
    ]


def _base(summary: TrainingSummary) -> str | None:
    return f"{summary.quant} in FP8" if summary.in_fp8 else summary.quant


def _peak(summary: TrainingSummary | None) -> str:
    if summary is None or summary.peak_bytes is None:
        return NOTHING
    on_cpu = summary.memory.peak_allocated_bytes is None
    return f"{gib(summary.peak_bytes)}{' CPU' if on_cpu else ''}"


def _accuracy(evaluation: Evaluation | None) -> str:
    if evaluation is None or not evaluation.tasks:
        return NOTHING
    task = DEFAULT_TASK if DEFAULT_TASK in evaluation.tasks else next(iter(evaluation.tasks))
    scores = evaluation.tasks[task]
    text = f"{100 * scores.acc:.2f}"
    part = "" if scores.n == scores.n_total else f", {scores.n} of {scores.n_total}"
    part += ", in FP8" if scores.in_fp8 else ""
    if task == DEFAULT_TASK and not part:
        return text
    return f"{text} ({task.removeprefix('mmlu_qlora_')}{part})"


def print_run(path: Path, console: Console) -> None:
    """Prints the records of one run; raises ResultsError if there is none, or one is broken."""
    summary, evaluation = _read(path)
    if summary is None and evaluation is None:
        raise ResultsError(
            f"{path} holds no {SUMMARY_FILE} or {EVALUATION_FILE}",
            "Name a run folder; `qlora-harness runs` lists them",
        )
    sections = {} if summary is None else _training(summary)
    for task, scores in ({} if evaluation is None else evaluation.tasks).items():
        sections[task] = dict(_scores(scores))
    for heading, rows in sections.items():
        known = {name: value for name, value in rows.items() if value not in (None, NOTHING, "")}
        if not known:
            continue
        width = max(map(len, known))
        console.print()
        console.print(PrintableText(heading, style="bold"))
        for name, value in known.items():
            console.print(PrintableText(f"{name:<{width}}  {value}"), soft_wrap=True)


def _training(summary: TrainingSummary) -> dict[str, dict[str, object]]:
    seconds, speed = summary.runtime.train_seconds, summary.throughput.tokens_per_second
    results = {
        name.replace("_", " "): f"{value:.4f}" if isinstance(value, float) else value
        for name, value in summary.results.model_dump(exclude_none=True).items()
    }
    rows: dict[str, object] = {
        "status": summary.status,
        "base": _base(summary),
        "model": summary.model.name,
        "random weights": summary.model.random_weights or None,
        "device": (summary.environment.device or {}).get("name"),
        "peak memory, GiB": _peak(summary),
        "time": None if seconds is None else duration(seconds),
        "tokens/s": None if speed is None else f"{speed:,.0f}",
        **results,
        "failure": (summary.failure or {}).get("problem"),
    }
    return {
        "Training": rows,
        "How it was computed": summary.computation,
        "Settings": summary.settings,
    }


def _scores(scores: TaskScores) -> Iterator[tuple[str, object]]:
    yield "questions", f"{scores.n:,} of {scores.n_total:,}"
    yield "accuracy, micro", _share(scores.acc, scores.acc_stderr)
    yield "accuracy, macro", _share(scores.acc_macro, scores.acc_macro_stderr)
    yield "products with the base", "in FP8" if scores.in_fp8 else None
    yield "ties", scores.ties
    yield "truncated prompts", scores.truncated
    for name, score in scores.categories.items():
        yield name.replace("_", " "), _share(score.acc, score.acc_stderr)


def _share(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"

"""`qlora-harness runs`: the runs in a results folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from qlora_harness.errors import ResultsError
from qlora_harness.record import EVALUATION_FILE
from qlora_harness.results.terminal import NOTHING, PrintableText, gib
from qlora_harness.results.runs import find_runs
from qlora_harness.results.scored import DEFAULT_TASK
from qlora_harness.schema.scoring_records import EvaluatedModel, Evaluation
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


def _line(path: Path, folder: Path) -> list[str]:
    summary, file = read_summary(path), path / EVALUATION_FILE
    evaluation = read_record(file, Evaluation) if file.is_file() else None
    scored = EvaluatedModel() if evaluation is None else evaluation.model
    model, quant, random = scored.base, scored.quant, scored.random_weights
    data = loss = None
    status = "scored"
    if summary is not None:
        model, quant = summary.model.name or model, summary.quant or quant
        quant = f"{quant} in FP8" if summary.in_fp8 else quant
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

"""The progress of a cell, from the records in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from qlora_harness.record import EVALUATION_FILE
from qlora_harness.results.runs import load_run
from qlora_harness.schema.study_record import StudyRecord
from qlora_harness.schema.training_records import TrainingSummary, read_summary
from qlora_harness.settings import ModelSettings
from qlora_harness.study.definition import Cell
from qlora_harness.train.run_folder import changed_settings

_OF_BASES = frozenset(field.name for field in fields(ModelSettings))


def summary_of(cell: Cell) -> TrainingSummary | None:
    """Returns the record of a cell's training; None before it, and for a base."""
    return None if cell.seed is None else read_summary(cell.folder)


def status_of(cell: Cell) -> str | None:
    """Returns the status of a cell's training; None before it, and for a base."""
    summary = summary_of(cell)
    return None if summary is None else summary.status


def missing_tasks(cell: Cell, tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the tasks on which a cell has not been scored."""
    if not tasks or not _is_scored(cell):
        return tasks
    scored = load_run(cell.folder).tasks
    return tuple(task for task in tasks if task not in scored)


def is_complete(cell: Cell, tasks: tuple[str, ...]) -> bool:
    """Returns whether a cell has all its records."""
    return (cell.seed is None or status_of(cell) == "completed") and not missing_tasks(cell, tasks)


def changes(cell: Cell, record: StudyRecord | None) -> Iterator[str]:
    """Yields each setting in which a cell's record, or a base's study.json, is not the study's."""
    summary = summary_of(cell)
    if summary is not None:
        before: dict[str, Any] = summary.model_dump(include={"settings", "quantization"})
    elif cell.seed is None and _is_scored(cell) and record is not None:
        before = {"settings": record.arms.get(cell.arm, cell.settings.flat())}
    else:
        return
    for name, old, new in changed_settings(before, cell.settings):
        if cell.seed is not None or name in _OF_BASES:
            yield f"{name} was {old} and is now {new}"


def _is_scored(cell: Cell) -> bool:
    """Whether the cell has scores; a results file appears only when it is complete."""
    return (cell.folder / EVALUATION_FILE).exists() or any(
        (cell.folder / "lm_eval").rglob("results_*.json")
    )

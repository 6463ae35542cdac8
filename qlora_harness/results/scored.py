"""One run's result on one task, from this project's records or lm_eval's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from qlora_harness.errors import ResultsError
from qlora_harness.schema.mmlu import families
from qlora_harness.schema.scoring_records import EvaluatedModel, Evaluation
from qlora_harness.schema.section import flatten, read_record

DEFAULT_TASK = "mmlu_qlora_5shot"
DEMO_TASK = "mmlu_qlora_demo"
FAMILIES = (
    DEFAULT_TASK,
    "mmlu_qlora_5shot_val",
    "mmlu_qlora_0shot",
    "mmlu_qlora_0shot_val",
    DEMO_TASK,
)


class Subject(NamedTuple):
    """Metric and number of answered questions of a subject, or of a task in a group."""

    value: float
    n: int


@dataclass(frozen=True)
class Scored:
    """One run's result on one task: `value` over the `n` answered questions of `n_total`.

    `ended` is in seconds since 1970. A task without subjects is its own only subject.
    """

    task: str
    path: Path
    ended: float | None
    metric: str
    filter: str
    higher_is_better: bool
    value: float
    stderr: float | None
    n: int
    n_total: int
    subjects: Mapping[str, Subject]
    category_of: Mapping[str, str]
    model: EvaluatedModel
    conditions: Mapping[str, object]
    arm: str | None = None
    prompts_sha256: str | None = None
    truncated: int | None = None
    versions: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    samples: Mapping[str, Path] = field(default_factory=dict)

    @property
    def limited(self) -> bool:
        """Whether only some questions were answered (--limit, or single subjects)."""
        return self.n < self.n_total

    @property
    def in_fp8(self) -> bool:
        """Whether it was scored with compute=fp8; lm_eval's files have its arguments only."""
        names = ("evaluation.settings.compute", "evaluation.model_args.compute")
        return any(self.conditions.get(name) == "fp8" for name in names)

    @property
    def tuned(self) -> bool:
        """Whether the record names an adapter."""
        return bool(self.model.peft or self.model.adapter_sha256)


def category_of(task: str) -> dict[str, str]:
    """Returns the category of each subject; empty for tasks that aren't this project's."""
    categories = families().get(task, {}).get("categories", {})
    return {subject: name for name, subjects in categories.items() for subject in subjects}


def read_evaluation(path: Path) -> dict[str, Scored]:
    """Reads the results in evaluation_results.json by task; raises ResultsError."""
    record = read_record(path, Evaluation)
    if not record.tasks:
        raise ResultsError(f"{path}: tasks is empty", "Score the run again")
    results = {}
    for task, scores in record.tasks.items():
        sections = {
            "model": record.model.model_dump(),
            # Families scored at different times share a file, with settings of their own.
            "settings": {"compute": "bf16"} | (scores.settings or record.settings),
            "environment": record.environment.model_dump(exclude={"command"}),
        }
        results[task] = Scored(
            task=task,
            path=path,
            ended=_seconds(record.created),
            metric="acc",
            filter="none",
            higher_is_better=True,
            value=scores.acc,
            stderr=scores.acc_stderr,
            n=scores.n,
            n_total=scores.n_total,
            subjects={
                name.removeprefix(f"{task}_"): Subject(score.acc, score.n)
                for name, score in scores.subjects.items()
            },
            category_of=category_of(task),
            model=record.model,
            conditions=dict(flatten(sections, "evaluation")),
            arm=record.arm,
            prompts_sha256=scores.prompts_sha256,
            truncated=scores.truncated,
        )
    return results


def _seconds(date: str | None) -> float | None:
    try:
        return None if date is None else datetime.fromisoformat(date).timestamp()
    except (ValueError, OverflowError):
        return None

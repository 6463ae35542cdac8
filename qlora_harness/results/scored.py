"""What one run scored on one task, wherever it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from qlora_harness.errors import ResultsError
from qlora_harness.schema.mmlu import families
from qlora_harness.schema.evaluation import EvaluatedModel, Evaluation
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


@dataclass(frozen=True)
class HarnessFile:
    """One results file of lm_eval.

    `date` is the one in its name, "" without one. `tasks` holds the leaves of each task: a task of
    its own is its only leaf, a group has those below it. `roots` are tasks that are no part of
    another.
    """

    path: Path
    date: str
    record: Mapping[str, Any]
    tasks: Mapping[str, tuple[str, ...]]
    roots: tuple[str, ...]


class Subject(NamedTuple):
    """The metric and the questions answered of a part of a task that has a name of its own."""

    value: float
    n: int


@dataclass(frozen=True)
class Scored:
    """One run's result on one task.

    `ended` is when the evaluation ended, seconds since 1970. `value` is the metric over all `n`
    questions answered of `n_total`. `subjects` holds the task itself where it has none, and
    `category_of` those that have a category. `versions` are those of the tasks, and their numbers
    of shots; `conditions` every recorded setting by dotted name; `harness` the lm_eval file behind
    the result. What isn't recorded is None or missing.
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
    harness: HarnessFile | None = None

    @property
    def limited(self) -> bool:
        """Whether only a part of the questions was answered (--limit, or single subjects)."""
        return self.n < self.n_total

    @property
    def tuned(self) -> bool:
        """Whether an adapter was scored, as far as is recorded."""
        return bool(self.model.peft or self.model.adapter_sha256)


def category_of(task: str) -> dict[str, str]:
    """Returns the category of each subject of a task of this project; of others, nothing."""
    categories = families().get(task, {}).get("categories", {})
    return {subject: name for name, subjects in categories.items() for subject in subjects}


def read_evaluation(path: Path) -> dict[str, Scored]:
    """Reads what was scored, by task, from evaluation_results.json.

    Raises ResultsError if the file is unreadable, foreign, incomplete or contradicts itself.
    """
    record = read_record(path, Evaluation)
    if not record.tasks:
        raise ResultsError(f"{path}: tasks is empty", "Score the run again")
    results = {}
    for task, scores in record.tasks.items():
        sections = {
            "model": record.model.model_dump(),
            # Families scored at different times share a file; each has the settings of its time.
            "settings": scores.settings or record.settings,
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

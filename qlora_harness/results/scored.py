"""What one run scored on one task, wherever it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_harness.errors import ResultsError
from qlora_harness.families import families
from qlora_harness.schema.evaluation import Evaluation
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

    Attributes:
        path: The file.
        date: The date in its name; "" without one.
        record: Its content.
        tasks: Leaves by task: a task of its own is its only leaf, a group has those below it.
        roots: Tasks that are no part of another.
    """

    path: Path
    date: str
    record: Mapping[str, Any]
    tasks: Mapping[str, tuple[str, ...]]
    roots: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """The part of a task that has a name of its own, or the whole task.

    Attributes:
        value: The metric.
        n: Questions answered.
    """

    value: float
    n: int


@dataclass(frozen=True)
class Scored:
    """One run's result on one task.

    Attributes:
        task: For example mmlu_qlora_5shot or hellaswag.
        path: The file it was read from.
        ended: When the evaluation ended, seconds since 1970, if recorded.
        metric: For example acc or exact_match.
        filter: Of lm_eval, "none" for most tasks.
        higher_is_better: Whether more of the metric is better.
        value: The metric over all questions, as recorded.
        stderr: Its standard error, if known.
        n: Questions answered.
        n_total: Questions there are.
        subjects: By name, with the task itself where it has none.
        category_of: Category of each subject that has one.
        base: Name of the base model.
        quant: nf4, fp4 or bf16, if recorded.
        tuned: Whether an adapter was scored, as far as is recorded.
        random_weights: Whether the base was never trained.
        unquantised_share: Share of the layers' weights that 4 bits left in 16, if recorded.
        prompts_sha256: Hash over all prompts, if recorded.
        truncated: Prompts that were cut to fit, if counted.
        versions: Of the tasks, and their numbers of shots, as far as they are recorded.
        conditions: Every recorded setting by dotted name.
        notes: What a reader has to know.
        harness: The lm_eval file behind it, if there is one.
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
    base: str | None = None
    quant: str | None = None
    tuned: bool = False
    random_weights: bool = False
    unquantised_share: float | None = None
    prompts_sha256: str | None = None
    truncated: int | None = None
    versions: Mapping[str, object] = field(default_factory=dict)
    conditions: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    harness: HarnessFile | None = None

    @property
    def limited(self) -> bool:
        """Whether only a part of the questions was asked (--limit, or single subjects)."""
        return self.n < self.n_total


def category_of(task: str) -> dict[str, str]:
    """Returns the category of each subject of a task of this project.

    Args:
        task: For example mmlu_qlora_5shot; other tasks have none here.
    """
    categories = families().get(task, {}).get("categories", {})
    return {subject: name for name, subjects in categories.items() for subject in subjects}


def read_evaluation(path: Path) -> dict[str, Scored]:
    """Reads evaluation_results.json.

    Returns:
        What was scored, by task.

    Raises:
        ResultsError: The file is unreadable, foreign, incomplete or contradicts itself.
    """
    record = read_record(path, Evaluation)
    model = record.model
    found = {}
    for task, scores in record.tasks.items():
        environment = record.environment.model_dump(exclude={"command"})
        conditions = dict(flatten(model.model_dump(), "model"))
        # Families scored at different times share a file; each has the settings of its own time.
        conditions |= flatten(scores.settings or record.settings, "settings")
        conditions |= flatten(environment, "environment")
        found[task] = Scored(
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
            base=model.base,
            quant=model.quant,
            tuned=bool(model.peft or model.adapter_sha256),
            random_weights=model.random_weights,
            unquantised_share=model.unquantised_share,
            prompts_sha256=scores.prompts_sha256,
            truncated=scores.truncated,
            conditions={f"evaluation.{name}": value for name, value in conditions.items()},
        )
    if not found:
        raise ResultsError(f"{path}: tasks is empty", "Score the run again")
    return found


def _seconds(date: str | None) -> float | None:
    from datetime import datetime

    try:
        return None if date is None else datetime.fromisoformat(date).timestamp()
    except (ValueError, OverflowError):
        return None

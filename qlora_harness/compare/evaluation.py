"""One MMLU evaluation as the comparison sees it, and this project's own evaluation_results.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_harness.compare import fields
from qlora_harness.errors import ResultsError
from qlora_harness.record import nested

DEFAULT_FAMILY = "mmlu_qlora_5shot"
DEMO_FAMILY = "mmlu_qlora_demo"
FAMILIES = (
    DEFAULT_FAMILY,
    "mmlu_qlora_5shot_val",
    "mmlu_qlora_0shot",
    "mmlu_qlora_0shot_val",
    DEMO_FAMILY,
)
CATEGORIES = {
    "stem": "STEM",
    "humanities": "Humanities",
    "social_sciences": "Social sciences",
    "other": "Other",
}

# Sums of a few thousand doubles differ in the last digits when they are added in another order.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class SubjectScore:
    """One subject.

    Attributes:
        acc: Share of right answers, 0 to 1.
        n: Questions answered.
    """

    acc: float
    n: int


@dataclass(frozen=True)
class CategoryScore:
    """One of the four categories.

    Attributes:
        acc: Share of right answers by question, 0 to 1.
        acc_stderr: Its standard error, if known.
        n: Questions answered, if known.
    """

    acc: float
    acc_stderr: float | None
    n: int | None


@dataclass(frozen=True)
class Evaluation:
    """One model's answers to one task family.

    Attributes:
        family: Name of the task family, for example mmlu_qlora_5shot.
        path: The file this was read from.
        ended: When it ended, seconds since 1970, if recorded.
        unquantised_share: Share of the layers' weights that 4 bits left in 16; None for bf16, or
            where it isn't recorded.
        model: Name of the model, with its adapter if it has one.
        random_weights: Whether the record says that the base model was never trained.
        acc: Micro accuracy (by question), 0 to 1.
        acc_stderr: Its standard error, if known.
        acc_macro: Macro accuracy (mean over subjects), 0 to 1.
        acc_macro_stderr: Its standard error, if known.
        n: Questions answered.
        n_total: Questions there are; more than n after --limit, or if only subjects were scored.
        ties: Questions whose best log-probability is shared by several choices, if counted.
        truncated: Prompts that were cut to fit the model, if counted.
        prompts_sha256: Hash over all prompts, if recorded.
        subjects: Scores by subject name.
        categories: Scores by category key (see CATEGORIES).
        conditions: Every recorded setting, by dotted name.
        notes: What the reader has to know about this evaluation.
        letters: How often each letter was the answer, if the answers are known one by one.
    """

    family: str
    path: Path
    ended: float | None
    unquantised_share: float | None
    model: str | None
    random_weights: bool
    acc: float
    acc_stderr: float | None
    acc_macro: float
    acc_macro_stderr: float | None
    n: int
    n_total: int
    ties: int | None
    truncated: int | None
    prompts_sha256: str | None
    subjects: Mapping[str, SubjectScore]
    categories: Mapping[str, CategoryScore]
    conditions: Mapping[str, object]
    notes: tuple[str, ...] = ()
    letters: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks that the totals are those of the subjects.

        Raises:
            ResultsError: The file contradicts itself.
        """
        if not self.subjects or self.n == 0:
            raise self._contradiction("holds no answered question")
        total = sum(score.n for score in self.subjects.values())
        if total != self.n or self.n > self.n_total:
            raise self._contradiction(
                f"n is {self.n} of {self.n_total}, but its subjects have {total} questions"
            )
        micro = sum(score.acc * score.n for score in self.subjects.values()) / total
        macro = sum(score.acc for score in self.subjects.values()) / len(self.subjects)
        for name, stored, computed in (
            ("acc", self.acc, micro),
            ("acc_macro", self.acc_macro, macro),
        ):
            if abs(stored - computed) > _TOLERANCE:
                raise self._contradiction(
                    f"{name} is {stored:.6f}, but its subjects give {computed:.6f}"
                )

    @property
    def limited(self) -> bool:
        """Whether only a part of the questions was asked (--limit, or single subjects)."""
        return self.n < self.n_total

    def _contradiction(self, problem: str) -> ResultsError:
        return ResultsError(
            f"{self.path}: {self.family}: {problem}", "The file contradicts itself; score again"
        )


def split_task(task: str) -> tuple[str, str] | None:
    """Splits a task name into its family and the rest.

    Args:
        task: For example mmlu_qlora_5shot_val_anatomy, or with the groups that lm_eval puts
            before inline definitions, mmlu_qlora_demo::mmlu_qlora_demo_stem.

    Returns:
        For example ("mmlu_qlora_5shot_val", "anatomy"); the rest is "" for the family itself. None
        for a task that isn't ours.
    """
    name = task.rsplit("::", 1)[-1]
    # Longest first: mmlu_qlora_5shot_val_anatomy also starts with mmlu_qlora_5shot.
    for family in sorted(FAMILIES, key=len, reverse=True):
        if name == family:
            return family, ""
        if name.startswith(f"{family}_"):
            return family, name.removeprefix(f"{family}_")
    return None


def read_evaluations(path: Path) -> dict[str, Evaluation]:
    """Reads evaluation_results.json, one Evaluation per task family.

    Args:
        path: The file.

    Raises:
        ResultsError: It is unreadable, foreign, incomplete or contradicts itself.
    """
    record = fields.read_record(path, "evaluation_results")
    tasks = fields.mapping(record, path, "tasks")
    return {family: _read_family(record, path, family) for family in FAMILIES if family in tasks}


def _read_family(record: Mapping[str, Any], path: Path, family: str) -> Evaluation:
    keys = ("tasks", family)
    return Evaluation(
        family=family,
        path=path,
        ended=_seconds(fields.optional_text(record, path, "created")),
        unquantised_share=fields.optional_amount(record, path, "model", "unquantised_share"),
        model=_model_name(record),
        random_weights=nested(record, "model", "random_weights") is True,
        acc=fields.share(record, path, *keys, "acc"),
        acc_stderr=fields.optional_number(record, path, *keys, "acc_stderr"),
        acc_macro=fields.share(record, path, *keys, "acc_macro"),
        acc_macro_stderr=fields.optional_number(record, path, *keys, "acc_macro_stderr"),
        n=fields.count(record, path, *keys, "n"),
        n_total=fields.count(record, path, *keys, "n_total"),
        ties=fields.optional_count(record, path, *keys, "ties"),
        truncated=fields.optional_count(record, path, *keys, "truncated"),
        prompts_sha256=fields.optional_text(record, path, *keys, "prompts_sha256"),
        subjects=_read_subjects(record, path, family),
        categories=_read_categories(record, path, family),
        conditions=_read_conditions(record, path, family),
    )


def _seconds(date: str | None) -> float | None:
    try:
        return None if date is None else datetime.fromisoformat(date).timestamp()
    except (ValueError, OverflowError):
        return None


def _read_subjects(record: Mapping[str, Any], path: Path, family: str) -> dict[str, SubjectScore]:
    keys = ("tasks", family, "subjects")
    return {
        name.removeprefix(f"{family}_"): SubjectScore(
            acc=fields.share(record, path, *keys, name, "acc"),
            n=fields.count(record, path, *keys, name, "n"),
        )
        for name in fields.mapping(record, path, *keys)
    }


def _read_categories(
    record: Mapping[str, Any], path: Path, family: str
) -> dict[str, CategoryScore]:
    keys = ("tasks", family, "categories")
    return {
        name.removeprefix(f"{family}_"): CategoryScore(
            acc=fields.share(record, path, *keys, name, "acc"),
            acc_stderr=fields.optional_number(record, path, *keys, name, "acc_stderr"),
            n=fields.optional_count(record, path, *keys, name, "n"),
        )
        for name in fields.optional_mapping(record, path, *keys)
    }


def _read_conditions(record: Mapping[str, Any], path: Path, family: str) -> dict[str, object]:
    conditions = dict(fields.flatten(record.get("model") or {}, "model"))
    # Families scored at different times share a file; each keeps the settings of its own time.
    settings = nested(record, "tasks", family, "settings") or record.get("settings") or {}
    conditions.update(fields.flatten(settings, "settings"))
    environment = dict(fields.optional_mapping(record, path, "environment"))
    # The command line names the output folder and differs between any two runs.
    environment.pop("command", None)
    if isinstance(environment.get("device"), str):
        environment["device"] = {"name": environment["device"]}
    conditions.update(fields.flatten(environment, "environment"))
    return {f"evaluation.{name}": value for name, value in conditions.items()}


def _model_name(record: Mapping[str, Any]) -> str | None:
    base = nested(record, "model", "base")
    peft = nested(record, "model", "peft")
    if base is None:
        return None if peft is None else str(peft)
    return f"{base} + {peft}" if peft else str(base)

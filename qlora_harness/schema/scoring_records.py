"""evaluation_results.json and mmlu_progress_<model>_<arm>.json."""

# ruff: noqa: RUF012  # pydantic copies mutable defaults
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qlora_harness.schema.mmlu import PROMPT_DIGITS
from qlora_harness.schema.section import (
    LARGEST,
    Count,
    Environment,
    GgufFile,
    Header,
    Number,
    Section,
    Share,
)

Letter = Literal["A", "B", "C", "D"]
# Sums of a few thousand doubles differ in the last digits when they are added in another order.
_TOLERANCE = 1e-6


class EvaluatedModel(Section):
    """The model that was scored."""

    base: str | None = None
    """Hub id, folder, name of the GGUF file, or "smollm2"."""
    revision: str | None = None
    random_weights: bool = False
    gguf: GgufFile | None = None
    """The file that the base was expanded from, if it came as one."""
    quant: str | None = None
    double_quant: bool | None = None
    """Whether the scales were quantised, too; null for int8, hqq and bf16."""
    rope_scaling: str | None = None
    """TYPE:FACTOR; null for the base's own window."""
    peft: str | None = None
    """Name of the adapter's folder; null for the base alone."""
    adapter_sha256: str | None = None
    unquantised_share: Share | None = None
    """Share of the layers' weights that stay in 16 bits; null for bf16."""


class Score(Section):
    """Accuracy of some questions."""

    acc: Share
    """Right answers over questions; of tied best letters, the first counts."""
    acc_stderr: Number | None = None
    n: Count | None = None


class SubjectScore(Score):
    """Accuracy of one subject."""

    n: Count


class TaskScores(Score):
    """One task family."""

    n: Count
    n_total: Count
    """Questions in the file; more than n with --limit or single subjects."""
    acc_macro: Share
    acc_macro_stderr: Number | None = None
    ties: Count | None = None
    """Questions whose best log-probability several letters share."""
    truncated: Count | None = None
    """Prompts that were cut to fit the model."""
    prompts_sha256: str | None = None
    """Hash over all prompts and right letters."""
    subjects: Annotated[dict[str, SubjectScore], Field(min_length=1)]
    categories: dict[str, Score] = {}
    settings: dict[str, Any] = {}

    @property
    def in_fp8(self) -> bool:
        """Whether products with the base were in FP8."""
        return self.settings.get("compute") == "fp8"

    @model_validator(mode="after")
    def _totals_are_those_of_the_subjects(self) -> TaskScores:
        subjects = self.subjects.values()
        n = sum(score.n for score in subjects)
        if n != self.n or not 0 < self.n <= self.n_total:
            raise ValueError(f"n is {self.n} of {self.n_total}, but its subjects have {n}")
        micro = sum(score.acc * score.n for score in subjects) / n
        macro = sum(score.acc for score in subjects) / len(subjects)
        for name, computed in (("acc", micro), ("acc_macro", macro)):
            stored = getattr(self, name)
            if abs(stored - computed) > _TOLERANCE:
                raise ValueError(f"{name} is {stored:.6f}, but its subjects give {computed:.6f}")
        return self


def accuracy(correct: Sequence[bool]) -> tuple[float, float | None]:
    """Returns the mean, and the standard error of lm-eval's `mean_stderr`; None for one value."""
    n = len(correct)
    mean = sum(correct) / n
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None


def micro_macro(subjects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns micro and macro accuracy of subjects, with errors as lm-eval pools them for groups.

    Each subject has "acc", "acc_stderr", "n" and "correct".
    """
    n = sum(s["n"] for s in subjects)
    errors = [s["acc_stderr"] for s in subjects]
    pooled = macro_error = None
    if None not in errors:
        macro_error = math.sqrt(sum(e**2 for e in errors)) / len(errors)
        # lm-eval's pooled_sample_stderr: within-subject variances, weighted by their freedom.
        weighted = sum((s["n"] - 1) * s["acc_stderr"] ** 2 * s["n"] for s in subjects)
        freedom = n - len(subjects)
        pooled = math.sqrt(weighted / freedom / n) if freedom else None
    return {
        "acc": sum(s["correct"] for s in subjects) / n,
        "acc_stderr": pooled,
        "acc_macro": sum(s["acc"] for s in subjects) / len(subjects),
        "acc_macro_stderr": macro_error,
        "n": n,
    }


class Evaluation(Header):
    """evaluation_results.json: a model's accuracies on each task family."""

    created: str | None = None
    """ISO 8601."""
    kind: Literal["evaluation_results"] = "evaluation_results"
    """What the file is."""
    arm: str | None = None
    """Short name of the quantisation: 4bit, 4bit_fp4, 4bit_hqq, 8bit or 16bit."""
    model: EvaluatedModel = EvaluatedModel()
    """What was scored."""
    settings: dict[str, Any] = {}
    """Settings of the evaluation that wrote the file last."""
    environment: Environment = Environment()
    """Versions and hardware."""
    tasks: dict[str, TaskScores]
    """By family."""


class QuestionRow(Section):
    """One question and the model's answer."""

    index: Count
    """Line of the question in the data file, from 0."""
    subject: Annotated[str, Field(min_length=1)]
    logprobs: Annotated[
        dict[Letter, Annotated[float, Field(le=0, ge=-LARGEST, allow_inf_nan=False)]],
        Field(min_length=4),
    ]
    """Of the four letters, nats."""
    prediction: Letter
    """The likeliest letter; of a tie, the first."""
    answer: Letter
    correct: bool
    running_accuracy: Share | None = None
    """Accuracy over this and all questions before."""
    prompt_sha256: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{PROMPT_DIGITS}}}$")]
    """Beginning of the hash of the text that was scored."""
    truncated: bool = False


class Progress(Header):
    """mmlu_progress_<model>_<arm>.json: every question."""

    created: str | None = None
    """ISO 8601."""
    kind: Literal["mmlu_progress"] = "mmlu_progress"
    """What the file is."""
    arm: str | None = None
    """Short name of the quantisation: 4bit, 4bit_fp4, 4bit_hqq, 8bit or 16bit."""
    model: EvaluatedModel = EvaluatedModel()
    """What was scored."""
    tasks: dict[str, list[QuestionRow]]
    """By family, in the order of the file."""

"""What is stored of a scored MMLU run: every question, and accuracies that follow from them."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, model_validator

from qlora_harness.accuracy import accuracy, micro_macro
from qlora_harness.errors import ResultsError, shown
from qlora_harness.families import LETTERS
from qlora_harness.question_hashes import prompts_hash
from qlora_harness.record import (
    EVALUATION_FILE,
    SCHEMA_VERSION,
    now,
    read_json,
    remove_leftovers,
    write_json,
)
from qlora_harness.score.mmlu import is_tie, predict

_WRITTEN_SECONDS = 3600.0  # by then no process is still writing a record


@dataclass(frozen=True)
class ScoredQuestion:
    """One question and what the model said.

    Attributes:
        index: Line of the file, from 0.
        subject: For example "anatomy".
        prompt_sha256: Hash of the text that was scored, 16 hexadecimal digits.
        answer: The right letter.
        logprobs: Log-probabilities of " A" … " D" in nats.
        truncated: Whether the prompt was longer than the model's window.
    """

    index: int
    subject: str
    prompt_sha256: str
    answer: str
    logprobs: tuple[float, ...]
    truncated: bool = False

    @property
    def prediction(self) -> str:
        """The letter with the highest log-probability."""
        return predict(self.logprobs)

    @property
    def correct(self) -> bool:
        """Whether the prediction is the answer."""
        return self.prediction == self.answer


def summarise(
    questions: Sequence[ScoredQuestion],
    categories: Mapping[str, Sequence[str]],
    *,
    n_total: int,
) -> dict[str, Any]:
    """Computes the accuracies of one task family.

    Args:
        questions: All scored questions.
        categories: Subjects by category.
        n_total: Questions in the file; more than were scored with --limit or a single subject.

    Returns:
        Micro and macro accuracy with standard errors, subjects, categories, number of exact ties,
        and a hash of indices, prompts and answers.
    """
    by_subject: dict[str, list[bool]] = defaultdict(list)
    for q in questions:
        by_subject[q.subject].append(q.correct)
    subjects: dict[str, dict[str, Any]] = {}
    for subject, correct in sorted(by_subject.items()):
        mean, error = accuracy(correct)
        subjects[subject] = {
            "acc": mean,
            "acc_stderr": error,
            "n": len(correct),
            "correct": sum(correct),
        }
    summary = micro_macro(list(subjects.values()))
    summary |= {
        "n_total": n_total,
        "ties": sum(is_tie(q.logprobs) for q in questions),
        "truncated": sum(q.truncated for q in questions),
        "prompts_sha256": prompts_hash(
            (q.index, q.subject, q.prompt_sha256, q.answer) for q in questions
        ),
        "subjects": subjects,
        "categories": {
            category: micro_macro([subjects[s] for s in members if s in subjects])
            for category, members in categories.items()
            if any(s in subjects for s in members)
        },
    }
    return summary


def progress_rows(questions: Sequence[ScoredQuestion]) -> list[dict[str, Any]]:
    """Returns one row a question, in file order, with the accuracy so far.

    Args:
        questions: Scored questions of one family.
    """
    rows: list[dict[str, Any]] = []
    right = 0
    for count, q in enumerate(sorted(questions, key=lambda q: q.index), start=1):
        right += q.correct
        rows.append(
            {
                "index": q.index,
                "subject": q.subject,
                "logprobs": dict(zip(LETTERS, q.logprobs, strict=True)),
                "prediction": q.prediction,
                "answer": q.answer,
                "correct": q.correct,
                "running_accuracy": right / count,
                "prompt_sha256": q.prompt_sha256,
                "truncated": q.truncated,
            }
        )
    return rows


def model_slug(name: str) -> str:
    """Returns a model's name as it stands in file names: meta-llama/Llama-2-7b-hf → llama2_7b.

    Args:
        name: Hub id, folder, or "smollm2".
    """
    short = Path(name).name.lower().removesuffix("-hf")
    short = re.sub(r"^([a-z]+)-(\d)", r"\1\2", short)
    return re.sub(r"[^a-z0-9]+", "_", short).strip("_")


@dataclass(frozen=True)
class Family:
    """What was scored of one task family.

    Attributes:
        questions: The questions of this run.
        categories: Subjects by category.
        n_total: Questions in the file.
    """

    questions: Sequence[ScoredQuestion]
    categories: Mapping[str, Sequence[str]]
    n_total: int


def write_records(
    folder: Path, progress_name: str, header: Mapping[str, Any], families: Mapping[str, Family]
) -> list[str]:
    """Writes evaluation_results.json and the progress file of a run.

    What the same model was scored on before stays: other families; other questions of a family
    scored with the same settings; and, with other settings, a family of which more questions were
    scored then. So a later run with --limit, or of one subject, loses nothing. What another model
    was scored on goes.

    Args:
        folder: The run folder.
        progress_name: File name of the progress file.
        header: arm, model, settings and environment of this run.
        families: What was scored, by family.

    Returns:
        The families that were written.

    Raises:
        ResultsError: A record that is there is damaged.
    """
    same_model = {"arm": header["arm"], "model": header["model"]}
    old_tasks = _kept(folder / EVALUATION_FILE, _Evaluation, same_model)
    old_rows = _kept(folder / progress_name, _Progress, same_model)
    tasks, rows = dict(old_tasks), dict(old_rows)
    written = []
    for name, family in families.items():
        questions = {q.index: q for q in family.questions}
        if name in old_rows and name in old_tasks:
            if old_tasks[name].get("settings") == header["settings"]:
                questions = {q["index"]: _question(q) for q in old_rows[name]} | questions
            elif old_tasks[name]["n"] > len(questions):
                continue
        merged = list(questions.values())
        summary = summarise(merged, family.categories, n_total=family.n_total)
        tasks[name] = {**summary, "settings": header["settings"]}
        rows[name] = progress_rows(merged)
        written.append(name)
    if written:
        common = {"schema_version": SCHEMA_VERSION, "created": now()}
        progress = common | {"kind": "mmlu_progress", **same_model, "tasks": rows}
        evaluation = common | {"kind": "evaluation_results", **header, "tasks": tasks}
        write_json(folder / progress_name, progress, rows_at=3)  # a question a line
        write_json(folder / EVALUATION_FILE, evaluation)
    return written


def check_folder(folder: Path, progress_name: str) -> None:
    """Checks before hours of scoring that its records can be written.

    Args:
        folder: The run folder; made if missing.
        progress_name: File name of the progress file.

    Raises:
        ResultsError: The folder can't be written, or a record in it is damaged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultsError(
            f"{folder} can't be written ({error.strerror})",
            "Give another folder with results_dir= in --model_args",
        ) from None
    for name in (EVALUATION_FILE, progress_name):
        remove_leftovers(folder / name, _WRITTEN_SECONDS)
    _kept(folder / EVALUATION_FILE, _Evaluation, None)
    _kept(folder / progress_name, _Progress, None)


def _question(row: Mapping[str, Any]) -> ScoredQuestion:
    return ScoredQuestion(
        row["index"],
        row["subject"],
        row["prompt_sha256"],
        row["answer"],
        tuple(row["logprobs"][letter] for letter in LETTERS),
        row["truncated"],
    )


class _Row(BaseModel, strict=True):
    """What is read of a question's row in a progress file."""

    index: NonNegativeInt
    subject: str
    logprobs: dict[Literal["A", "B", "C", "D"], Annotated[float, Field(le=0, allow_inf_nan=False)]]
    answer: Literal["A", "B", "C", "D"]
    prompt_sha256: str
    truncated: bool

    @model_validator(mode="after")
    def _has_all_letters(self) -> _Row:
        if len(self.logprobs) != len(LETTERS):
            raise ValueError("logprobs must hold A, B, C and D")
        return self


class _Task(BaseModel, strict=True):
    """What is read of a family in evaluation_results.json."""

    n: NonNegativeInt
    settings: dict[str, Any]


class _Progress(BaseModel, strict=True):
    """What is read of a progress file before it is written anew."""

    arm: str
    model: dict[str, Any]
    tasks: dict[str, list[_Row]]


class _Evaluation(BaseModel, strict=True):
    """What is read of evaluation_results.json before it is written anew."""

    arm: str
    model: dict[str, Any]
    tasks: dict[str, _Task]


def _kept(
    path: Path, kind: type[_Progress | _Evaluation], same_model: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The tasks of an existing file, checked; none if it is about another model."""
    if not path.exists():
        return {}
    old = read_json(path, finite=True)
    try:
        checked = kind.model_validate(old)
    except ValidationError as error:
        first = error.errors()[0]
        raise ResultsError(
            f"{path}: {'.'.join(map(str, first['loc']))} is {shown(first['input'])} "
            f"({first['msg']:.100})",
            "The record is damaged: restore it or remove it",
        ) from None
    if same_model is not None and checked.arm != same_model["arm"]:
        return {}
    # A record of an earlier version lacks some keys.
    known = (same_model or {}).get("model", {})
    if any(checked.model.get(key, value) != value for key, value in known.items()):
        return {}
    return dict(old["tasks"])

"""What is stored of a scored MMLU run: every question, and accuracies that follow from them."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qlora_harness.errors import ResultsError
from qlora_harness.families import LETTERS
from qlora_harness.question_hashes import prompts_hash
from qlora_harness.record import (
    EVALUATION_FILE,
    now,
    remove_leftovers,
    write_json,
)
from qlora_harness.schema.evaluation import (
    Evaluation,
    Progress,
    QuestionRow,
    TaskScores,
    accuracy,
    micro_macro,
)
from qlora_harness.schema.section import read_record
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
) -> TaskScores:
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
    return TaskScores.model_validate(summary)


def progress_rows(questions: Sequence[ScoredQuestion]) -> list[QuestionRow]:
    """Returns one row a question, in file order, with the accuracy so far.

    Args:
        questions: Scored questions of one family.
    """
    rows: list[QuestionRow] = []
    right = 0
    for count, q in enumerate(sorted(questions, key=lambda q: q.index), start=1):
        right += q.correct
        rows.append(
            QuestionRow.model_validate(
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
    arm, model = header["arm"], header["model"]
    old_tasks: dict[str, TaskScores] = {}
    old_rows: dict[str, list[QuestionRow]] = {}
    evaluation = _existing(folder / EVALUATION_FILE, Evaluation)
    if evaluation is not None and _same_model(evaluation, arm, model):
        old_tasks = evaluation.tasks
    progress = _existing(folder / progress_name, Progress)
    if progress is not None and _same_model(progress, arm, model):
        old_rows = progress.tasks
    tasks, rows = dict(old_tasks), dict(old_rows)
    written = []
    for name, family in families.items():
        questions = {q.index: q for q in family.questions}
        if name in old_rows and name in old_tasks:
            if old_tasks[name].settings == header["settings"]:
                questions = {row.index: _question(row) for row in old_rows[name]} | questions
            elif old_tasks[name].n > len(questions):
                continue
        merged = list(questions.values())
        tasks[name] = summarise(merged, family.categories, n_total=family.n_total)
        tasks[name].settings = dict(header["settings"])
        rows[name] = progress_rows(merged)
        written.append(name)
    if written:
        created = {"created": now()}
        progress = Progress.model_validate(created | {"arm": arm, "model": model, "tasks": {}})
        progress.tasks = rows
        evaluation = Evaluation.model_validate(created | dict(header) | {"tasks": {}})
        evaluation.tasks = tasks
        write_json(folder / progress_name, progress.content(), rows_at=3)  # a question a line
        write_json(folder / EVALUATION_FILE, evaluation.content())
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
    _existing(folder / EVALUATION_FILE, Evaluation)
    _existing(folder / progress_name, Progress)


def _question(row: QuestionRow) -> ScoredQuestion:
    logprobs: dict[Any, float] = row.logprobs
    return ScoredQuestion(
        row.index,
        row.subject,
        row.prompt_sha256,
        row.answer,
        tuple(logprobs[letter] for letter in LETTERS),
        row.truncated,
    )


_Kind = TypeVar("_Kind", Progress, Evaluation)


def _existing(path: Path, kind: type[_Kind]) -> _Kind | None:
    return read_record(path, kind) if path.exists() else None


def _same_model(record: Progress | Evaluation, arm: str, model: Mapping[str, Any]) -> bool:
    """Whether a record is about a model; one of an earlier version lacks some keys."""
    known = record.model.model_dump(exclude_unset=True)
    return record.arm == arm and all(known.get(key, value) == value for key, value in model.items())

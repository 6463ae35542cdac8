"""Writes the records of a scored MMLU run: its questions, and the accuracies over them."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from qlora_harness.errors import ResultsError
from qlora_harness.record import EVALUATION_FILE, now, remove_leftovers, write_json
from qlora_harness.schema.mmlu import LETTERS, prompts_hash
from qlora_harness.schema.scoring_records import (
    Evaluation,
    Progress,
    QuestionRow,
    TaskScores,
    accuracy,
    micro_macro,
)
from qlora_harness.schema.section import read_record
from qlora_harness.score.mmlu import is_tie, predict

_WRITTEN_SECONDS = 3600.0  # a temporary file of this age belongs to a dead process

_Record = TypeVar("_Record", Progress, Evaluation)


class Family(NamedTuple):
    """The scored questions of one task family."""

    questions: Sequence[QuestionRow]
    categories: Mapping[str, Sequence[str]]  # subjects by category
    n_total: int  # questions in the file, of which --limit scores fewer


def question_row(
    *,
    index: int,
    subject: str,
    prompt_sha256: str,
    answer: str,
    logprobs: Sequence[float],
    truncated: bool = False,
) -> QuestionRow:
    """Returns a question's row from the log-probabilities of " A" … " D" in nats."""
    prediction = predict(logprobs)
    return QuestionRow.model_validate(
        {
            "index": index,
            "subject": subject,
            "logprobs": dict(zip(LETTERS, logprobs, strict=True)),
            "prediction": prediction,
            "answer": answer,
            "correct": prediction == answer,
            "prompt_sha256": prompt_sha256,
            "truncated": truncated,
        }
    )


def summarise(family: Family) -> TaskScores:
    """Computes the accuracies of a family, with its ties and the hash of its prompts."""
    rows = family.questions
    by_subject: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_subject[row.subject].append(row.correct)
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
        "n_total": family.n_total,
        "ties": sum(is_tie(list(row.logprobs.values())) for row in rows),
        "truncated": sum(row.truncated for row in rows),
        "prompts_sha256": prompts_hash(
            (row.index, row.subject, row.prompt_sha256, row.answer) for row in rows
        ),
        "subjects": subjects,
        "categories": {
            category: micro_macro([subjects[s] for s in members if s in subjects])
            for category, members in family.categories.items()
            if any(s in subjects for s in members)
        },
    }
    return TaskScores.model_validate(summary)


def progress_rows(questions: Sequence[QuestionRow]) -> list[QuestionRow]:
    """Returns the questions in file order, each with the accuracy up to it."""
    rows = []
    right = 0
    for count, row in enumerate(sorted(questions, key=lambda row: row.index), start=1):
        right += row.correct
        rows.append(row.model_copy(update={"running_accuracy": right / count}))
    return rows


def model_slug(name: str) -> str:
    """Returns a model's name for file names: meta-llama/Llama-2-7b-hf → llama2_7b."""
    short = Path(name).name.lower().removesuffix(".gguf").removesuffix("-hf")
    short = re.sub(r"^([a-z]+)-(\d)", r"\1\2", short)
    return re.sub(r"[^a-z0-9]+", "_", short).strip("_")


def write_records(
    folder: Path, progress_name: str, header: Mapping[str, Any], families: Mapping[str, Family]
) -> list[str]:
    """Writes evaluation_results.json and the progress file, and returns the families written.

    Earlier results of the same model stay: other families, other questions scored with the same
    settings, and a family with more questions scored with other settings. So a later run with
    --limit or of one subject loses nothing. Results of another model are replaced.

    `header` holds arm, model, settings and environment. Raises ResultsError if an existing record
    is damaged.
    """
    tasks: dict[str, TaskScores] = {}
    rows: dict[str, list[QuestionRow]] = {}
    evaluation = _existing(folder / EVALUATION_FILE, Evaluation)
    if evaluation is not None and _is_of_same_model(evaluation, header):
        tasks = dict(evaluation.tasks)
    progress = _existing(folder / progress_name, Progress)
    if progress is not None and _is_of_same_model(progress, header):
        rows = dict(progress.tasks)
    written = []
    for name, family in families.items():
        questions = {row.index: row for row in family.questions}
        if name in rows and name in tasks:
            if tasks[name].settings == header["settings"]:
                questions = {row.index: row for row in rows[name]} | questions
            elif tasks[name].n > len(questions):
                continue
        merged = family._replace(questions=list(questions.values()))
        tasks[name] = summarise(merged)
        tasks[name].settings = dict(header["settings"])
        rows[name] = progress_rows(merged.questions)
        written.append(name)
    if written:
        about = {"created": now(), "arm": header["arm"], "model": header["model"], "tasks": {}}
        progress = Progress.model_validate(about)
        progress.tasks = rows
        evaluation = Evaluation.model_validate({**about, **header})
        evaluation.tasks = tasks
        write_json(folder / progress_name, progress.content(), rows_at=3)  # a question a line
        write_json(folder / EVALUATION_FILE, evaluation.content())
    return written


def check_folder(folder: Path, progress_name: str) -> None:
    """Creates the folder if needed; raises ResultsError if its records can't be read or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from None
    for name in (EVALUATION_FILE, progress_name):
        remove_leftovers(folder / name, _WRITTEN_SECONDS)
    _existing(folder / EVALUATION_FILE, Evaluation)
    _existing(folder / progress_name, Progress)


def unwritable(path: Path, error: OSError) -> ResultsError:
    """Returns the error for a record that can't be written."""
    return ResultsError(
        f"{path} can't be written ({error.strerror or error})",
        "Give another folder with results_dir= in --model_args",
    )


def _existing(path: Path, kind: type[_Record]) -> _Record | None:
    return read_record(path, kind) if path.exists() else None


def _is_of_same_model(record: Progress | Evaluation, header: Mapping[str, Any]) -> bool:
    """Compares the keys that both have; earlier versions wrote fewer."""
    plain = {"rope_scaling": None}  # written only where there is one
    known = plain | record.model.model_dump(exclude_unset=True)
    return record.arm == header["arm"] and all(
        known.get(key, value) == value for key, value in (plain | header["model"]).items()
    )

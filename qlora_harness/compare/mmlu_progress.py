"""This project's own record of every question, mmlu_progress_<model>_<arm>.json, as answers.

A row knows the line of its question in the data file; lm_eval's samples know its number in its
subject, counted in the order of the file. That number is found from the lines:

- Where all questions of the file were scored, it is the place of the line among the lines of its
  subject.
- Where only a part was, the same, if the lines of the subject follow each other: they are then its
  first questions (--limit) or all of them, as the questions of a subject stand together in the
  files. Lines with a gap are refused.

Should the lines of a subject begin later than its first question, its numbers would be too low; no
wrong pair follows, as another question has another prompt hash, and the comparison checks each.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_harness.compare import fields
from qlora_harness.compare.answers import Answer, Question
from qlora_harness.compare.evaluation import Evaluation
from qlora_harness.errors import ResultsError
from qlora_harness.families import LETTERS
from qlora_harness.question_hashes import PROMPT_DIGITS, prompts_hash
from qlora_harness.record import EVALUATION_FILE

_PATTERN = "mmlu_progress_*.json"
_HASH = re.compile(rf"[0-9a-f]{{{PROMPT_DIGITS}}}")
_OTHER_RUN = "The file is half written or belongs to another run; score again or remove it"


@dataclass(frozen=True)
class _Row:
    index: int
    subject: str
    answer: Answer


def read_progress(evaluation: Evaluation) -> dict[Question, Answer] | None:
    """Reads the answers behind a family of evaluation_results.json.

    Args:
        evaluation: What was read from evaluation_results.json; the answers must add up to it.

    Returns:
        All answers of the family, or None if there is no mmlu_progress file, or none of the family
        in it.

    Raises:
        ResultsError: The file is unreadable, foreign, incomplete, contradicts itself, or is not
            that of the evaluation.
    """
    found = _find(evaluation.path)
    if found is None:
        return None
    path, record = found
    tasks = fields.mapping(record, path, "tasks")
    if evaluation.family not in tasks:
        return None
    where = f"{path}: tasks.{evaluation.family}"
    rows = _read_rows(tasks[evaluation.family], path, evaluation)
    _check_totals(rows, where, evaluation)
    by_subject: dict[str, list[_Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.index):
        by_subject[row.subject].append(row)
    if evaluation.limited:
        for subject, part in by_subject.items():
            _check_gaps(part, f"{where}: {subject}")
    return {
        Question(subject, doc_id): row.answer
        for subject, part in by_subject.items()
        for doc_id, row in enumerate(part)
    }


def _find(evaluation: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """Returns the file of the model that evaluation_results.json is about."""
    paths = sorted(path for path in evaluation.parent.glob(_PATTERN) if path.is_file())
    if not paths:
        return None
    owner = fields.read_record(evaluation, "evaluation_results")
    records = {path: fields.read_record(path, "mmlu_progress") for path in paths}
    own = [
        path
        for path, record in records.items()
        if all(record.get(key) == owner.get(key) for key in ("arm", "model"))
    ]
    if not own:
        key = next(key for key in ("arm", "model") if records[paths[0]].get(key) != owner.get(key))
        raise ResultsError(
            f"{paths[0]}: {key} is not that of {EVALUATION_FILE}: the file belongs to another run",
            "Remove it, or score again",
        )
    if len(own) > 1:
        raise ResultsError(
            f"{own[0]} and {own[1]} are both of the model of {EVALUATION_FILE}, so which belongs "
            "to it can't be told",
            "Remove the one that is out of date",
        )
    return own[0], records[own[0]]


def _read_rows(values: object, path: Path, evaluation: Evaluation) -> list[_Row]:
    keys = ("tasks", evaluation.family)
    if not isinstance(values, list):
        raise fields.field_error(path, keys, f"is a {type(values).__name__}, not a list")
    rows, seen = [], set()
    for place, value in enumerate(values):
        where = f"{path}: {'.'.join(keys)}[{place}]"
        if not isinstance(value, Mapping):
            raise ResultsError(f"{where} is a {type(value).__name__}, not an object", _OTHER_RUN)
        row = _read_row(value, where)
        if row.index >= evaluation.n_total:
            raise fields.field_error(
                where, ("index",), f"is {row.index}, but there are {evaluation.n_total} questions"
            )
        if row.index in seen:
            raise fields.field_error(where, ("index",), f"is {row.index}, which is there twice")
        seen.add(row.index)
        rows.append(row)
    return rows


def _read_row(value: Mapping[str, Any], where: str) -> _Row:
    scores = [fields.number(value, where, "logprobs", letter) for letter in LETTERS]
    if len(value["logprobs"]) != len(LETTERS):
        raise fields.field_error(where, ("logprobs",), "holds more than A, B, C and D")
    choice = scores.index(max(scores))
    answer = value.get("answer")
    if answer not in LETTERS:
        raise fields.field_error(where, ("answer",), f"is {answer!r}, not A, B, C or D")
    target = LETTERS.index(answer)
    # What follows from the log-probabilities and the answer must stand there.
    for key, expected in (("prediction", LETTERS[choice]), ("correct", choice == target)):
        if value.get(key) != expected:
            problem = f"is {value.get(key)!r}, but logprobs and answer give {expected!r}"
            raise fields.field_error(where, (key,), problem)
    prompt = fields.optional_text(value, where, "prompt_sha256") or ""
    if not _HASH.fullmatch(prompt):
        problem = f"is {value.get('prompt_sha256')!r}, not {PROMPT_DIGITS} hexadecimal digits"
        raise fields.field_error(where, ("prompt_sha256",), problem)
    subject = fields.optional_text(value, where, "subject")
    if not subject:
        raise fields.field_error(where, ("subject",), "is missing")
    return _Row(
        fields.count(value, where, "index"),
        subject,
        Answer(
            document=None,
            prompt=prompt,
            # As lm_eval's target_hash: of the place of the right answer, as text.
            target=hashlib.sha256(str(target).encode()).hexdigest(),
            right=choice == target,
            tied=scores.count(max(scores)) > 1,
            choice=choice,
            answer=target,
        ),
    )


def _check_totals(rows: Sequence[_Row], where: str, evaluation: Evaluation) -> None:
    """Checks that the rows are those that evaluation_results.json was made of."""
    found = {subject: [0, 0] for subject in evaluation.subjects}
    for row in rows:
        counts = found.setdefault(row.subject, [0, 0])
        counts[0] += row.answer.right
        counts[1] += 1
    for subject, (right, n) in found.items():
        score = evaluation.subjects.get(subject)
        wanted, size = (0.0, 0) if score is None else (score.acc * score.n, score.n)
        if n != size or abs(right - wanted) > 1e-6:
            raise ResultsError(
                f"{where}: {subject} has {right} right of {n} questions, but {EVALUATION_FILE} "
                f"says {wanted:.0f} of {size}",
                _OTHER_RUN,
            )
    digest = prompts_hash(
        (row.index, row.subject, row.answer.prompt, LETTERS[row.answer.answer or 0]) for row in rows
    )
    if evaluation.prompts_sha256 not in (None, digest):
        raise ResultsError(
            f"{where}: its questions give prompts_sha256 {digest[:12]}, but {EVALUATION_FILE} says "
            f"{str(evaluation.prompts_sha256)[:12]}",
            _OTHER_RUN,
        )


def _check_gaps(rows: Sequence[_Row], where: str) -> None:
    """Checks that the lines of a subject follow each other."""
    for one, other in zip(rows, rows[1:], strict=False):
        if other.index != one.index + 1:
            raise ResultsError(
                f"{where} has index {one.index} and {other.index} and none between them, so the "
                "number of each question in its subject can't be told",
                "Score the first questions (--limit) or all, or log samples (--log_samples)",
            )

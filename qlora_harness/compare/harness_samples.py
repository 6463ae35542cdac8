"""lm_eval's logged samples, samples_<task>_<time>.jsonl beside a results file: read and checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_harness.compare import fields
from qlora_harness.compare.answers import Answer, Question
from qlora_harness.compare.evaluation import Evaluation, SubjectScore
from qlora_harness.compare.harness_results import DATE_ID, HarnessFile, subject_tasks
from qlora_harness.errors import ResultsError
from qlora_harness.families import LETTERS
from qlora_harness.record import nested, parse_json

_SHOWN = 600  # characters of a question


def read_answers(
    file: HarnessFile, evaluation: Evaluation, *, rescore: bool = False
) -> dict[Question, Answer] | None:
    """Reads the logged samples that belong to a results file.

    Args:
        file: The results file.
        evaluation: What was read from it; the samples must add up to it.
        rescore: Whether each answer is checked against its log-probabilities.

    Returns:
        All answers of the family, or None if lm_eval ran without --log_samples.

    Raises:
        ResultsError: Samples are half written, broken, or not those of the results file.
    """
    date_id = DATE_ID.search(file.path.name)
    if date_id is None:
        return None
    tasks = subject_tasks(file, evaluation.family)
    paths = {
        subject: file.path.with_name(f"samples_{task}_{date_id[1]}.jsonl")
        for subject, task in tasks.items()
    }
    missing = [path for path in paths.values() if not path.is_file()]
    if len(missing) == len(paths):
        return None
    if missing:
        raise ResultsError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} sample files are)",
            "Score again with --log_samples, or remove the sample files that are left",
        )
    answers: dict[Question, Answer] = {}
    for subject, path in paths.items():
        answers.update(_read_subject_answers(path, subject, evaluation.subjects[subject], rescore))
    return answers


def _read_subject_answers(
    path: Path, subject: str, score: SubjectScore, rescore: bool
) -> dict[Question, Answer]:
    answers: dict[Question, Answer] = {}
    for where, sample in _read_lines(path):
        question = Question(subject, fields.count(sample, where, "doc_id"))
        if question in answers:
            raise ResultsError(f"{where}: doc_id {question.doc_id} is there twice", "Score again")
        answers[question] = answer = _read_answer(sample, where)
        if rescore:
            _check_score(sample, answer, where)
    right = sum(answer.right for answer in answers.values())
    if len(answers) != score.n or abs(right - score.acc * score.n) > 1e-6:
        raise ResultsError(
            f"{path}: {right} right of {len(answers)} samples, but the results file says "
            f"{score.acc * score.n:.0f} of {score.n}",
            "The file is half written or belongs to another run; score again",
        )
    return answers


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line_number, line in enumerate(file, start=1):
                where = f"{path}, line {line_number}"
                try:
                    sample = parse_json(line)
                except ValueError as error:
                    raise ResultsError(
                        f"{where}: not valid JSON ({error})",
                        "The file is damaged or half written; score again or remove it",
                    ) from None
                if not isinstance(sample, dict):
                    raise ResultsError(f"{where}: not a JSON object", "Score again or remove it")
                yield where, sample
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} can't be read: {error}", "Check the file") from None


def _read_answer(sample: Mapping[str, Any], where: str) -> Answer:
    scores = _log_probabilities(sample, where)
    return Answer(
        document=fields.text(sample, where, "doc_hash"),
        prompt=fields.text(sample, where, "prompt_hash"),
        target=fields.text(sample, where, "target_hash"),
        right=fields.share(sample, where, "acc") == 1.0,
        tied=scores.count(max(scores)) > 1,
        choice=scores.index(max(scores)),
        answer=_target(sample),
        question=_question(sample),
    )


def _target(sample: Mapping[str, Any]) -> int | None:
    target = str(sample.get("target"))
    return int(target) if target in map(str, range(len(LETTERS))) else None


def _question(sample: Mapping[str, Any]) -> str | None:
    prompt = nested(sample, "doc", "input")
    if not isinstance(prompt, str):
        return None
    question = prompt.rsplit("\n\n", 1)[-1].removesuffix("Answer:").strip()
    return question if len(question) <= _SHOWN else f"…{question[-_SHOWN:]}"


def _check_score(sample: Mapping[str, Any], answer: Answer, where: str) -> None:
    """Checks that "acc" is what the log-probabilities and the target give."""
    target = answer.answer
    if target is None:
        found = sample.get("target")
        raise fields.field_error(where, ("target",), f"is {found!r}, not a choice from 0 to 3")
    if (answer.choice == target) != answer.right:
        raise ResultsError(
            f"{where}: acc is {float(answer.right):g}, but the best log-probability is that of "
            f"choice {answer.choice} and the target is {target}",
            "The file was changed or is damaged; score again",
        )


def _log_probabilities(sample: Mapping[str, Any], where: str) -> list[float]:
    try:
        # [[-1.2, false], …], or with every leaf turned into text: [["-1.2", "False"], …].
        values = [float(response[0]) for response in sample["filtered_resps"]]
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        values = []
    if len(values) != len(LETTERS):
        raise fields.field_error(
            where, ("filtered_resps",), "does not hold four [log-probability, greedy] pairs"
        )
    if any(math.isnan(value) for value in values):
        raise fields.field_error(where, ("filtered_resps",), "holds NaN")
    return values

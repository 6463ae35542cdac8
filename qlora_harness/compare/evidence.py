"""What lies behind the numbers of a comparison: curves, subjects, and answers that changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_harness.compare.answers import Answer, Question
from qlora_harness.compare.evaluation import Evaluation
from qlora_harness.compare.losses import StepLog
from qlora_harness.compare.runs import Run
from qlora_harness.compare.tables.training import GIB, cpu_peak_bytes, gpu_peak_bytes
from qlora_harness.families import LETTERS


@dataclass(frozen=True)
class Cost:
    """What a training run took.

    Attributes:
        label: The run.
        memory_gib: Peak of its GPU memory, or of its resident memory on a CPU; None if unknown.
        on_gpu: Which of the two.
        hours: Training time; None if unknown or resumed.
    """

    label: str
    memory_gib: float | None
    on_gpu: bool
    hours: float | None


@dataclass(frozen=True)
class Flip:
    """A question that one run answered right and the other wrong.

    Attributes:
        label: The later run.
        subject: Of the question.
        doc_id: Its number in the subject.
        better: Whether the later run is the one that was right.
        first: Letter of the first run.
        second: Letter of the later run.
        answer: The right letter, if known.
        question: Its text, if one of the runs logged it.
    """

    label: str
    subject: str
    doc_id: int
    better: bool
    first: str
    second: str
    answer: str | None
    question: str | None


@dataclass(frozen=True)
class Evidence:
    """Everything a page shows beside the tables.

    Attributes:
        labels: Of all runs, in their order; figures give each its colour by its place here.
        costs: Of each trained run.
        logs: Step logs that have a step, by label.
        evaluations: Of the family compared, by label, all over the same questions.
        flips: Of each later run whose answers are known, in the order of subjects and questions.
        common: The number of questions common to all runs, where --intersect dropped others.
    """

    labels: tuple[str, ...]
    costs: tuple[Cost, ...]
    logs: Mapping[str, StepLog]
    evaluations: Mapping[str, Evaluation]
    flips: tuple[Flip, ...]
    common: int | None = None


def gather(
    runs: Sequence[Run],
    evaluations: Mapping[str, Evaluation],
    answers: Mapping[str, Mapping[Question, Answer] | None],
    logs: Mapping[str, StepLog | None],
    common: int | None = None,
) -> Evidence:
    """Gathers the evidence of a comparison.

    Args:
        runs: The runs.
        evaluations: Of the family compared, by label, all over the same questions.
        answers: Their answers question by question, where they are known.
        logs: Step logs by label.
        common: The number of these questions, where --intersect dropped others.
    """
    return Evidence(
        tuple(run.label for run in runs),
        tuple(cost for run in runs if (cost := _cost(run)) is not None),
        {label: log for label, log in logs.items() if log is not None and log.losses},
        evaluations,
        tuple(
            flip
            for run in runs[1:]
            for flip in _flips(run.label, answers.get(runs[0].label), answers.get(run.label))
        ),
        common,
    )


def _cost(run: Run) -> Cost | None:
    summary = run.training
    if summary is None:
        return None
    on_gpu = summary.device_type != "cpu"
    peak = gpu_peak_bytes(summary) if on_gpu else cpu_peak_bytes(summary)
    seconds = None if summary.resumed else summary.train_seconds
    return Cost(
        run.label,
        None if peak is None else peak / GIB,
        on_gpu,
        None if seconds is None else seconds / 3600,
    )


def _flips(
    label: str, first: Mapping[Question, Answer] | None, other: Mapping[Question, Answer] | None
) -> list[Flip]:
    if first is None or other is None:
        return []
    found = []
    for question, one in sorted(first.items()):
        two = other.get(question)
        if two is None or one.right == two.right:
            continue
        found.append(
            Flip(
                label,
                question.subject,
                question.doc_id,
                two.right,
                LETTERS[one.choice],
                LETTERS[two.choice],
                None if one.answer is None else LETTERS[one.answer],
                one.question or two.question,
            )
        )
    return found

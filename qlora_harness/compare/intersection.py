"""`--intersect`: the questions that a run and the baseline both answered, and how many others not.

A question is known by its task (subject), its number there (doc_id) and its hashes. Questions in
one run only are dropped and counted; that the hashes of the others agree is checked in
conditions.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_harness.accuracy import accuracy, micro_macro
from qlora_harness.compare.answers import Answer, Question, count_letters
from qlora_harness.compare.evaluation import CategoryScore, Evaluation, SubjectScore
from qlora_harness.errors import ComparisonError
from qlora_harness.families import families

Answers = Mapping[Question, Answer]


@dataclass(frozen=True)
class Tally:
    """Questions by who answered them.

    Attributes:
        common: Answered by both; these are compared.
        dropped_baseline: Answered by the baseline only.
        dropped_run: Answered by the other run only.
    """

    common: int
    dropped_baseline: int
    dropped_run: int

    @property
    def dropped(self) -> int:
        """Questions dropped on either side."""
        return self.dropped_baseline + self.dropped_run


@dataclass(frozen=True)
class Intersection:
    """What a run and the baseline have in common.

    Attributes:
        baseline: Label of the baseline.
        run: Label of the other run.
        family: The task family.
        by_subject: Their questions by subject, in alphabetical order.
    """

    baseline: str
    run: str
    family: str
    by_subject: Mapping[str, Tally]

    @property
    def total(self) -> Tally:
        """The questions of all subjects."""
        tallies = self.by_subject.values()
        return Tally(
            sum(item.common for item in tallies),
            sum(item.dropped_baseline for item in tallies),
            sum(item.dropped_run for item in tallies),
        )


def intersections(
    names: Sequence[str],
    evaluations: Mapping[str, Evaluation],
    answers: Mapping[str, Answers | None],
    family: str | None,
) -> dict[int, Intersection]:
    """Finds what each scored run has in common with the baseline.

    Args:
        names: Labels of the runs, the baseline first.
        evaluations: Of the family, by label.
        answers: Their answers question by question, by label.
        family: The task family compared, or None.

    Returns:
        The intersections by index of the run.

    Raises:
        ComparisonError: The baseline or no other run is scored, a scored run has no
            answers question by question, or one has no question in common with the baseline.
    """
    first = names[0]
    if family is None or first not in evaluations or len(evaluations) < 2:
        missing = [name for name in names if name not in evaluations]
        raise ComparisonError(
            f"--intersect: {', '.join(missing)} not scored on {family or 'any MMLU task'}, so "
            "there are no common questions",
            "Score the baseline and another run, or leave --intersect out",
        )
    unlogged = [name for name in evaluations if answers.get(name) is None]
    if unlogged:
        raise ComparisonError(
            f"--intersect: no logged samples and no mmlu_progress file of {family} in "
            f"{', '.join(unlogged)}, so which questions were answered is unknown",
            "Score again with lm_eval --log_samples",
        )
    found = {}
    for index, name in enumerate(names[1:], start=1):
        if name in evaluations:
            one, other = answers[first] or {}, answers[name] or {}
            if not one.keys() & other.keys():
                raise ComparisonError(
                    f"--intersect: {first} and {name} have no question of {family} in common "
                    f"({len(one):,} and {len(other):,} answered)",
                    "Score both on the same questions, or leave one out",
                )
            found[index] = Intersection(first, name, family, _tally(one, other))
    return found


def _tally(one: Answers, other: Answers) -> dict[str, Tally]:
    subjects = sorted({question.subject for question in (*one, *other)})
    common = _sizes(one.keys() & other.keys())
    first, second = _sizes(one.keys() - other.keys()), _sizes(other.keys() - one.keys())
    return {
        subject: Tally(common.get(subject, 0), first.get(subject, 0), second.get(subject, 0))
        for subject in subjects
    }


def _sizes(questions: Collection[Question]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for question in questions:
        sizes[question.subject] = sizes.get(question.subject, 0) + 1
    return sizes


def notes(found: Mapping[int, Intersection]) -> list[str]:
    """Returns what a reader has to know about questions that were dropped.

    Args:
        found: By index of the run.
    """
    return [
        f"{item.run} against {item.baseline}: compared on the {item.total.common:,} questions of "
        f"{item.family} that both answered (--intersect); dropped: {item.total.dropped_baseline:,} "
        f"of {item.baseline}, {item.total.dropped_run:,} of {item.run}."
        for item in found.values()
        if item.total.dropped
    ]


def any_dropped(found: Mapping[int, Intersection]) -> bool:
    """Returns whether a question of any run was dropped.

    Args:
        found: By index of the run; empty without --intersect.
    """
    return any(item.total.dropped for item in found.values())


def common_words(size: int | None) -> str:
    """Says over how many questions a number is that all runs have in common.

    Args:
        size: The number of questions, or None where each run answered the same ones.
    """
    return "" if size is None else f", {size:,} questions common to all runs"


def common_to_all(answers: Mapping[str, Answers | None]) -> set[Question]:
    """Returns the questions that every run whose answers are known answered.

    Args:
        answers: Answers question by question, by label.
    """
    sets = [item.keys() for item in answers.values() if item is not None]
    return set(sets[0]).intersection(*sets[1:]) if sets else set()


def restrict(
    evaluation: Evaluation, answers: Answers, questions: Collection[Question]
) -> Evaluation:
    """Returns an evaluation over a part of its questions.

    Standard errors are those of the record: within subjects, pooled as lm_eval does.

    Args:
        evaluation: The evaluation.
        answers: Its answers question by question.
        questions: At least one of them.

    Returns:
        Accuracies, counts, subjects and categories of these questions.
    """
    by_subject: dict[str, list[bool]] = {}
    for question in sorted(questions):
        by_subject.setdefault(question.subject, []).append(answers[question].right)
    places = category_of(evaluation.family)
    scores = {subject: _score(marks) for subject, marks in by_subject.items()}
    subjects = {name: SubjectScore(score["acc"], score["n"]) for name, score in scores.items()}
    total = micro_macro(list(scores.values()))
    categories = {
        name: micro_macro([scores[s] for s in scores if places.get(s) == name])
        for name in dict.fromkeys(places[s] for s in scores if s in places)
    }
    return replace(
        evaluation,
        **total,
        ties=sum(answers[question].tied for question in questions),
        letters=count_letters(answers[question] for question in questions),
        prompts_sha256=None,
        subjects=subjects,
        categories={
            name: CategoryScore(item["acc"], item["acc_stderr"], item["n"])
            for name, item in categories.items()
        },
    )


def _score(marks: Sequence[bool]) -> dict[str, Any]:
    mean, error = accuracy(marks)
    return {"acc": mean, "acc_stderr": error, "n": len(marks), "correct": sum(marks)}


def category_of(family: str | None) -> dict[str, str]:
    """Returns the category of each subject of a family that has one.

    Args:
        family: For example mmlu_qlora_5shot.
    """
    listed = families().get(str(family), {}).get("categories", {})
    return {subject: name for name, subjects in listed.items() for subject in subjects}

"""Whether runs may be compared, and every setting in which they differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from qlora_harness.compare.answers import Answer, Question
from qlora_harness.compare.evaluation import DEFAULT_FAMILY, Evaluation
from qlora_harness.compare.runs import Run, TrainingSummary
from qlora_harness.errors import ComparisonError
from qlora_harness.settings import BOOKKEEPING, NOTABLE_SHARE

# `verify` scores some texts a second time, which changes nothing.
_FOLLOWS = re.compile(
    r"\.(arm|output_dir|results_dir|peft|peft_sha|model_num_parameters|parameter_dtypes\..+|verify)$"
)
_SETTINGS = "training.settings."
# What two arms and their seeds are meant to differ in.
_INTENDED = ("quant", "double_quant", "seed")
_SAME_QUESTIONS = "Score all runs with the same task, data folder and template"
_INTERSECT = "--intersect to compare on the questions that both answered"


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: Its dotted name in the records, for example training.settings.learning_rate.
        values: Its value in each run, None where the run doesn't record it; where all agree, the
            one value.
    """

    name: str
    values: tuple[object, ...]


@dataclass(frozen=True)
class Conditions:
    """How the conditions of the runs relate.

    Attributes:
        different: Every setting in which they differ.
        same: Every recorded setting in which they don't, with the one value.
    """

    different: tuple[Setting, ...]
    same: tuple[Setting, ...]


def choose_family(runs: Sequence[Run], asked: str | None) -> str | None:
    """Chooses the task family to compare.

    Args:
        runs: The runs; those without any evaluation don't take part, unless a family is asked for.
        asked: The value of --task.

    Returns:
        The family, or None if no run has an evaluation.

    Raises:
        ComparisonError: The family asked for isn't in every run, none is, or several are.
    """
    if asked is not None:
        for run in runs:
            if asked not in run.evaluations:
                _refuse_family(runs, f"--task {asked}: {run.path} has no such evaluation")
        return asked
    evaluated = [run for run in runs if run.evaluations]
    if not evaluated:
        return None
    common = [
        family
        for family in evaluated[0].evaluations
        if all(family in run.evaluations for run in evaluated)
    ]
    if DEFAULT_FAMILY in common:
        return DEFAULT_FAMILY
    if len(common) == 1:
        return common[0]
    if common:
        raise ComparisonError(
            f"the runs have several evaluations in common: {', '.join(common)}",
            f"Choose one, for example --task {common[0]}",
        )
    _refuse_family(runs, "the runs have no evaluation in common")


def _refuse_family(runs: Sequence[Run], problem: str) -> NoReturn:
    held = "; ".join(f"{run.path}: {', '.join(run.evaluations) or 'none'}" for run in runs)
    raise ComparisonError(
        f"{problem} (found {held})",
        "Score every run with the same task, or name a family that all have with --task",
    )


def check_substance(runs: Sequence[Run]) -> None:
    """Checks that at least two runs hold the same sort of numbers.

    Args:
        runs: The runs.

    Raises:
        ComparisonError: One run was only trained and the other only scored.
    """
    trained = sum(run.training is not None for run in runs)
    evaluated = sum(bool(run.evaluations) for run in runs)
    if trained < 2 and evaluated < 2:
        held = "; ".join(
            f"{run.path}: {'training' if run.training else 'evaluation'} only" for run in runs
        )
        raise ComparisonError(
            f"the runs have no numbers of the same sort ({held})", "Score the trained run"
        )


def check_data(runs: Sequence[Run], allow_different: bool) -> list[str]:
    """Checks that the runs were trained and evaluated on the same data.

    Args:
        runs: The runs; those that were not trained here don't take part.
        allow_different: The value of --allow-different-data.

    Returns:
        Notes for the reader.

    Raises:
        ComparisonError: A fingerprint differs and that was not allowed.
    """
    notes = []
    for part in ("train", "eval"):
        found = {
            run.label: fingerprint
            for run in runs
            if run.training is not None
            and (fingerprint := getattr(run.training, f"{part}_fingerprint")) is not None
        }
        if len(set(found.values())) < 2:
            continue
        values = ", ".join(f"{label} {_short(value)}" for label, value in found.items())
        if not allow_different:
            raise ComparisonError(
                f"different data: data.{part}.fingerprint is {values}",
                "Train on the same data, or pass --allow-different-data to compare all the same",
            )
        notes.append(
            f"Different data (data.{part}.fingerprint: {values}): the "
            f"{'training' if part == 'train' else 'evaluation'} losses are not comparable."
        )
    return notes


def share_data(first: Run, other: Run) -> bool:
    """Returns whether two runs were trained and evaluated on the same data, as far as is recorded.

    Args:
        first: A run.
        other: Another.
    """
    one, two = first.training, other.training
    if one is None or two is None:
        return True
    pairs = (
        (one.train_fingerprint, two.train_fingerprint),
        (one.eval_fingerprint, two.eval_fingerprint),
    )
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def training_settings(training: TrainingSummary) -> dict[str, object]:
    """Returns the settings that decide what a run computes, by their short names.

    Args:
        training: Its summary.
    """
    settings = {
        name.removeprefix(_SETTINGS): value
        for name, value in training.conditions.items()
        if name.startswith(_SETTINGS)
    }
    return {name: value for name, value in settings.items() if name not in BOOKKEEPING}


def settings_notes(runs: Sequence[Run]) -> list[str]:
    """Says in which training settings the runs differ beside quantisation and seed.

    Args:
        runs: The runs; those that were not trained here don't take part.

    Returns:
        One note, or none.
    """
    found = [training_settings(run.training) for run in runs if run.training is not None]
    names = [
        name
        for name in dict.fromkeys(name for settings in found for name in settings)
        if name not in _INTENDED and any(s.get(name) != found[0].get(name) for s in found)
    ]
    if not names:
        return []
    return [
        "The runs differ in training settings other than quantisation and seed: "
        f"{', '.join(names)}."
    ]


def quantisation_notes(runs: Sequence[Run]) -> list[str]:
    """Says which runs hold a notable part of their layers in 16 bits in spite of their name.

    Args:
        runs: The runs.
    """
    notes = []
    for run in runs:
        shares = [run.training.unquantised_share] if run.training is not None else []
        shares += [evaluation.unquantised_share for evaluation in run.evaluations.values()]
        share = max((value for value in shares if value is not None), default=0.0)
        if share > NOTABLE_SHARE:
            notes.append(
                f"{run.label} is quantised in part only: {100 * share:.0f}% of the weights of its "
                "layers stay in 16 bits."
            )
    return notes


def check_limit(
    evaluations: Mapping[str, Evaluation], allow: bool, intersect: bool = False
) -> list[str]:
    """Checks that no run answered only a part of the questions.

    Args:
        evaluations: The evaluations of one family, by label of the run.
        allow: The value of --allow-limit.
        intersect: The value of --intersect, with which limits may differ.

    Returns:
        Notes for the reader.

    Raises:
        ComparisonError: A run was limited and that was not allowed, or the limits differ.
    """
    limited = {label: item for label, item in evaluations.items() if item.limited}
    if not limited:
        return []
    if intersect:
        return [
            f"{label}: only {_part(item)} were asked: this is not a result on {item.family}."
            for label, item in limited.items()
        ]
    label, evaluation = next(iter(limited.items()))
    part = _part(evaluation)
    if not allow:
        raise ComparisonError(
            f"{label} answered only {part} (--limit or single subjects; {evaluation.path})",
            "Score all questions, or pass --allow-limit where all runs have the same limit, or "
            f"{_INTERSECT}",
        )
    if len({(item.n, item.n_total) for item in evaluations.values()}) > 1:
        counts = ", ".join(
            f"{label} {item.n:,} of {item.n_total:,}" for label, item in evaluations.items()
        )
        raise ComparisonError(
            f"the runs have different limits: {counts}",
            f"Score all runs with the same --limit, or pass {_INTERSECT}",
        )
    return [f"Only {part} were asked: this is not a result on {evaluation.family}."]


def _part(evaluation: Evaluation) -> str:
    return f"{evaluation.n:,} of {evaluation.n_total:,} questions of {evaluation.family}"


def check_questions(
    evaluations: Mapping[str, Evaluation],
    answers: Mapping[str, Mapping[Question, Answer] | None],
    intersect: bool = False,
) -> list[str]:
    """Checks that every run answered the same questions, as far as the files can tell.

    Args:
        evaluations: The evaluations of one family, by label of the run.
        answers: Their answers, where samples or an mmlu_progress file hold them.
        intersect: The value of --intersect: only the questions that both answered must be the
            same. All runs have answers then.

    Returns:
        Notes for the reader.

    Raises:
        ComparisonError: The questions differ in number, or in the hash of document, prompt or
            answer.
    """
    labels = list(evaluations)
    if len(labels) < 2:
        return []
    first, unproven = labels[0], []
    for label in labels[1:]:
        one, other = answers.get(first), answers.get(label)
        logged = one is not None and other is not None
        if not intersect:
            _check_sizes(first, evaluations[first], label, evaluations[label], logged)
        if one is not None and other is not None:
            if not intersect:
                _check_places(first, one, label, other)
            _check_hashes(first, one, label, other)
            if one.keys() != other.keys():
                continue  # a hash over all prompts says nothing about a part of them
        proven = _check_prompts(first, evaluations[first], label, evaluations[label])
        if not proven and not logged:
            unproven.append(label)
    return [
        f"{first} and {label}: that the questions are the same could be checked only by their "
        "number per subject (no samples or mmlu_progress file, and no prompt hash, in both)."
        for label in unproven
    ]


def _check_sizes(first: str, one: Evaluation, label: str, other: Evaluation, logged: bool) -> None:
    offer = f"pass {_INTERSECT}"
    if not logged:
        offer = f"log the samples of both (lm_eval --log_samples) and {offer}"

    def refuse(problem: str) -> NoReturn:
        _refuse_questions(first, label, problem, f"{_SAME_QUESTIONS}, or {offer}")

    if one.subjects.keys() != other.subjects.keys():
        odd = sorted(one.subjects.keys() ^ other.subjects.keys())
        refuse(f"subjects in only one of them: {', '.join(odd[:3])}")
    for subject, score in one.subjects.items():
        size = other.subjects[subject].n
        if score.n != size:
            refuse(f"{subject} has {score.n} and {size} questions")
    if one.n_total != other.n_total:
        refuse(f"there are {one.n_total} and {other.n_total} in all")


def _check_prompts(first: str, one: Evaluation, label: str, other: Evaluation) -> bool:
    """Returns whether the hash over all prompts is known in both and equal."""
    if one.prompts_sha256 is None or other.prompts_sha256 is None:
        return False
    if one.prompts_sha256 != other.prompts_sha256:
        hashes = f"{_short(one.prompts_sha256)} and {_short(other.prompts_sha256)}"
        _refuse_questions(first, label, f"prompts_sha256 is {hashes}")
    return True


def _check_places(
    first: str,
    one: Mapping[Question, Answer],
    label: str,
    other: Mapping[Question, Answer],
) -> None:
    odd = sorted(one.keys() ^ other.keys())
    if odd:
        _refuse_questions(
            first,
            label,
            f"{odd[0].subject}, doc_id {odd[0].doc_id} is in only one of them",
            f"{_SAME_QUESTIONS}, or pass {_INTERSECT}",
        )


def _check_hashes(
    first: str,
    one: Mapping[Question, Answer],
    label: str,
    other: Mapping[Question, Answer],
) -> None:
    """Checks the questions that stand in both."""
    for question, answer in one.items():
        if question not in other:
            continue
        part = answer.difference(other[question])
        if part is not None:
            _refuse_questions(
                first,
                label,
                f"{question.subject}, doc_id {question.doc_id}: the {part} hash differs",
            )


def _refuse_questions(
    first: str, label: str, problem: str, remedy: str = _SAME_QUESTIONS
) -> NoReturn:
    raise ComparisonError(f"{first} and {label} answered different questions: {problem}", remedy)


def compare_conditions(runs: Sequence[Run], family: str | None) -> Conditions:
    """Compares every recorded setting of the runs.

    Args:
        runs: The runs.
        family: The family compared, or None.
    """
    parts = [
        _compare_part(
            "training",
            [None if run.training is None else run.training.conditions for run in runs],
        )
    ]
    if family is not None:
        found = [run.evaluations.get(family) for run in runs]
        parts.append(
            _compare_part(
                "evaluation", [None if item is None else item.conditions for item in found]
            )
        )
    different = [setting for part in parts for setting in part.different]
    same = tuple(setting for part in parts for setting in part.same)
    return Conditions(tuple(_without_echoes(different)), same)


def _without_echoes(settings: Sequence[Setting]) -> Iterator[Setting]:
    """Leaves out what changes nothing, or only follows from another line.

    The records hold `quant` in several places, and the arm's name, its folder, the dtypes of its
    weights and the number of them follow from it.
    """
    seen: set[tuple[str, object]] = set()
    for setting in settings:
        leaf = setting.name.rsplit(".", 1)[-1]
        recorded = [value for value in setting.values if value is not None]
        known = {(leaf, _hashable(list(setting.values))), (leaf, _hashable(recorded))}
        if not known & seen and not _FOLLOWS.search(setting.name):
            yield setting
        seen |= known


def _hashable(value: object) -> object:
    """Returns lists, also within lists, as tuples; objects within lists as their text."""
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return str(value) if isinstance(value, Mapping) else value


def _compare_part(name: str, records: Sequence[Mapping[str, object] | None]) -> Conditions:
    present = [record for record in records if record is not None]
    different: list[Setting] = []
    if present and len(present) < len(records):
        # One line instead of every setting of the others against nothing.
        values = tuple(None if record is None else "recorded" for record in records)
        different.append(Setting(f"{name} (as a whole)", values))
    same: list[Setting] = []
    for key in dict.fromkeys(key for record in present for key in record):
        found = tuple(record.get(key) for record in present)
        if all(value == found[0] for value in found[1:]):
            if found[0] is not None and len(present) > 1:
                same.append(Setting(key, found[:1]))
        else:
            different.append(
                Setting(key, tuple(None if item is None else item.get(key) for item in records))
            )
    return Conditions(tuple(different), tuple(same))


def _short(digest: str) -> str:
    """Returns the beginning of a hash, long enough to tell two apart."""
    kind, _, digits = digest.rpartition(":")
    return f"{kind}:{digits[:12]}" if kind else digits[:12]

"""Designs over several runs: base and fine-tuned in 4 and 16 bits, and several seeds an arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora_harness.compare.answers import Answer, Question
from qlora_harness.compare.conditions import training_settings
from qlora_harness.compare.evaluation import Evaluation
from qlora_harness.compare.runs import Run, TrainingSummary

Answers = Mapping[Question, Answer]
_PLACES = {
    (False, False): "the base model in 16 bits",
    (True, False): "the base model in 4 bits",
    (False, True): "fine-tuned in 16 bits",
    (True, True): "fine-tuned in 4 bits",
}


@dataclass(frozen=True)
class Effect:
    """A difference of accuracies within a design, as a share.

    Attributes:
        key: Its name for programs.
        name: Its name for people.
        value: The difference.
        stderr: Its standard error over questions, paired where all runs have samples; None if
            unknown.
        paired: Whether it is.
        run: Label of the run that another is subtracted from; of the interaction, both runs of the
            difference that another is subtracted from.
    """

    key: str
    name: str
    value: float
    stderr: float | None
    paired: bool
    run: str


@dataclass(frozen=True)
class Design:
    """The four runs of base and fine-tuned model in 4 and 16 bits.

    Attributes:
        effects: What differs within the design; empty where the runs are not such a design.
        problem: Why not, where each of the four places is taken; else None.
    """

    effects: tuple[Effect, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class ArmSeeds:
    """Runs of one arm that differ in their seed.

    Attributes:
        name: For example "nf4".
        seeds: Their seeds.
        values: What was measured, one a run.
        runs: Labels of the runs.
    """

    name: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    runs: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Standard deviation between seeds (n - 1); None for one seed."""
        return None if len(self.values) < 2 else statistics.stdev(self.values)

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean over seeds; None for one seed."""
        return None if self.sd is None else self.sd / math.sqrt(len(self.values))


@dataclass(frozen=True)
class Seeds:
    """Arms of which at least one has several seeds.

    Attributes:
        arms: The arms; empty where the runs are no such arms.
        problem: Why not, where some arm has several seeds; else None.
    """

    arms: tuple[ArmSeeds, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class SeedDifference:
    """Mean of one arm less that of another, and what the seeds alone do to it.

    Attributes:
        value: The difference, in the unit of the measure.
        pooled_sd: Standard deviation between seeds within an arm, in the same unit, pooled over
            the arms.
        stderr: Standard error of the difference that the seeds cause; None where one of the two
            arms has one seed, as nothing tells its spread.
        freedom: Degrees of freedom of the two: runs less arms.
    """

    value: float
    pooled_sd: float
    stderr: float | None
    freedom: int

    @property
    def relative_stderr(self) -> float | None:
        """Standard error / size of the difference; None if that is undefined.

        Its inverse is the size of Student's t for the two arms, to be judged by the degrees of
        freedom. The name is that of survey statistics (Parker et al., National Center for Health
        Statistics, Vital and Health Statistics 2(175), 2017).
        """
        if self.stderr is None or self.value == 0:
            return None
        return self.stderr / abs(self.value)


def seed_difference(first: ArmSeeds, other: ArmSeeds, arms: Sequence[ArmSeeds]) -> SeedDifference:
    """Compares two arms of a one-way layout, in which the seeds are the replicates.

    With s² the mean square within arms, sum (x - mean of its arm)² / (N - k) over the N runs of
    all k arms, the standard error is s sqrt(1/n₁ + 1/n₂) (Scheffé, The Analysis of Variance, 1959,
    chapter 3). It takes the spread between seeds to be the same in every arm.

    Args:
        first: The arm that is subtracted.
        other: The other arm.
        arms: All arms, these two among them.

    Raises:
        ValueError: No arm has two seeds.
    """
    freedom = sum(len(arm.values) - 1 for arm in arms)
    if freedom == 0:
        raise ValueError("no arm has two seeds")
    within = math.fsum((value - arm.mean) ** 2 for arm in arms for value in arm.values)
    pooled = math.sqrt(within / freedom)
    sizes = len(first.values), len(other.values)
    stderr = pooled * math.sqrt(1 / sizes[0] + 1 / sizes[1]) if min(sizes) > 1 else None
    # Means that differ by rounding alone are equal: such a difference has no relative error.
    equal = math.isclose(other.mean, first.mean, rel_tol=1e-12)
    return SeedDifference(0.0 if equal else other.mean - first.mean, pooled, stderr, freedom)


def question_stderr(
    first: ArmSeeds, other: ArmSeeds, answers: Mapping[str, Answers | None]
) -> float | None:
    """Returns what other questions would do to the difference of two arms' mean accuracies.

    The standard error of the mean over questions of how many more of an arm's seeds are right, as
    a share. Seeds and questions are crossed: their standard errors add as squares, where the
    interaction of both is small.

    Args:
        first: The arm that is subtracted.
        other: The other arm.
        answers: Of each run, by label, where they are known.

    Returns:
        None where the answers of a run are not known, or are to other questions.
    """
    weights = {label: -1 / len(first.runs) for label in first.runs}
    weights |= {label: 1 / len(other.runs) for label in other.runs}
    known = {label: one for label in weights if (one := answers.get(label)) is not None}
    if len(known) < len(weights) or not known or not _same_questions(list(known.values())):
        return None
    return _paired_stderr(known, weights)


def place(run: Run, evaluation: Evaluation | None) -> tuple[bool, bool] | None:
    """Returns whether a scored run is 4-bit, and whether it is fine-tuned; None if unknown.

    Args:
        run: The run.
        evaluation: Its evaluation.
    """
    if evaluation is None:
        return None
    quant = evaluation.conditions.get("evaluation.model.quant")
    if quant is None and run.training is not None:
        quant = run.training.quant
    if quant not in ("nf4", "fp4", "bf16"):
        return None
    adapter = evaluation.conditions.get("evaluation.model.adapter_sha256")
    adapter = adapter or evaluation.conditions.get("evaluation.model.peft")
    return quant != "bf16", bool(adapter) or run.training is not None


def effects(
    runs: Sequence[Run],
    evaluations: Mapping[str, Evaluation],
    answers: Mapping[str, Answers | None],
) -> Design:
    """Separates what quantisation costs from what fine-tuning gains.

    Args:
        runs: The runs.
        evaluations: Of one family, by label.
        answers: Their answers question by question, where they are known.

    Returns:
        The effects, if each of the four places is taken by exactly one run.
    """
    taken: dict[tuple[bool, bool], list[str]] = {}
    for run in runs:
        where = place(run, evaluations.get(run.label))
        if where is not None:
            taken.setdefault(where, []).append(run.label)
    if len(taken) < 4:
        return Design()
    for where, labels in taken.items():
        if len(labels) > 1:
            together = "both" if len(labels) == 2 else "all"
            return Design(problem=f"{' and '.join(labels)} are {together} {_PLACES[where]}")
    found = {where: labels[0] for where, labels in taken.items()}
    models = {
        str(evaluations[label].conditions.get("evaluation.model.base")) for label in found.values()
    }
    if len(models) > 1:
        return Design(problem=f"the base models differ ({', '.join(sorted(models))})")
    logged = {label: answers.get(label) for label in found.values()}
    samples = {label: one for label, one in logged.items() if one is not None}
    # In all effects or in none, so that their errors can be compared.
    paired = len(samples) == 4 and _same_questions(list(samples.values()))
    base, base4, tuned, tuned4 = (
        found[key] for key in ((False, False), (True, False), (False, True), (True, True))
    )

    def effect(key: str, name: str, weights: Mapping[str, int], run: str | None = None) -> Effect:
        run = run or next(iter(weights))
        value = sum(w * evaluations[label].acc for label, w in weights.items())
        if paired:
            return Effect(key, name, value, _paired_stderr(samples, weights), True, run)
        errors = [evaluations[label].acc_stderr for label in weights]
        known = [error for error in errors if error is not None]
        stderr = math.hypot(*known) if len(known) == len(errors) else None
        return Effect(key, name, value, stderr, False, run)

    return Design(
        (
            effect("quantisation_base", "Change by 4 bits, base model", {base4: 1, base: -1}),
            effect(
                "quantisation_tuned", "Change by 4 bits, fine-tuned model", {tuned4: 1, tuned: -1}
            ),
            effect("tuning_16bit", "Gain by fine-tuning in 16 bits", {tuned: 1, base: -1}),
            effect("tuning_4bit", "Gain by fine-tuning in 4 bits", {tuned4: 1, base4: -1}),
            effect(
                "interaction",
                "How much more fine-tuning gains in 4 bits",
                {tuned4: 1, base4: -1, tuned: -1, base: 1},
                f"{tuned4} less {base4}",
            ),
        )
    )


def _same_questions(answers: Sequence[Answers]) -> bool:
    first = answers[0]
    return all(
        other.keys() == first.keys()
        and all(answer.difference(other[question]) is None for question, answer in first.items())
        for other in answers[1:]
    )


def _paired_stderr(answers: Mapping[str, Answers], weights: Mapping[str, float]) -> float:
    """Of the mean over questions of a weighted sum of right answers."""
    questions = next(iter(answers.values()))
    values = [
        sum(weight * answers[label][question].right for label, weight in weights.items())
        for question in questions
    ]
    return statistics.pstdev(values) / math.sqrt(len(values))


def seeds(
    runs: Sequence[Run],
    measure: Callable[[Run], float | None],
    *,
    same_evaluation: bool,
) -> Seeds:
    """Groups runs that differ in their seed alone (and in what follows from it) by arm.

    Args:
        runs: The runs.
        measure: What is summarised; None leaves a run out.
        same_evaluation: Whether the measure is one of the evaluation data, which must be the same
            then.

    Returns:
        The arms in the order of their first runs, if some arm has several seeds.
    """
    groups: dict[str, list[tuple[Run, TrainingSummary, int, float]]] = {}
    for run in runs:
        training = run.training
        if training is None or training.quant is None or training.status != "completed":
            continue
        seed, value = _seed(training), measure(run)
        if seed is not None and value is not None:
            groups.setdefault(training.quant, []).append((run, training, seed, value))
    if not any(len({seed for _, _, seed, _ in group}) > 1 for group in groups.values()):
        return Seeds()
    for group in groups.values():
        first, one, _, _ = group[0]
        seen: dict[int, str] = {}
        for run, training, seed, _ in group:
            both = f"{first.label} and {run.label}"
            if names := _different(one, training):
                return Seeds(problem=f"{both} differ in {', '.join(names)}, not only in the seed")
            if one.train_fingerprint != training.train_fingerprint:
                return Seeds(problem=f"{both} were trained on different data")
            if seed in seen:  # a copy of a run is no further seed
                return Seeds(problem=f"{seen[seed]} and {run.label} have the same seed, {seed}")
            seen[seed] = run.label
    trained = [member for group in groups.values() for member in group]
    for run, training, _, _ in trained:
        if same_evaluation and training.eval_fingerprint != trained[0][1].eval_fingerprint:
            both = f"{trained[0][0].label} and {run.label}"
            return Seeds(problem=f"{both} were evaluated on different data")
    return Seeds(
        tuple(
            ArmSeeds(
                name,
                tuple(seed for _, _, seed, _ in group),
                tuple(value for _, _, _, value in group),
                tuple(run.label for run, _, _, _ in group),
            )
            for name, group in groups.items()
        )
    )


def only_seed_differs(first: Run, other: Run) -> bool:
    """Returns whether two completed runs are of one arm and differ in their seed alone.

    Args:
        first: A run.
        other: Another.
    """
    one, two = first.training, other.training
    if one is None or two is None or None in (one.quant, _seed(one), _seed(two)):
        return False
    return (
        one.status == two.status == "completed"
        and one.quant == two.quant
        and _seed(one) != _seed(two)
        and one.train_fingerprint == two.train_fingerprint
        and not _different(one, two)
    )


def _seed(training: TrainingSummary) -> int | None:
    seed = training_settings(training).get("seed")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def _different(one: TrainingSummary, two: TrainingSummary) -> list[str]:
    """Names the settings, and what is recorded of the model, in which two runs differ."""
    first, second = ({**training_settings(t), **_model(t)} for t in (one, two))
    names = dict.fromkeys([*first, *second])
    return [name for name in names if name != "seed" and first.get(name) != second.get(name)]


def _model(training: TrainingSummary) -> dict[str, object]:
    prefix = "training.model."
    return {
        f"model.{name.removeprefix(prefix)}": value
        for name, value in training.conditions.items()
        if name.startswith(prefix)
    }

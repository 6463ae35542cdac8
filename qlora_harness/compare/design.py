"""Designs over several runs: base and fine-tuned in 4 and 16 bits, and several seeds an arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora_harness.compare.answers import Answer, Question
from qlora_harness.compare.evaluation import Evaluation
from qlora_harness.compare.runs import Run

Answers = Mapping[Question, Answer]
_SEED = "training.settings.seed"


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
class ArmSeeds:
    """Runs of one arm that differ in their seed.

    Attributes:
        name: For example "nf4".
        seeds: Their seeds.
        values: What was measured, one a run.
    """

    name: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]

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
class SeedDifference:
    """Mean of one arm less that of another, and what the seeds alone do to it.

    Attributes:
        value: The difference, in the unit of the measure.
        pooled_sd: Standard deviation between seeds within an arm, in the same unit, pooled over
            the arms.
        stderr: Standard error of the difference that the seeds cause; None where one of the two
            arms has one seed, as nothing tells its spread.
    """

    value: float
    pooled_sd: float
    stderr: float | None

    @property
    def relative_stderr(self) -> float | None:
        """The seeds' share of the difference: standard error / size; None if that is undefined.

        Its inverse is the size of Student's t for the two arms: 0.5 is a t of 2. The name is that
        of survey statistics (Parker et al., National Center for Health Statistics, Vital and
        Health Statistics 2(175), 2017).
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
    # Means that differ by rounding alone are equal: no share of such a difference.
    equal = math.isclose(other.mean, first.mean, rel_tol=1e-12)
    return SeedDifference(0.0 if equal else other.mean - first.mean, pooled, stderr)


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
) -> tuple[Effect, ...]:
    """Separates what quantisation costs from what fine-tuning gains.

    Args:
        runs: The runs.
        evaluations: Of one family, by label.
        answers: Their answers question by question, where they are known.

    Returns:
        The effects, or nothing unless each of the four places is taken by exactly one run.
    """
    found: dict[tuple[bool, bool], str] = {}
    for run in runs:
        where = place(run, evaluations.get(run.label))
        if where is None:
            continue
        if where in found:
            return ()
        found[where] = run.label
    if len(found) < 4:
        return ()
    models = {
        evaluations[label].conditions.get("evaluation.model.base") for label in found.values()
    }
    if len(models) > 1:
        return ()
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

    return (
        effect("quantisation_base", "4 bits, on the base", {base4: 1, base: -1}),
        effect("quantisation_tuned", "4 bits, after fine-tuning", {tuned4: 1, tuned: -1}),
        effect("tuning_16bit", "Fine-tuning, in 16 bits", {tuned: 1, base: -1}),
        effect("tuning_4bit", "Fine-tuning, in 4 bits", {tuned4: 1, base4: -1}),
        effect(
            "interaction",
            "Fine-tuning in 4 bits less in 16",
            {tuned4: 1, base4: -1, tuned: -1, base: 1},
            f"{tuned4} less {base4}",
        ),
    )


def _same_questions(answers: Sequence[Answers]) -> bool:
    first = answers[0]
    return all(
        other.keys() == first.keys()
        and all(answer.difference(other[question]) is None for question, answer in first.items())
        for other in answers[1:]
    )


def _paired_stderr(answers: Mapping[str, Answers], weights: Mapping[str, int]) -> float:
    """Of the mean over questions of a weighted sum of right answers."""
    questions = next(iter(answers.values()))
    values = [
        sum(weight * answers[label][question].right for label, weight in weights.items())
        for question in questions
    ]
    return statistics.pstdev(values) / math.sqrt(len(values))


def seeds(runs: Sequence[Run], measure: Callable[[Run], float | None]) -> tuple[ArmSeeds, ...]:
    """Groups runs that differ in their seed alone (and in what follows from it) by arm.

    Args:
        runs: The runs.
        measure: What is summarised; None leaves a run out.

    Returns:
        The arms in the order of their first runs, or nothing unless some arm has several seeds.
    """
    groups: dict[str, dict[int, float]] = {}
    same: dict[str, dict[str, object]] = {}
    for run in runs:
        training = run.training
        if training is None or training.quant is None or training.status != "completed":
            continue
        seed, value = training.conditions.get(_SEED), measure(run)
        if not isinstance(seed, int) or value is None:
            continue
        settings = {
            name: setting
            for name, setting in training.conditions.items()
            if name.startswith(("training.settings.", "training.model."))
            and name not in (_SEED, "training.settings.output_dir")
        }
        if same.setdefault(training.quant, settings) != settings:
            return ()  # more than the seed differs
        if seed in groups.setdefault(training.quant, {}):
            return ()  # a copy of a run is no further seed
        groups[training.quant][seed] = value
    if not any(len(group) > 1 for group in groups.values()):
        return ()
    return tuple(
        ArmSeeds(name, tuple(group), tuple(group.values())) for name, group in groups.items()
    )

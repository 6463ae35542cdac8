"""Which tables a comparison holds, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_harness.compare.design import ArmSeeds, effects, question_stderr, seeds
from qlora_harness.compare.evaluation import Evaluation
from qlora_harness.compare.intersection import Answers, Intersection, any_dropped, common_words
from qlora_harness.compare.losses import LossDifference
from qlora_harness.compare.paired import Interval, PairedStatistics
from qlora_harness.compare.runs import Run
from qlora_harness.compare.tables.accuracy import mmlu_table
from qlora_harness.compare.tables.common import common_table
from qlora_harness.compare.tables.design import design_table
from qlora_harness.compare.tables.groups import groups_table
from qlora_harness.compare.tables.losses import losses_table
from qlora_harness.compare.tables.number_text import decimals
from qlora_harness.compare.tables.paired import paired_table
from qlora_harness.compare.tables.seeds import seeds_table
from qlora_harness.compare.tables.table import Table
from qlora_harness.compare.tables.training import training_table


def main_tables(
    runs: Sequence[Run],
    evaluations: Mapping[str, Evaluation],
    paired: Mapping[int, PairedStatistics],
    losses: Mapping[int, LossDifference],
    perplexities: Mapping[int, Interval],
    shared: Mapping[int, Intersection],
) -> tuple[Table, ...]:
    """Builds the tables of training, losses and accuracies that there are numbers for.

    Args:
        runs: The runs, the baseline first.
        evaluations: Of the family compared, by label.
        paired: For each later run whose answers are known, by index, its statistics against
            the first run.
        losses: For each later run, by index, its losses against the first run.
        perplexities: Interval of the perplexity of each run, by index, where it is known.
        shared: With --intersect, what each later run has in common with the first, by index.
    """
    labels = [run.label for run in runs]
    training = training_table(runs)
    found = [] if training is None else [training]
    if losses:
        found.append(losses_table(labels, losses, perplexities))
    if evaluations:
        apart = {index for index, item in shared.items() if item.total.dropped}
        scores = [evaluations.get(label) for label in labels]
        found.append(mmlu_table(labels, scores, apart))
    if shared:
        found.append(common_table(shared))
    if paired:
        common = any_dropped(shared)
        found.append(paired_table(labels, paired, common=common))
        if any(item.categories for item in paired.values()):
            found.append(groups_table(labels, paired, "categories", common=common))
    return tuple(found)


def design_tables(
    runs: Sequence[Run],
    evaluations: Mapping[str, Evaluation],
    answers: Mapping[str, Answers | None],
    common: int | None,
) -> tuple[tuple[Table, ...], list[str]]:
    """Builds the tables that put all runs together: four places of a design, seeds of an arm.

    Args:
        runs: The runs.
        evaluations: Of the family compared, by label, all over the same questions.
        answers: Their answers question by question, where they are known.
        common: The number of these questions, where --intersect dropped others.

    Returns:
        The tables, and notes that say why one that the runs seem to be made for is missing.
    """
    found, notes = [], []
    design = effects(runs, evaluations, answers)
    if design.effects:
        found.append(design_table(design.effects, common))
    if design.problem is not None:
        notes.append(
            "No table of what the 4 bits cost and what fine-tuning gains, which takes one run for "
            f"each of its four places: {design.problem}."
        )

    def accuracy(run: Run) -> float | None:
        item = evaluations.get(run.label)
        return None if item is None else 100 * item.acc

    def over_questions(first: ArmSeeds, other: ArmSeeds) -> float | None:
        error = question_stderr(first, other, answers)
        return None if error is None else 100 * error

    def loss(run: Run) -> float | None:
        return None if run.training is None else run.training.eval_loss

    # A table each: not every run need be scored.
    problems: dict[str, list[str]] = {}
    for key, name, unit, digits, measure, same_evaluation in (
        ("seeds.acc", "Accuracy, micro (%)", "%", 2, accuracy, False),
        ("seeds.eval_loss", "Evaluation loss", "nats", 4, loss, True),
    ):
        seeded = seeds(runs, measure, same_evaluation=same_evaluation)
        if seeded.problem is not None:
            problems.setdefault(seeded.problem, []).append(name)
        if seeded.arms:
            shown = f"{name}{common_words(common)}" if measure is accuracy else name
            errors = over_questions if measure is accuracy else None
            found.append(seeds_table(key, shown, unit, decimals(digits), seeded.arms, errors))
    for problem, names in problems.items():
        notes.append(f"No table over seeds ({'; '.join(names)}): {problem}.")
    return tuple(found), notes

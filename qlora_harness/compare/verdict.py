"""What a comparison says in words: notes on what the numbers are, and a sentence per run."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_harness.compare.constant_answer import ConstantAnswer
from qlora_harness.compare.evaluation import DEMO_FAMILY, Evaluation
from qlora_harness.compare.losses import LossDifference
from qlora_harness.compare.paired import PairedStatistics
from qlora_harness.compare.runs import Run, TrainingSummary
from qlora_harness.compare.statistics import Difference
from qlora_harness.compare.tables.number_text import decimals, interval_text, p_text, points, signed
from qlora_harness.compare.tables.training import GIB, cpu_peak_bytes, gpu_peak_bytes
from qlora_harness.families import LETTERS

DEMO_DATASET = "demo"
_RANDOM = "random weights, so it says nothing"


def run_notes(
    run: Run, evaluation: Evaluation | None, constant: ConstantAnswer | None = None
) -> list[str]:
    """Returns what a reader has to know about one run before quoting its numbers.

    Args:
        run: The run.
        evaluation: Its evaluation that is compared, if any.
        constant: How that does against one letter for all questions, if it is known.
    """
    notes = [] if run.training is None else _training_notes(run.training)
    if has_random_weights(run, evaluation):
        notes.append("random weights: accuracy and loss say nothing")
    elif evaluation is not None and constant is not None and not constant.beaten:
        notes.append(_guessing_note(evaluation, constant))
    if evaluation is not None:
        notes += evaluation.notes
        if evaluation.truncated:
            notes.append(f"{evaluation.truncated:,} prompts were truncated to fit the model")
    return [f"{run.label}: {note}." for note in notes]


def _guessing_note(evaluation: Evaluation, constant: ConstantAnswer) -> str:
    note = (
        f"{100 * evaluation.acc:.2f}% right is not shown to be more than always answering "
        f"{LETTERS[constant.letter]} gives ({100 * constant.accuracy:.2f}%; one-sided exact test, "
        f"{_p_part(constant.p)})"
    )
    if evaluation.letters is not None:
        most = max(range(len(LETTERS)), key=evaluation.letters.__getitem__)
        share = 100 * evaluation.letters[most] / evaluation.n
        note += f"; it answers {LETTERS[most]} to {share:.1f}% of the questions"
    return note


def has_random_weights(run: Run, evaluation: Evaluation | None) -> bool:
    """Returns whether a record of the run says that its base model was never trained.

    Args:
        run: The run.
        evaluation: Its evaluation that is compared, if any.
    """
    trained = run.training is not None and run.training.random_weights
    return trained or (evaluation is not None and evaluation.random_weights)


def _training_notes(summary: TrainingSummary) -> list[str]:
    notes = []
    if summary.status == "interrupted":
        notes.append("the training was interrupted: its numbers are those up to that step")
    if summary.resumed:
        notes.append(
            "the training was resumed from a checkpoint: its time is not a clean measurement"
        )
    if summary.device_type == "cpu":
        notes.append("trained on the CPU: not a GPU measurement")
    elif summary.peak_managed_bytes is None and summary.paged:
        notes.append(
            "its peak memory is what was allocated: the managed memory of its paged optimizer is "
            "not recorded"
        )
    return notes


def shared_notes(runs: Sequence[Run], family: str | None) -> list[str]:
    """Returns what a reader has to know about all runs together.

    Args:
        runs: The runs.
        family: The task family compared, or None.
    """
    notes = []
    trained_on_demo = any(run.training and run.training.dataset == DEMO_DATASET for run in runs)
    if family == DEMO_FAMILY or trained_on_demo:
        what = " and ".join(
            name
            for name, used in (("data", trained_on_demo), ("questions", family == DEMO_FAMILY))
            if used
        )
        notes.append(
            f"The {what}: the embedded demo set: small, made for this project, not a benchmark."
        )
    devices = {run.training.device_name for run in runs if run.training} - {None}
    if len(devices) > 1:
        notes.append("Trained on different devices: memory and time compare the devices, too.")
    if family is None:
        notes.append("No run has an MMLU evaluation.")
    else:
        missing = [run.label for run in runs if family not in run.evaluations]
        if missing:
            notes.append(f"Not scored on {family}: {', '.join(missing)}.")
    untrained = [run.label for run in runs if run.training is None]
    if untrained:
        notes.append(f"No training summary: {', '.join(untrained)}.")
    return notes


def sentence(
    first: Run,
    run: Run,
    difference: Difference | None,
    paired: PairedStatistics | None,
    losses: LossDifference | None,
    family: str | None,
    same_data: bool,
    *,
    guessing: bool = False,
    common: bool = False,
) -> str:
    """Says in one sentence how a run compares with the first.

    Args:
        first: The first run.
        run: The other run.
        difference: The unpaired difference of their micro accuracies, if both have one.
        paired: Their answers question by question, if those of both are known.
        losses: Their losses on the same data, if both have a step log.
        family: The task family compared, or None.
        same_data: Whether both were trained and evaluated on the same data.
        guessing: Whether neither is shown to do better than one letter for all questions.
        common: Whether `paired` is over the common questions of different sets only.
    """
    parts = []
    if first.training is not None and run.training is not None:
        parts += _training_parts(first.training, run.training, losses, same_data)
    random = any(
        has_random_weights(item, item.evaluations.get(str(family))) for item in (first, run)
    )
    if paired is not None:
        parts.append(_paired_part(paired, str(family), random, common))
        if guessing and not random:
            parts[-1] += (
                "; neither is shown to do better than one letter for all questions, so this says "
                "nothing about what they know"
            )
    elif difference is not None:
        parts.append(_unpaired_part(difference, str(family), random))
    if not parts:
        return f"{run.label} and {first.label} have no numbers in common."
    return f"{run.label}, against {first.label}, {_join(parts)}."


def _training_parts(
    first: TrainingSummary,
    other: TrainingSummary,
    losses: LossDifference | None,
    same_data: bool,
) -> list[str]:
    parts = [
        _memory_part("GPU", gpu_peak_bytes(first), gpu_peak_bytes(other)),
        _memory_part("CPU", cpu_peak_bytes(first), cpu_peak_bytes(other)),
    ]
    completed = first.status == other.status == "completed"
    clean = completed and not (first.resumed or other.resumed)
    if clean and first.train_seconds and other.train_seconds is not None:
        parts.append(f"takes {other.train_seconds / first.train_seconds:.2f}× the training time")
    if completed and same_data and first.eval_loss is not None and other.eval_loss is not None:
        change = signed(other.eval_loss - first.eval_loss, decimals(4))
        random = first.random_weights or other.random_weights
        reason = _RANDOM if random else "no error bar"
        if not random and losses is not None and losses.interval is not None:
            low, high = (
                signed(end, decimals(4)) for end in (losses.interval.low, losses.interval.high)
            )
            reason = f"95% interval {low} to {high} over {losses.conversations:,} conversations"
        parts.append(f"changes the evaluation loss by {change} ({reason})")
    return [part for part in parts if part]


def _memory_part(kind: str, first: float | None, other: float | None) -> str:
    if not first or other is None:
        return ""
    change = (other - first) / GIB
    if abs(change) < 0.005:
        return f"uses the same peak {kind} memory"
    word = "more" if change > 0 else "less"
    return f"uses {abs(change):.2f} GiB {word} peak {kind} memory ({other / first:.2f}×)"


def _where(family: str) -> str:
    demo = " (demo questions, not a benchmark)" if family == DEMO_FAMILY else ""
    return f"{family}{demo}"


def _unpaired_part(difference: Difference, family: str, random: bool) -> str:
    text = f"differs on {_where(family)} by {points(difference)} points (unpaired)"
    if random:
        return f"{text}: {_RANDOM}"
    if difference.shown is None:
        return f"{text}: no standard error, so nothing is shown"
    if not difference.shown:
        return f"{text}: no difference shown"
    return f"{text}: a difference is shown (at least 1.96 standard errors)"


def _paired_part(paired: PairedStatistics, family: str, random: bool, common: bool) -> str:
    change = signed(100 * paired.difference.value, decimals(2))
    interval = (
        "too few changed answers for an interval"
        if paired.interval is None
        else f"95% interval {interval_text(paired.interval)}"
    )
    part = f"the {paired.counts.total:,} common questions of " if common else ""
    text = f"differs on {part}{_where(family)} by {change} points ({interval}, paired)"
    if random:
        return f"{text}: {_RANDOM}"
    margin = f"±{100 * paired.margin:g} points"
    p = paired.mcnemar_p if paired.mcnemar_holm is None else paired.mcnemar_holm
    test = f"McNemar {_p_part(p)}"
    if paired.mcnemar_holm is None:
        test += ", uncorrected: only the seed differs"
    if paired.tests > 1:
        test += f" after Holm's correction over {paired.tests} runs"
    shown = "a difference is shown" if paired.different else "no difference is shown"
    within = "is shown to be" if paired.equivalent else "is not shown to be"
    joint = "and" if paired.different == paired.equivalent else "but"
    if not paired.different:
        joint = "and" if paired.equivalent else "but"
    return (
        f"{text}: {shown} ({test}), {joint} it {within} "
        f"within {margin} (two one-sided tests at 5%, "
        f"{_p_part(paired.equivalence_p)})"
    )


def _p_part(p: float) -> str:
    """As "p = 0.02", or "p < 0.0001"."""
    text = p_text(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _join(parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"

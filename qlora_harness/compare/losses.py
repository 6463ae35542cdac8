"""Losses of two runs on the same conversations and on the same steps.

The evaluation loss is a mean over tokens, but conversations are what was sampled: intervals come
from drawing conversations anew with replacement, with all their tokens, and pairs stay together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_harness.compare import fields
from qlora_harness.compare.paired import Interval, percentile_interval
from qlora_harness.compare.runs import Run, TrainingSummary
from qlora_harness.errors import ResultsError
from qlora_harness.record import LOGS_FILE

FEWEST = 20  # conversations, below which a bootstrap says little
_CHUNK = 1000  # draws at a time, to bound memory
_LARGEST = 1e100  # beyond any loss, and sums of so many stay finite
_LARGEST_EXPONENT = 700.0  # whose power of e is still a double


@dataclass(frozen=True)
class StepLog:
    """What a run's step log says.

    Attributes:
        steps: Step numbers.
        losses: Of each step, nats per supervised token.
        tokens: Supervised tokens of each step.
        nll: Summed evaluation loss of each conversation, nats; empty if not recorded.
        learned: Supervised tokens of each of them.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    learned: tuple[int, ...]


@dataclass(frozen=True)
class LossDifference:
    """Second run minus first.

    Attributes:
        evaluation: Difference of the evaluation losses, nats per token; None if unknown.
        interval: Its bootstrap interval.
        conversations: Evaluation conversations.
        steps: Mean difference of the training losses of all steps; None unless both runs took the
            same steps on the same data.
        last_steps: The same over the last tenth of the steps.
    """

    evaluation: float | None
    interval: Interval | None
    conversations: int
    steps: float | None
    last_steps: float | None


def read_log(run: Run) -> StepLog | None:
    """Reads a run's step log; None for a run without one.

    Args:
        run: The run.

    Raises:
        ResultsError: The file is broken, or has not all steps of a completed run.
    """
    path = run.path / LOGS_FILE
    if run.training is None or not path.is_file():
        return None
    record = fields.read_record(path, "training_logs")
    rows = record.get("steps")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise fields.field_error(path, ("steps",), "is not a list of objects with step and loss")
    evaluation = fields.optional_mapping(record, path, "evaluation")
    try:
        log = StepLog(
            tuple(_whole(row["step"]) for row in rows),
            tuple(_number(row["loss"]) for row in rows),
            tuple(_whole(row.get("supervised_tokens", 0)) for row in rows),
            tuple(map(_number, evaluation.get("nll") or ())),
            tuple(map(_whole, evaluation.get("tokens") or ())),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ResultsError(
            f"{path}, key 'steps' or 'evaluation': a step, a loss or a number of tokens is missing "
            "or not a finite number",
            "Restore the file",
        ) from None
    nll, learned = log.nll, log.learned
    if len(nll) != len(learned) or min(learned, default=1) < 1:
        raise ResultsError(
            f"{path}, key 'evaluation': {len(nll)} losses and {len(learned)} numbers of tokens, or "
            "one that is not above 0",
            "Restore the file",
        )
    _check_steps(run.training, log, path)
    _check_summary(run.training, log, path)
    return log


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    found = float(value)
    if not abs(found) < _LARGEST:
        raise ValueError
    return found


def _whole(value: object) -> int:
    found = _number(value)
    if found != int(found):
        raise ValueError
    return int(found)


def _check_steps(training: TrainingSummary, log: StepLog, path: Path) -> None:
    """Checks that the log of a completed run has a row for each step.

    An interrupted run may lack the rows after the last that was written. A resumed run lacks those
    before its checkpoint where the earlier log was not there.
    """
    if training.status != "completed" or training.steps is None:
        return
    found = len(log.steps)
    if found > training.steps or (found < training.steps and not training.resumed):
        raise ResultsError(
            f"{path}, key 'steps': {found} rows, but the summary says {training.steps} steps",
            "Restore the file, or train again",
        )


def _check_summary(training: TrainingSummary, log: StepLog, path: Path) -> None:
    if not log.nll or training.eval_loss is None:
        return
    loss = math.fsum(log.nll) / sum(log.learned)
    if abs(loss - training.eval_loss) > 1e-4:
        raise ResultsError(
            f"{path}: its conversations have an evaluation loss of {loss:.4f}, but the summary "
            f"says {training.eval_loss:.4f}",
            "The files belong to different runs; restore them",
        )


def compare_losses(
    first: Run, other: Run, logs: Mapping[str, StepLog | None], *, draws: int, seed: int
) -> LossDifference | None:
    """Compares the losses of two runs; None where they have none on the same data.

    Args:
        first: The first run.
        other: The other run.
        logs: Step logs by label.
        draws: Samples of the bootstrap.
        seed: Of the random numbers.
    """
    one, two = logs.get(first.label), logs.get(other.label)
    if one is None or two is None or first.training is None or other.training is None:
        return None
    evaluation, interval = None, None
    same = first.training.eval_fingerprint == other.training.eval_fingerprint
    if same and one.nll and one.learned == two.learned:
        evaluation = (math.fsum(two.nll) - math.fsum(one.nll)) / sum(one.learned)
        interval = (
            None
            if len(one.nll) < FEWEST
            else bootstrap(
                [b - a for a, b in zip(one.nll, two.nll, strict=True)],
                one.learned,
                draws=draws,
                seed=seed,
            )
        )
    steps = last = None
    data = first.training.train_fingerprint == other.training.train_fingerprint
    if data and one.losses and one.tokens == two.tokens and any(one.tokens):
        changes = [b - a for a, b in zip(one.losses, two.losses, strict=True)]
        tail = changes[-max(1, len(changes) // 10) :]
        steps, last = math.fsum(changes) / len(changes), math.fsum(tail) / len(tail)
    if evaluation is None and steps is None:
        return None
    return LossDifference(evaluation, interval, len(one.nll), steps, last)


def perplexity_interval(log: StepLog, *, draws: int, seed: int) -> Interval | None:
    """Returns the bootstrap interval of a run's evaluation perplexity.

    Args:
        log: The run's log.
        draws: Samples.
        seed: Of the random numbers.

    Returns:
        The interval; None where there are too few conversations, or where the loss is so high that
        its exponential is no number.
    """
    if len(log.nll) < FEWEST:
        return None
    found = bootstrap(log.nll, log.learned, draws=draws, seed=seed)
    if found.high > _LARGEST_EXPONENT:
        return None
    return Interval(math.exp(found.low), math.exp(found.high))


def bootstrap(nll: Sequence[float], tokens: Sequence[int], *, draws: int, seed: int) -> Interval:
    """Returns the interval of sum(nll) / sum(tokens) over conversations drawn anew.

    Args:
        nll: Summed loss of each conversation, or the difference of two.
        tokens: Its tokens.
        draws: Samples.
        seed: Of the random numbers.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    values, weights = np.asarray(nll), np.asarray(tokens, dtype=np.float64)
    count = len(values)
    means = []
    for start in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - start)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=size)
        means.append((drawn @ values) / (drawn @ weights))
    return percentile_interval(np.concatenate(means))

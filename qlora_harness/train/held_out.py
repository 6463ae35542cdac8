"""The held-out conversations, evaluated before the first step, during training and after it."""

from __future__ import annotations

import math
from collections.abc import Callable

from qlora_harness.data.corpus import TrainingData
from qlora_harness.errors import SettingsError, TrainingError
from qlora_harness.schema.training_records import EvaluationLosses, EvaluationPoint
from qlora_harness.settings import Settings
from qlora_harness.train.evaluation import ConversationLosses
from qlora_harness.train.memory_meter import MemoryMeter
from qlora_harness.train.run_record import RunRecord


def check_held_out(settings: Settings, data: TrainingData) -> None:
    """Raises SettingsError if --eval-steps is set and no conversation is held out."""
    if settings.run.eval_steps is not None and not data.evaluation:
        raise SettingsError(
            f"--eval-steps {settings.run.eval_steps}: no conversation is held out",
            "Raise --eval-fraction, or leave out --eval-steps",
        )


class HeldOut:
    """The evaluations of one run, which draw no random numbers; `every` is --eval-steps.

    Every process must call `evaluate`. `losses` are those up to the checkpoint of a resumed run.
    """

    def __init__(
        self,
        evaluate: Callable[[], ConversationLosses],
        every: int | None,
        losses: EvaluationLosses,
        record: RunRecord,
        memory: MemoryMeter,
    ) -> None:
        self.losses = losses
        self._evaluate, self._every = evaluate, every
        self._record, self._memory = record, memory

    def before(self) -> None:
        """Evaluates the untrained adapter."""
        with self._memory.phase("evaluate_before"):
            untrained = self._evaluate()
        if math.isfinite(untrained.loss):
            self.losses.nll_before, self.losses.tokens = untrained.nll, untrained.tokens

    def is_due(self, step: int, last: int) -> bool:
        """Returns whether `during` must be called after a step; at the last one, `after` serves."""
        if self._every is None or step % self._every or not 0 < step < last:
            return False
        return all(point.step != step for point in self.losses.during)

    def during(self, step: int) -> None:
        """Evaluates after a step; its time and memory don't count as training."""
        with self._record.timed("eval"), self._memory.phase("evaluate_during"):
            evaluation = self._evaluate()
        if math.isfinite(evaluation.loss):
            point = EvaluationPoint(step=step, nll=evaluation.nll)
            self.losses.during, self.losses.tokens = [*self.losses.during, point], evaluation.tokens

    def after(self) -> None:
        """Evaluates the trained adapter; raises TrainingError if its perplexity is not finite."""
        with self._record.timed("eval"), self._memory.phase("evaluate"):
            evaluation = self._evaluate()
        if not math.isfinite(evaluation.perplexity):
            raise TrainingError(
                f"the evaluation loss is {evaluation.loss:g}, too large for a perplexity",
                "Lower --learning-rate, or see in training_logs.json where the loss rises",
            )
        self._record.evaluated(evaluation)
        self.losses.nll, self.losses.tokens = evaluation.nll, evaluation.tokens

"""Steps of another Trainer, timed as our own are: on the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_harness.train.measured_step import Clock
from qlora_harness.train.memory import MemoryMeter


class _Collator:
    """A collator that counts real tokens before they are padded or joined."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate
        self.tokens: list[int] = []

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self._collate(rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collate, name)


class _Clocks(TrainerCallback):  # type: ignore[misc]  # Trainer is untyped to mypy
    """Notes when training begins and when each step ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.points: list[Clock] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins the first step."""
        self.points = [Clock(self._device)]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends a step."""
        self.points.append(Clock(self._device))


def measure_steps(trainer: Any, device: torch.device) -> dict[str, Any]:
    """Trains, and returns what each step took.

    Args:
        trainer: A transformers Trainer with one forward pass a step.
        device: Where it trains.

    Returns:
        `steps`: tokens, seconds and loss of each; `peak_allocated_bytes`, `peak_reserved_bytes`.
    """
    collator = trainer.data_collator = _Collator(trainer.data_collator)
    clocks = _Clocks(device)
    trainer.add_callback(clocks)
    losses: list[torch.Tensor] = []
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = step(*args, **kwargs)
        losses.append(loss.detach().clone())
        return loss

    trainer.training_step = training_step
    meter = MemoryMeter(device, 0)
    with meter.phase("train"):
        trainer.train()
    points = clocks.points
    points[-1].wait()
    seconds = [later.seconds_since(earlier) for earlier, later in pairwise(points)]
    # The loader fetches ahead, so there may be more batches than steps.
    tokens = collator.tokens[: len(seconds)]
    rows = [
        {"tokens": count, "seconds": time, "loss": float(loss)}
        for count, time, loss in zip(tokens, seconds, losses, strict=True)
    ]
    return {
        "steps": rows,
        "peak_allocated_bytes": meter.phases[-1].peak_allocated_bytes,
        "peak_reserved_bytes": meter.phases[-1].peak_reserved_bytes,
    }

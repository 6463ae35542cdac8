"""The memory peak of a training run, predicted from shapes: what `--memory` chooses by.

The peak of a step on one GPU, without the CUDA context. (States of a paged optimizer are on the GPU
while there is room, but torch's allocator does not count them.)

    weights + adapter + optimizer states
    + max(activations that wait + work of one layer, gradients + work of one layer)

Gradients appear layer by layer in the backward pass, as the activations of the layers disappear, so
only the larger of the two counts. What layers take is computed beside them: in `fused.layer`,
`fused.bordered` and `fused.model`, in `model.lora` for PEFT's own modules, and in `model.base`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_harness.model.shape import Shape
from qlora_harness.settings import Settings
from qlora_harness.train.model_shape import uses_fused

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """A predicted peak, in bytes, and the settings that it belongs to."""

    checkpointing: str
    optimizer: str
    adapter_dtype: str
    weights: int  # the base
    adapter: int
    states: int  # of the optimizer
    gradients: int  # of the adapter
    kept: int  # activations that wait for the backward pass
    work: int  # of the layer at work, of the loss, and of full-precision weights beside adapters
    host: int  # pinned memory of the host for activations, at most, beside the peak

    @property
    def peak(self) -> int:
        """The predicted peak."""
        return (
            self.weights + self.adapter + self.states + max(self.kept, self.gradients) + self.work
        )

    def record(self) -> dict[str, Any]:
        """Returns the plan as it is stored."""
        return dataclasses.asdict(self) | {"peak": self.peak}


def predict(shape: Shape, settings: Settings, tokens: int) -> MemoryPlan:
    """Predicts the peak of a step whose largest forward pass has so many tokens.

    Padding counts, where there is any.
    """
    from qlora_harness.fused import bordered, layer, model
    from qlora_harness.model.base import expansion_bytes, weight_bytes
    from qlora_harness.model.lora import peft_activation_bytes

    optimization, lora, rank = settings.optimization, settings.lora, settings.lora.lora_r
    checkpointing, quant = optimization.checkpointing, settings.quant
    size = 2 if settings.model.compute_dtype != "float32" else 4
    parameters = rank * shape.sides
    width = 2 if lora.adapter_dtype == "bfloat16" else 4
    host = 0
    if uses_fused(shape, settings):
        waiting, work = layer.fused_activation_bytes(
            *(shape, rank),
            has_dropout=bool(lora.lora_dropout),
            checkpointing=checkpointing,
            tokens=tokens,
            size=size,
        )
        work += bordered.matrix_bytes(shape, rank, size, is_4bit=quant.is_4bit)
        host = model.host_bytes(shape, checkpointing, tokens, size)
    else:
        waiting, work = peft_activation_bytes(shape, rank, checkpointing, tokens, size)
        work += expansion_bytes(shape, quant, size)
    return MemoryPlan(
        checkpointing=checkpointing,
        optimizer=optimization.optimizer,
        adapter_dtype=lora.adapter_dtype,
        weights=weight_bytes(shape, quant, double_quant=settings.model.double_quant, size=size),
        adapter=parameters * width,
        states=int(parameters * _state_bytes(optimization.optimizer, width)),
        gradients=parameters * width,
        kept=waiting,
        work=work,
        host=host,
    )


def _state_bytes(optimizer: str, width: int) -> float:
    """Two states of a parameter of so many bytes; in 8 bits with a scale for 256 of them."""
    if optimizer == "paged_adamw_32bit":
        return 8.0
    return 2 * (1 + 4 / 256) if "8bit" in optimizer else 2.0 * width


def largest_pass(lengths: Sequence[int], settings: Settings, *, fused: bool) -> int:
    """Returns the tokens of the largest forward pass that a run is likely to have.

    `lengths` are those of all training examples; fused layers take rows without padding.
    """
    count = min(settings.optimization.batch_size, len(lengths))
    longest = sorted(lengths, reverse=True)[:count]
    if not fused:
        return count * longest[0]  # padded
    if settings.optimization.group_by_length:
        return sum(longest)
    # A sum of random lengths: three standard deviations above its mean.
    mean, deviation = statistics.fmean(lengths), statistics.pstdev(lengths)
    return min(sum(longest), int(count * mean + 3 * deviation * math.sqrt(count)))

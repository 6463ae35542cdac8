"""The memory peak of a training run, predicted from shapes: what `--memory` chooses by.

The peak of a step on one GPU, without the CUDA context. (States of a paged optimizer are on the GPU
while there is room, but torch's allocator does not count them.)

    weights + adapter + optimizer states
    + max(kept activations + work of one layer, gradients + work of one layer)

Gradients appear layer by layer in the backward pass, as the kept activations of the layers
disappear, so only the larger of the two counts. For fused layers the terms follow from what
`fused.layer` keeps; for PEFT's own modules they are an estimate.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_harness.settings import Settings
from qlora_harness.train.model_shape import Shape, uses_fused

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """A predicted peak, in bytes.

    Attributes:
        checkpointing: What is kept for the backward pass.
        optimizer: The optimizer.
        adapter_dtype: dtype of the adapter.
        weights: The base.
        adapter: Its adapter.
        states: Of the optimizer.
        gradients: Of the adapter.
        kept: Activations that wait for the backward pass.
        work: Of the layer at work, of the loss, and what full-precision weights grow by when
            adapters stand beside them.
        host: Pinned memory of the host for activations, at most, beside the peak.
    """

    checkpointing: str
    optimizer: str
    adapter_dtype: str
    weights: int
    adapter: int
    states: int
    gradients: int
    kept: int
    work: int
    host: int

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
    """Predicts the peak of a step.

    Args:
        shape: From `measure_shape`.
        settings: Of the run.
        tokens: Of the largest forward pass; with padding where there is any.
    """
    optimization, lora = settings.optimization, settings.lora
    half = settings.model.compute_dtype != "float32"
    size = 2 if half else 4
    quant = settings.quant
    if quant.is_4bit:
        # A scale for 64 weights; with double quantisation a byte, and a scale for 256 of them.
        scale = (1 + 4 / 256) / 64 if settings.model.double_quant else 4 / 64
        weights = int(shape.linear * (0.5 + scale)) + shape.others * size
    else:
        weights = (shape.linear + shape.others) * size
    parameters = lora.lora_r * shape.sides
    width = 2 if lora.adapter_dtype == "bfloat16" else 4
    # Two states each; in 8 bits with a scale for 256 of them.
    state = 2 * (1 + 4 / 256) if "8bit" in optimization.optimizer else 2.0 * width
    if optimization.optimizer == "paged_adamw_32bit":
        state = 8.0
    fused = uses_fused(shape, settings)
    kept, work = (_fused if fused else _plain)(shape, settings, tokens, size)
    if fused:
        matrices = _bordered(shape, lora.lora_r)
        if quant.is_4bit:
            work += max(matrices) * size  # the group that was just expanded
        else:
            work += (sum(matrices) - shape.linear // shape.layers) * size * shape.layers
    elif quant.is_4bit:
        work += shape.largest * size  # the weight that was just expanded
    return MemoryPlan(
        optimization.checkpointing,
        optimization.optimizer,
        lora.adapter_dtype,
        weights,
        parameters * width,
        int(parameters * state),
        parameters * width,
        kept,
        work,
        _on_host(shape, settings, tokens, size) if fused else 0,
    )


def _fused(shape: Shape, settings: Settings, tokens: int, size: int) -> tuple[int, int]:
    """Activations that fused layers keep, and those of the layer at work."""
    hidden, inner, rank = shape.hidden, shape.inner, settings.lora.lora_r * shape.adapted
    first = 2 * hidden + 2 * shape.queries + 2 * shape.keys + rank * 4 / 7
    first += (shape.queries + shape.keys) * shape.head_norms
    second = 2 * inner + rank * 3 / 7
    kept = {
        "none": first + second,
        "selective": first,
        "full": hidden,
        "offload": 0,
    }[settings.optimization.checkpointing]
    # The product of the MLP, which its gradient replaces; what the norms and the stream take.
    work = float(inner + 4 * hidden)
    if settings.lora.lora_dropout:  # a bit for each element that an adapter reads
        work += (5 * hidden + shape.queries + inner) * shape.adapted / 7 / 8 / size
    work += {
        "none": 0,
        "selective": second + 2 * inner,  # gates of another layer come back from the host
        "full": first + second,
        "offload": first + second + hidden,  # the input of the layer below comes back
    }[settings.optimization.checkpointing]
    return int(kept * size * tokens * shape.layers), int(work * size * tokens)


def _on_host(shape: Shape, settings: Settings, tokens: int, size: int) -> int:
    """Bytes that fused layers pin in the host's memory, at most."""
    from qlora_harness.fused.host_memory import pinned_bytes

    layers, elements = {
        # Gates of two layers in three.
        "selective": (shape.layers - -(-shape.layers // 3), 2 * shape.inner),
        "offload": (shape.layers, shape.hidden),
    }.get(settings.optimization.checkpointing, (0, 0))
    return pinned_bytes(layers, elements * size * tokens)


def _bordered(shape: Shape, rank: int) -> list[int]:
    """Elements of a layer's matrices with their adapters around them (`fused.bordered`)."""
    groups = [
        (shape.queries + 2 * shape.keys, shape.hidden, 3),
        (shape.hidden, shape.queries, 1),
        (2 * shape.inner, shape.hidden, 2),
        (shape.hidden, shape.inner, 1),
    ]
    from qlora_harness.fused.bordered import aligned

    share = rank * shape.adapted / 7
    return [int(n + share * count) * aligned(int(k + share * count)) for n, k, count in groups]


def _plain(shape: Shape, settings: Settings, tokens: int, size: int) -> tuple[int, int]:
    """An estimate for PEFT's modules: the logits whole, and activations in several copies."""
    hidden, inner, rank = shape.hidden, shape.inner, settings.lora.lora_r * shape.adapted
    layer = 8 * hidden + 4 * inner + shape.queries + 2 * shape.keys + 2 * rank
    logits = shape.vocabulary * (size + 8)
    if settings.optimization.checkpointing == "none":
        return int(layer * size * tokens * shape.layers), int(logits * tokens)
    work = max(layer * size, logits)
    return int(hidden * size * tokens * shape.layers), int(work * tokens)


def largest_pass(lengths: Sequence[int], settings: Settings, *, fused: bool) -> int:
    """Returns the tokens of the largest forward pass that a run is likely to have.

    Args:
        lengths: Tokens of each training example.
        settings: Of the run.
        fused: Whether fused layers take rows without padding.
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

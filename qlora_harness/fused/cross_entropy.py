"""Cross-entropy from hidden states; on a GPU a few rows of logits at a time.

Nothing is read back from the device: the host would have to wait for it, and couldn't launch ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from qlora_harness.fused import launch

_LOGITS = 2**25  # at a time
_ROWS = 64  # at least, and in multiples


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed negative log-likelihood of targets, [R] int64: nats, a float32 scalar.

    `hidden`, [R, H], is differentiable; the head's weight, [V, H], is frozen. With Triton the
    forward pass also computes the gradient, so that no logits stay. Logits and their gradient are
    rounded to the dtype of `hidden`; what happens between is float32.
    """
    if launch.usable(hidden):
        total: Tensor = _Summed.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
        return total
    return cross_entropy(linear(hidden, weight).float(), targets, reduction="sum")


def cross_entropies(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns the negative log-likelihood of each target, nats, [R] float32; not for training."""
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    for part in _parts(hidden, weight):
        logits = linear(hidden[part], weight).float()
        losses[part] = cross_entropy(logits, targets[part], reduction="none")
    return losses


def _parts(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = _ROWS * max(1, _LOGITS // (_ROWS * len(weight)))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from qlora_harness.fused import triton_ops

        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        ctx.gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _parts(hidden, weight):
            logits = hidden[part] @ weight.t()
            triton_ops.cross_entropy(logits, targets[part], losses[part])
            if ctx.gradient is not None:
                torch.mm(logits, weight, out=ctx.gradient[part])
            del logits  # before the next part's
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        # In the gradient's dtype, torch would round the factor before multiplying.
        return (ctx.gradient.float() * factor).to(ctx.gradient.dtype), None, None

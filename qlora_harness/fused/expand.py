"""The weight of a frozen linear layer in the dtype of its input, expanded where it is 4-bit."""

from __future__ import annotations

from typing import Any

import torch


def expanded(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Returns a weight, [N, K]; a 4-bit one is expanded anew at every call, as bitsandbytes does.

    Args:
        layer: torch.nn.Linear or bitsandbytes' Linear4bit.
        dtype: Of the result.
    """
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight if weight.dtype == dtype else weight.to(dtype)  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_4bit

    if state.dtype == dtype:
        return dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    before, state.dtype = state.dtype, dtype
    try:
        return dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    finally:
        state.dtype = before

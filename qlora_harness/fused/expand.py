"""The weight of a frozen linear layer in the dtype of its input, expanded where it is 4-bit.

On CUDA one Triton kernel expands the scales and the weight together, where bitsandbytes takes three
calls; the values are the same, bit by bit (`tests/test_fused_expand.py`, `tests/test_gpu.py`).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from qlora_harness.model.base import expand_4bit

_BLOCK = 64  # weights that share a scale, as base models are quantised here
_NESTED_BLOCK = 256  # scales that share a scale


def expanded(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Returns a weight, [N, K]; a 4-bit one is expanded anew at every call, as bitsandbytes does.

    Args:
        layer: torch.nn.Linear or bitsandbytes' Linear4bit.
        dtype: Of the result.
    """
    weight: torch.Tensor = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight if weight.dtype == dtype else weight.to(dtype)
    if weight.is_cuda and _kernel_fits(state):
        return expand_with_kernel(weight.data, state, dtype)
    return expand_4bit(weight.data, state, dtype)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernel_fits(state: Any) -> bool:
    nested = not state.nested or state.state2.blocksize == _NESTED_BLOCK
    return _has_triton() and state.blocksize == _BLOCK and nested


def expand_with_kernel(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Expands a 4-bit weight with the Triton kernel.

    Args:
        packed: Two weights a byte, the first in the high half, uint8.
        state: bitsandbytes' QuantState with blocks of 64, nested in blocks of 256 or not.
        dtype: Of the result.

    Returns:
        [N, K].
    """
    from qlora_harness.fused.expand_kernel import BLOCKS, expand_kernel

    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    blocks = packed.numel() // (_BLOCK // 2)
    scales = state.state2 if state.nested else state
    offset = state.offset if state.nested else state.absmax
    expand_kernel[(-(-blocks // BLOCKS),)](
        packed,
        state.absmax,
        state.code,
        scales.absmax,
        scales.code,
        offset,
        out,
        blocks,
        NESTED=state.nested,
        # Scale times scale plus offset in two roundings, as bitsandbytes computes it.
        enable_fp_fusion=False,
    )
    return out

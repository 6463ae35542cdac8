"""Launches the Triton kernels of fused layers; importable where there is no Triton.

Each function does what its namesake in `ops` or `bordered` does in plain torch; the tests compare
both in Triton's interpreter, and on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

_BLOCK = 64  # weights that share a scale, as base models are quantised here
_NESTED_BLOCK = 256  # scales that share a scale
_SWIGLU_BLOCK = 1024


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def usable(x: torch.Tensor) -> bool:
    """Whether the kernels can work on a tensor.

    Args:
        x: Any.
    """
    return x.is_cuda and _has_triton()


def can_load(states: Sequence[Any]) -> bool:
    """Whether `load` can fill a matrix from weights with such states.

    Args:
        states: bitsandbytes' QuantState of each weight, None where it is not 4-bit.
    """
    if len(states) > 3:
        return False
    if all(state is None for state in states):
        return True
    first = states[0]
    return all(
        state is not None
        and state.blocksize == _BLOCK
        and state.shape[1] % _BLOCK == 0
        and state.quant_type == first.quant_type
        and state.nested == first.nested
        and (not state.nested or state.state2.blocksize == _NESTED_BLOCK)
        for state in states
    )


def load(group: Any, states: Sequence[Any], matrix: torch.Tensor) -> None:
    """Fills a bordered matrix: expands 4-bit weights, copies adapters.

    Args:
        group: `bordered.Bordered`.
        states: For which `can_load`.
        matrix: [N + R, stride], contiguous.
    """
    from qlora_harness.fused.triton_kernels import CHUNK, load_kernel

    first = states[0]
    expand = first is not None
    nested = expand and first.nested
    # Whatever is not there is given another tensor of the same dtype, and never read.
    some = next(([p.down, p.up] for p in group.projections if p.down is not None), [matrix, matrix])
    weights: list[Any] = []
    adapters: list[Any] = []
    for projection, state in zip(group.projections, states, strict=True):
        weights += [
            projection.layer.weight if expand else matrix,
            state.absmax if expand else matrix,
            state.state2.absmax if nested else matrix,
            state.offset if nested else matrix,
        ]
        adapters += [projection.down, projection.up] if projection.down is not None else some
    missing = 3 - len(states)
    starts = [group.heights[0], sum(group.heights[:2])]
    places = [-1 if place is None else place for place in group.places]
    rows = group.height + group.border
    load_kernel[(rows, -(-group.width // CHUNK) if expand else 1)](
        *weights,
        *weights[:4] * missing,
        first.code if expand else matrix,
        first.state2.code if nested else matrix,
        *adapters,
        *some * missing,
        matrix,
        matrix.stride(0),
        group.width,
        group.border,
        *starts,
        group.height,
        float(group.scale),
        *places,
        *[-1] * missing,
        RANK=group.rank,
        BORDER=_power(max(group.border, 1)),
        EXPAND=expand,
        NESTED=nested,
        # Scale times scale plus offset in two roundings, as bitsandbytes computes it.
        enable_fp_fusion=False,
    )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, add: torch.Tensor | None
) -> torch.Tensor:
    """Namesake of `ops.rms_norm`."""
    from qlora_harness.fused.triton_kernels import rms_norm_kernel

    total = x if add is None else torch.empty_like(x)
    block = _power(x.shape[1])
    rms_norm_kernel[(len(x),)](
        *(x, x if add is None else add, weight, total, out, out.stride(0), x.shape[1], eps),
        ADD=add is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return total


def rms_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    add: torch.Tensor | None,
) -> None:
    """Namesake of `ops.rms_norm_backward`."""
    from qlora_harness.fused.triton_kernels import rms_norm_backward_kernel

    block = _power(x.shape[1])
    added = x if add is None else add
    rms_norm_backward_kernel[(len(x),)](
        *(gradient, gradient.stride(0), x, weight, added, added.stride(0)),
        *(out, out.stride(0), x.shape[1], eps),
        ADD=add is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )


def swiglu(gates: torch.Tensor, out: torch.Tensor) -> None:
    """Namesake of `ops.swiglu`."""
    from qlora_harness.fused.triton_kernels import swiglu_kernel

    columns = out.shape[1]
    swiglu_kernel[(len(out), -(-columns // _SWIGLU_BLOCK))](
        gates, out, out.stride(0), columns, BLOCK=_SWIGLU_BLOCK
    )


def swiglu_backward(gates: torch.Tensor, gradient: torch.Tensor) -> None:
    """Namesake of `ops.swiglu_backward`."""
    from qlora_harness.fused.triton_kernels import swiglu_backward_kernel

    columns = gradient.shape[1]
    swiglu_backward_kernel[(len(gradient), -(-columns // _SWIGLU_BLOCK))](
        gates, gradient, gradient.stride(0), columns, BLOCK=_SWIGLU_BLOCK
    )


def rotate(projected: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Namesake of `ops.rotate`."""
    from qlora_harness.fused.triton_kernels import rotate_kernel

    size = cos.shape[1]
    rotate_kernel[(len(projected),)](
        *(projected, projected.stride(0), cos, sin, heads),
        SIZE=size,
        HALF=_power(size // 2),
        HEADS=_power(heads),
    )


def rotate_back(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Namesake of `ops.rotate_back`."""
    from qlora_harness.fused.triton_kernels import rotate_back_kernel

    tokens, heads, size = dq.shape
    keys = dk.shape[1]
    out = dq.new_empty(tokens, (heads + 2 * keys) * size)
    rotate_back_kernel[(tokens,)](
        *(dq.contiguous(), dk.contiguous(), dv.contiguous(), out, cos, sin, heads, keys),
        SIZE=size,
        HALF=_power(size // 2),
        HEADS=_power(heads),
        KEY_HEADS=_power(keys),
        VALUES=_power(keys * size),
    )
    return out


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))

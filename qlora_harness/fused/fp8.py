"""Products of 8-bit floats (e4m3), accumulated in float32 and scaled by powers of two.

e4m3 has three bits of mantissa at every magnitude from 2^-6 to 448. So a scale need only bring the
largest magnitude near the top, and a power of two does that without rounding. Every row of an input
or gradient has its own scale. A group's weights share one, so the layouts of both passes hold the
same values.

On CUDA the products run in Triton (`triton_fp8`); elsewhere plain torch rounds the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_harness.fused.launch import usable

E4M3 = torch.float8_e4m3fn
MULTIPLE = 16  # rows of e4m3 must start on 16 bytes
_CAPABILITY = 9  # Hopper; TMA and the tile sizes in `triton_fp8` are for it
# The largest magnitude of a row lies in [2^7, 2^8), safely below 448.
_EXPONENT = 7
_TINY = 2.0**-100  # the smallest magnitude that gets a scale of its own


class Quantised(NamedTuple):
    """Rows in e4m3: values, [T, K], each row to be multiplied by its scale, a power of two, [T]."""

    values: Tensor
    scales: Tensor  # float32


def why_unavailable(device: torch.device) -> str | None:
    """Returns why FP8 products can't run on a device, or None if they can."""
    if device.type != "cuda":
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major != _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}, not {_CAPABILITY}.0 (Hopper)"
    if not usable(torch.empty(0, device=device)):
        return "Triton is not installed"
    return None


def room(tokens: int, columns: int, like: Tensor) -> Quantised:
    """Allocates rows in e4m3."""
    return Quantised(
        torch.empty(tokens, columns, dtype=E4M3, device=like.device),
        torch.empty(tokens, dtype=torch.float32, device=like.device),
    )


def quantise(x: Tensor, out: Quantised | None = None) -> Quantised:
    """Rounds rows, [T, K], to e4m3, each with its own scale."""
    out = room(len(x), x.shape[1], x) if out is None else out
    if usable(x):
        from qlora_harness.fused import triton_fp8

        triton_fp8.quantise(x, out)
        return out
    wide = x.float()
    top = wide.abs().amax(dim=1).clamp_min(_TINY)
    # The bits of the exponent, which a logarithm might round.
    out.scales.copy_((((top.view(torch.int32) >> 23) - _EXPONENT) << 23).view(torch.float32))
    out.values.copy_(wide / out.scales[:, None])
    return out


def weight_scale(top: float) -> float:
    """Returns the scale of weights whose largest magnitude is `top`."""
    return 2.0 ** (math.frexp(max(top, _TINY))[1] - 1 - _EXPONENT)


class Adapter(NamedTuple):
    """What adapters add to a product, inner up^T."""

    inner: Tensor  # [T, R]
    up: Tensor  # [N, R]
    # For each projection, the ends of its rows and of its nonzero columns in `up`.
    reach: Sequence[tuple[int, int]]


def product(
    x: Quantised,
    weights: Tensor,
    scale: float,
    *,
    dtype: torch.dtype,
    adapter: Adapter | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns x weights^T, plus adapter and bias, [T, N], rounded once.

    `weights` is e4m3, [N, K], to be multiplied by `scale`, a power of two.
    """
    if usable(weights):
        from qlora_harness.fused import triton_fp8

        return triton_fp8.product(x, weights, scale, dtype, adapter, bias)
    total = (x.values.float() @ weights.float().t()) * (x.scales * scale)[:, None]
    if adapter is not None:
        total += adapter.inner.float() @ adapter.up.float().t()
    if bias is not None:
        total += bias.float()
    return total.to(dtype)

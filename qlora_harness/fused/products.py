"""The product of a layer's input and weights, by the faster library.

On x86 torch multiplies float32 matrices with MKL, which uses AVX2 only on AMD's processors. oneDNN
uses AVX-512 there, and takes half the time. Both accumulate in float32, in another order.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x W^T + b, [T, N], for x [T, K] and W [N, K]."""
    if uses_onednn(x):
        multiply = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001  # has no public name
        # With gaps between its rows, oneDNN takes its slowest way.
        product: Tensor = multiply(x, weight.contiguous(), bias, "none", [], "")
        return product
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def uses_onednn(x: Tensor) -> bool:
    """Whether oneDNN computes `linear`: without gradients, in float32, on a CPU with AVX-512."""
    is_float32 = x.device.type == "cpu" and x.dtype == torch.float32
    return is_float32 and torch.is_inference_mode_enabled() and _has_onednn()


@cache
def _has_onednn() -> bool:
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )

"""The product of a layer's input and weights, by the faster library.

On x86 torch multiplies float32 matrices with MKL, which uses AVX2 only on AMD's processors. oneDNN
uses AVX-512 there, and takes half the time. Both accumulate in float32, in another order.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x W^T + b, [T, N], for x [T, K] and W [N, K]."""
    if torch.is_inference_mode_enabled() and x.dtype == torch.float32 and _has_onednn(x.device):
        onednn = torch.ops.mkldnn
        packed = onednn._reorder_linear_weight(weight, len(x))  # noqa: SLF001  # no public form
        product: Tensor = onednn._linear_pointwise(  # noqa: SLF001  # as above
            x, packed, bias, "none", [], ""
        )
        return product
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


@cache
def _has_onednn(device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )

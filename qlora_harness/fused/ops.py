"""The elementwise operations of a layer, forward and backward, outside autograd.

Each runs in Triton on CUDA (`triton_ops`), and in plain torch elsewhere, which the tests compare
with autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from qlora_harness.fused import fp8
from qlora_harness.fused.fp8 import Quantised
from qlora_harness.fused.launch import usable
from qlora_harness.fused.packed_row import Rotation


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    add: Tensor | None = None,
    rounded: Quantised | None = None,
) -> Tensor:
    """Normalises x + add, [T, H] and contiguous, into `out`; returns x + add.

    As in LLaMA: in float32, cast back, then multiplied by the weight, [H]. `rounded` gets `out` in
    e4m3, if given.
    """
    if usable(x):
        from qlora_harness.fused import triton_ops

        return triton_ops.rms_norm(x, weight, eps, out, add, rounded)
    total = x if add is None else x + add
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    out.copy_(weight * (wide * scale).to(x.dtype))
    if rounded is not None:
        fp8.quantise(out, rounded)
    return total


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor, add: Tensor | None = None
) -> None:
    """Writes the gradient of x plus `add` to `out`, from that of the normalised rows, [T, H].

    Overwrites `gradient` with the normalised rows. x is contiguous; the weight is frozen.
    """
    if usable(x):
        from qlora_harness.fused import triton_ops

        triton_ops.rms_norm_backward(gradient, x, weight, eps, out, add)
        return
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normed = wide * scale
    inner = (gradient * weight).float()
    dx = scale * (inner - normed * (inner * normed).mean(dim=-1, keepdim=True))
    out.copy_(dx if add is None else dx + add)
    gradient.copy_(weight * normed.to(x.dtype))


def copy(source: Tensor, out: Tensor) -> None:
    """Copies contiguous rows into strided ones; torch's copy takes three times as long on CUDA."""
    if usable(source):
        from qlora_harness.fused import triton_ops

        triton_ops.copy(source, out)
    else:
        out.copy_(source)


def swiglu(gates: Tensor, out: Tensor, rounded: Quantised | None = None) -> None:
    """Writes silu(gate) * up to `out`, [T, I], and in e4m3 to `rounded`, if given.

    `gates` is [gate, up], [T, 2 I] and contiguous.
    """
    if usable(gates):
        from qlora_harness.fused import triton_ops

        triton_ops.swiglu(gates, out, rounded)
        return
    gate, up = gates.chunk(2, dim=1)
    torch.mul(silu(gate), up, out=out)
    if rounded is not None:
        fp8.quantise(out, rounded)


def swiglu_backward(gates: Tensor, gradient: Tensor, rounded: Quantised | None = None) -> None:
    """Overwrites [gate, up] with their gradients, and the product's gradient with the product.

    `rounded` gets the gradients of [gate, up] in e4m3, if given.
    """
    if usable(gates):
        from qlora_harness.fused import triton_ops

        triton_ops.swiglu_backward(gates, gradient, rounded)
        return
    gate, up = gates.chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate.float()).to(gate.dtype)
    active = silu(gate)
    d_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = gradient * active
    torch.mul(active, up, out=gradient)
    gate.copy_(d_gate)
    up.copy_(d_up)
    if rounded is not None:
        fp8.quantise(gates, rounded)


def rotate(projected: Tensor, heads: int, rotation: Rotation) -> None:
    """Rotates the first `heads` heads of each row, [T, N], in place."""
    if usable(projected):
        from qlora_harness.fused import triton_ops

        triton_ops.rotate(projected, heads, rotation.cos, rotation.sin)
        return
    size = rotation.cos.shape[1]
    turned = projected[:, : heads * size].view(len(projected), heads, size)
    turned.copy_(rotated(turned, rotation))


def rotated(x: Tensor, rotation: Rotation, *, back: bool = False) -> Tensor:
    """Returns heads, [T, heads, D], rotated, or rotated back."""
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((second, -first) if back else (-second, first), dim=-1)
    return x * cos + turned * sin

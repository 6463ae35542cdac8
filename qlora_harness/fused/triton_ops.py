"""The functions of `ops`, and cross-entropy, in Triton.

Import this only with Triton installed. Triton's compiler reads annotations, so kernels have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_harness.fused.fp8 import Quantised
from qlora_harness.fused.launch import launch, power_of_two

_SWIGLU_BLOCK = 1024
_LOGITS_BLOCK = 8192  # of a row, read at once


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    add: Tensor | None,
    rounded: Quantised | None = None,
) -> Tensor:
    """See `ops.rms_norm`."""
    assert x.is_contiguous()
    assert add is None or add.is_contiguous()
    rows, columns = x.shape
    total = x if add is None else torch.empty_like(x)
    block = power_of_two(columns)
    added = x if add is None else add
    # Without `rounded`, other tensors of its dtypes take its place, never written.
    arguments = x, added, weight, total, out, out.stride(0), *(rounded or (x, x)), columns, eps
    constants = add is not None, rounded is not None, block
    launch(rms_norm_kernel, (rows, 1, 1), arguments, *constants, num_warps=_warps(block))
    return total


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor, add: Tensor | None
) -> None:
    """See `ops.rms_norm_backward`."""
    assert x.is_contiguous()
    rows, columns = x.shape
    block = power_of_two(columns)
    added = x if add is None else add
    arguments = (
        *(gradient, gradient.stride(0), x, weight, added, added.stride(0)),
        *(out, out.stride(0), columns, eps),
    )
    constants = add is not None, block
    launch(rms_norm_backward_kernel, (rows, 1, 1), arguments, *constants, num_warps=_warps(block))


def copy(source: Tensor, out: Tensor) -> None:
    """See `ops.copy`."""
    rows, columns = source.shape
    block = power_of_two(columns)
    at_once = max(1, 4096 // block)
    arguments = source, out, out.stride(0), rows, columns
    launch(copy_kernel, (-(-rows // at_once), 1, 1), arguments, at_once, block)


def swiglu(gates: Tensor, out: Tensor, rounded: Quantised | None = None) -> None:
    """See `ops.swiglu`."""
    arguments = gates, out, out.stride(0), *(rounded or (gates, gates)), out.shape[1]
    _launch_swiglu(swiglu_kernel, arguments, out.shape, rounded)


def swiglu_backward(gates: Tensor, gradient: Tensor, rounded: Quantised | None = None) -> None:
    """See `ops.swiglu_backward`."""
    columns = gradient.shape[1]
    arguments = gates, gradient, gradient.stride(0), *(rounded or (gates, gates)), columns
    _launch_swiglu(swiglu_backward_kernel, arguments, gradient.shape, rounded)


def _launch_swiglu(
    kernel: Any, arguments: Sequence[Any], shape: Sequence[int], rounded: Quantised | None
) -> None:
    """Rounding needs a whole row in one program."""
    rows, columns = shape
    if rounded is None:
        launch(kernel, (rows, -(-columns // _SWIGLU_BLOCK), 1), arguments, False, _SWIGLU_BLOCK)
    else:
        block = power_of_two(columns)
        launch(kernel, (rows, 1, 1), arguments, True, block, num_warps=_warps(block))


def rotate(projected: Tensor, heads: int, cos: Tensor, sin: Tensor) -> None:
    """See `ops.rotate`."""
    size = cos.shape[1]
    arguments = projected, projected.stride(0), cos, sin, heads
    constants = size, power_of_two(size // 2), power_of_two(heads)
    launch(rotate_kernel, (len(projected), 1, 1), arguments, *constants)


def cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor) -> None:
    """Overwrites contiguous logits, [R, V], with their gradients, softmax less one-hot.

    Writes the cross-entropies of the targets, [R] int64, to `losses`: nats, [R] float32.
    """
    rows, columns = logits.shape
    block = min(_LOGITS_BLOCK, power_of_two(columns))
    arguments = logits, targets, losses, columns
    launch(cross_entropy_kernel, (rows, 1, 1), arguments, block, num_warps=_warps(block))


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit
def scale_of(top):
    """Returns the scale of a row whose largest magnitude is `top`, and its inverse; see `fp8`."""
    exponent = tl.maximum(top, 2.0**-100).to(tl.int32, bitcast=True) >> 23  # biased by 127
    scale = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    return scale, ((261 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def rms_norm_kernel(
    x, add, weight, total, out, out_stride, values, scales, columns, eps, ADD: tl.constexpr,
    ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program: total = x + add; out = total / rms(total) * weight, and that in e4m3."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row * columns + column, mask=inside, other=0.0)
    if ADD:
        value = value + tl.load(add + row * columns + column, mask=inside, other=0.0)
        tl.store(total + row * columns + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + eps)
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = (normed * factor).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, normed, mask=inside)
    if ROUND:
        wide = normed.to(tl.float32)
        scale, inverse = scale_of(tl.max(tl.abs(wide), axis=0))
        tl.store(scales + row, scale)
        tl.store(values + row * columns + column, (wide * inverse).to(tl.float8e4nv), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    gradient, gradient_stride, x, weight, add, add_stride, out, out_stride, columns, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of x, plus add; the normalised rows take the place of `gradient`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    line = gradient + row * gradient_stride + column
    wide = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + eps)
    normed = wide * scale
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    inner = tl.load(line, mask=inside, other=0.0).to(tl.float32) * factor
    mean = tl.sum(inner * normed, axis=0) / columns
    dx = scale * (inner - normed * mean)
    if ADD:
        dx += tl.load(add + row * add_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, dx.to(out.dtype.element_ty), mask=inside)
    normed = normed.to(gradient.dtype.element_ty).to(tl.float32) * factor
    tl.store(line, normed.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(
    gates, product, product_stride, values, scales, columns, ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes silu(gate) * up, of [gate, up] side by side, and that in e4m3."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    line = gates + row * 2 * columns + column
    gate = tl.load(line, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(line + columns, mask=inside, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(product.dtype.element_ty).to(tl.float32)
    value = (gate * up).to(product.dtype.element_ty)
    tl.store(product + row * product_stride + column, value, mask=inside)
    if ROUND:
        wide = value.to(tl.float32)
        scale, inverse = scale_of(tl.max(tl.abs(wide), axis=0))
        tl.store(scales + row, scale)
        tl.store(values + row * columns + column, (wide * inverse).to(tl.float8e4nv), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gates, gradient, gradient_stride, values, scales, columns, ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """[gate, up] become their gradients, also in e4m3; the gradient becomes the product."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    line = gates + row * 2 * columns + column
    place = gradient + row * gradient_stride + column
    gate = tl.load(line, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(line + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    active = gate * sigmoid
    d_gate = (dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(gates.dtype.element_ty)
    d_up = (dy * active).to(gates.dtype.element_ty)
    tl.store(line, d_gate, mask=inside)
    tl.store(line + columns, d_up, mask=inside)
    if ROUND:
        wide = d_gate.to(tl.float32)
        other = d_up.to(tl.float32)
        top = tl.max(tl.maximum(tl.abs(wide), tl.abs(other)), axis=0)
        scale, inverse = scale_of(top)
        tl.store(scales + row, scale)
        begin = values + row * 2 * columns + column
        tl.store(begin, (wide * inverse).to(tl.float8e4nv), mask=inside)
        tl.store(begin + columns, (other * inverse).to(tl.float8e4nv), mask=inside)
    product = active.to(gradient.dtype.element_ty).to(tl.float32) * up
    tl.store(place, product.to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def copy_kernel(source, out, out_stride, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Copies contiguous rows into longer ones."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(source + row * columns + column, mask=inside)
    tl.store(out + row * out_stride + column, value, mask=inside)


@triton.jit
def rotate_kernel(
    projected, stride, cos, sin, heads, SIZE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr
):
    """Rotates the first heads of each row, in place."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (half < SIZE // 2)
    place = projected + row * stride + head * SIZE + half
    turn = row * SIZE + half
    c1 = tl.load(cos + turn, mask=half < SIZE // 2, other=0.0).to(tl.float32)
    c2 = tl.load(cos + turn + SIZE // 2, mask=half < SIZE // 2, other=0.0).to(tl.float32)
    s1 = tl.load(sin + turn, mask=half < SIZE // 2, other=0.0).to(tl.float32)
    s2 = tl.load(sin + turn + SIZE // 2, mask=half < SIZE // 2, other=0.0).to(tl.float32)
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    kind = projected.dtype.element_ty
    tl.store(place, (first * c1 - second * s1).to(kind), mask=inside)
    tl.store(place + SIZE // 2, (second * c2 + first * s2).to(kind), mask=inside)


@triton.jit
def cross_entropy_kernel(logits, targets, losses, columns, BLOCK: tl.constexpr):
    """Program r reads row r twice: for the sum of exponentials, and to write the gradient."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * columns
    target = tl.load(targets + row)
    at_target = tl.load(line + target).to(tl.float32)
    top = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(line + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        top = higher
    level = top + tl.log(total)
    tl.store(losses + row, level - at_target)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(line + column, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - level) - tl.where(column == target, 1.0, 0.0)
        tl.store(line + column, gradient.to(logits.dtype.element_ty), mask=inside)

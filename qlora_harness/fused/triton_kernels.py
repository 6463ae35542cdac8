"""The Triton kernels behind `triton_ops`; imported only where Triton is.

Triton compiles the annotations as well, so there are none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_kernel(
    packed_0,
    absmax_0,
    outer_0,
    offset_0,
    packed_1,
    absmax_1,
    outer_1,
    offset_1,
    packed_2,
    absmax_2,
    outer_2,
    offset_2,
    code,
    outer_code,
    down_0,
    up_0,
    down_1,
    up_1,
    down_2,
    up_2,
    matrix,
    stride,
    width,
    border,
    second,
    third,
    height,
    scale,
    PLACE_0: tl.constexpr,
    PLACE_1: tl.constexpr,
    PLACE_2: tl.constexpr,
    RANK: tl.constexpr,
    BORDER: tl.constexpr,
    EXPAND: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Fills M of `bordered`: program (m, c) writes chunk c of row m.

    Rows before `second` are the first projection's, those before `third` the second's. PLACE_i is
    the place of a projection's adapter, -1 without one; a chunk is so many BLOCKS of 64 weights.
    """
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    line = matrix + row.to(tl.int64) * stride
    if row < height:
        packed = packed_0
        absmax = absmax_0
        outer = outer_0
        offset = offset_0
        up = up_0
        place = row * 0 + PLACE_0
        local = row
        if row >= third:
            packed = packed_2
            absmax = absmax_2
            outer = outer_2
            offset = offset_2
            up = up_2
            place = row * 0 + PLACE_2
            local = row - third
        elif row >= second:
            packed = packed_1
            absmax = absmax_1
            outer = outer_1
            offset = offset_1
            up = up_1
            place = row * 0 + PLACE_1
            local = row - second
        if EXPAND:
            in_row = width // 64
            block = chunk * BLOCKS + tl.arange(0, BLOCKS)
            inside = block < in_row
            block = local * in_row + block
            if NESTED:
                level = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
                above = tl.load(outer + block // 256, mask=inside, other=0.0)
                factor = tl.load(outer_code + level) * above
                factor = factor + tl.load(offset)
            else:
                factor = tl.load(absmax + block, mask=inside, other=0.0)
            at = block[:, None].to(tl.int64) * 32 + tl.arange(0, 32)[None, :]
            both = tl.load(packed + at, mask=inside[:, None], other=0).to(tl.int32)
            high = tl.load(code + (both >> 4)) * factor[:, None]
            low = tl.load(code + (both & 15)) * factor[:, None]
            weights = tl.interleave(high, low)
            at = (chunk * BLOCKS + tl.arange(0, BLOCKS))[:, None] * 64 + tl.arange(0, 64)[None, :]
            tl.store(line + at, weights.to(matrix.dtype.element_ty), mask=inside[:, None])
        if RANK > 0:  # noqa: SIM102 (one is known when compiling)
            if chunk == 0:
                column = tl.arange(0, BORDER)
                mine = (column >= place * RANK) & (column < (place + 1) * RANK)
                entry = local * RANK + column - place * RANK
                beside = tl.load(up + entry, mask=mine, other=0.0)
                beside = beside.to(matrix.dtype.element_ty)
                tl.store(line + width + column, beside, mask=column < border)
    elif RANK > 0:  # noqa: SIM102
        if chunk == 0:
            place = (row - height) // RANK
            down = down_0
            if place == PLACE_1:
                down = down_1
            elif place == PLACE_2:
                down = down_2
            local = (row - height) % RANK
            for start in range(0, width, 2048):
                column = start + tl.arange(0, 2048)
                inside = column < width
                value = tl.load(down + local * width + column, mask=inside, other=0.0)
                value = value.to(tl.float32) * scale
                tl.store(line + column, value.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_kernel(
    x, add, weight, total, out, out_stride, columns, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """A row a program: total = x + add; out = total / rms(total) * weight."""
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


@triton.jit
def rms_norm_backward_kernel(
    gradient,
    gradient_stride,
    x,
    weight,
    add,
    add_stride,
    out,
    out_stride,
    columns,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    found = scale * (inner - normed * mean)
    if ADD:
        found += tl.load(add + row * add_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, found.to(out.dtype.element_ty), mask=inside)
    normed = normed.to(gradient.dtype.element_ty).to(tl.float32) * factor
    tl.store(line, normed.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gates, product, product_stride, columns, BLOCK: tl.constexpr):
    """Writes silu(gate) * up, of [gate, up] side by side."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    line = gates + row * 2 * columns + column
    gate = tl.load(line, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(line + columns, mask=inside, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(product.dtype.element_ty).to(tl.float32)
    value = (gate * up).to(product.dtype.element_ty)
    tl.store(product + row * product_stride + column, value, mask=inside)


@triton.jit
def swiglu_backward_kernel(gates, gradient, gradient_stride, columns, BLOCK: tl.constexpr):
    """[gate, up] become their gradients, and the gradient becomes the product."""
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
    d_gate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(line, d_gate.to(gates.dtype.element_ty), mask=inside)
    tl.store(line + columns, (dy * active).to(gates.dtype.element_ty), mask=inside)
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

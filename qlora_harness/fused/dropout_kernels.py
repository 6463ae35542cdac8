"""The Triton kernels behind `triton_dropout`; imported only where Triton is.

Masks are packed so that a tile of 64 columns reads as many bytes, and one bit of each: tile 8 g + j
of a row is in bits j of the bytes from 64 g on. Nothing is compiled for the length of a row. Triton
compiles the annotations as well, so there are none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["seed", "threshold", "count"])
def draw_kernel(bits, seed, threshold, count, BLOCK: tl.constexpr):
    """Program b draws block b of all masks, a byte from each 128 random bits."""
    byte = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = byte * 0
    words = tl.philox(seed, byte, zero, zero, zero)
    kept = zero
    for i in tl.static_range(4):
        word = words[i]
        kept |= ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32) << (2 * i)
        kept |= ((word >> 16).to(tl.int32) >= threshold).to(tl.int32) << (2 * i + 1)
    tl.store(bits + byte, kept.to(tl.uint8), mask=byte < count)


@triton.jit
def _kept(bits, row, rows, bytes_in_row, tile):
    """Whether the elements of a tile of 64 columns are kept; `bits` are an adapter's."""
    byte = (tile // 8) * 64 + tl.arange(0, 64)[None, :]
    found = tl.load(bits + row.to(tl.int64) * bytes_in_row + byte, mask=row < rows, other=0)
    return ((found.to(tl.int32) >> (tile % 8)) & 1) != 0


@triton.jit(do_not_specialize=["rows", "share"])
def product_kernel(
    x,
    x_stride,
    down,
    down_stride,
    bits,
    parts,
    rows,
    columns,
    bytes_in_row,
    share,
    rank,
    factor,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, t, s): rows t of drop_i(x) A_i^T over the tiles of columns of share s."""
    adapter = tl.program_id(0)
    adapters = tl.num_programs(0)
    split = tl.program_id(2)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    component = tl.arange(0, RANK)[:, None]
    bits += adapter.to(tl.int64) * rows * bytes_in_row
    end = tl.minimum((split + 1) * share, tl.cdiv(columns, 64))
    found = tl.zeros((ROWS, RANK), tl.float32)
    for tile in range(split * share, end):
        column = tile * 64 + tl.arange(0, 64)[None, :]
        inside = (row < rows) & (column < columns)
        value = tl.load(x + row.to(tl.int64) * x_stride + column, mask=inside, other=0.0)
        value = tl.where(_kept(bits, row, rows, bytes_in_row, tile), value, 0.0)
        line = down + (adapter * rank + component).to(tl.int64) * down_stride
        weight = tl.load(line + column, mask=(component < rank) & (column < columns), other=0.0)
        found = tl.dot(value, tl.trans(weight), found, input_precision=PRECISION)
    component = tl.arange(0, RANK)[None, :]
    place = parts + (split.to(tl.int64) * rows + row) * adapters * rank + adapter * rank + component
    tl.store(place, found * factor, mask=(row < rows) & (component < rank))


@triton.jit(do_not_specialize=["rows", "splits"])
def sum_kernel(
    parts,
    out,
    beside,
    beside_stride,
    rows,
    border,
    splits,
    ROWS: tl.constexpr,
    BORDER: tl.constexpr,
):
    """Sums the shares of `product_kernel`, and writes the sums to two places."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.arange(0, BORDER)[None, :]
    inside = (row < rows) & (column < border)
    total = tl.zeros((ROWS, BORDER), tl.float32)
    for split in range(splits):
        total += tl.load(parts + (split * rows + row) * border + column, mask=inside, other=0.0)
    total = total.to(out.dtype.element_ty)
    tl.store(out + row * border + column, total, mask=inside)
    tl.store(beside + row * beside_stride + column, total, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def add_kernel(
    gradient,
    gradient_stride,
    inner,
    inner_stride,
    down,
    down_stride,
    bits,
    rows,
    columns,
    bytes_in_row,
    rank,
    factor,
    ADAPTERS: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (c, t) adds sum_i drop_i(dh_i A_i) to a tile of the gradient."""
    tile = tl.program_id(0)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tile * 64 + tl.arange(0, 64)[None, :]
    inside = (row < rows) & (column < columns)
    found = tl.zeros((ROWS, 64), tl.float32)
    for adapter in tl.static_range(ADAPTERS):
        component = tl.arange(0, RANK)[None, :]
        line = inner + row.to(tl.int64) * inner_stride + adapter * rank
        left = tl.load(line + component, mask=(row < rows) & (component < rank), other=0.0)
        component = tl.arange(0, RANK)[:, None]
        line = down + (adapter * rank + component).to(tl.int64) * down_stride
        right = tl.load(line + column, mask=(component < rank) & (column < columns), other=0.0)
        part = tl.dot(left, right, input_precision=PRECISION)
        own = bits + (adapter * bytes_in_row).to(tl.int64) * rows
        found += tl.where(_kept(own, row, rows, bytes_in_row, tile), part, 0.0)
    place = gradient + row.to(tl.int64) * gradient_stride + column
    found = tl.load(place, mask=inside, other=0.0).to(tl.float32) + found * factor
    tl.store(place, found.to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "share"])
def gradient_kernel(
    inner,
    inner_stride,
    x,
    x_stride,
    bits,
    parts,
    rows,
    columns,
    bytes_in_row,
    share,
    rank,
    factor,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, c, s): a tile of columns of dh_i^T drop_i(x) over the rows of share s."""
    adapter = tl.program_id(0)
    adapters = tl.num_programs(0)
    split = tl.program_id(2)
    tile = tl.program_id(1)
    column = tile * 64 + tl.arange(0, 64)[None, :]
    component = tl.arange(0, RANK)[None, :]
    bits += adapter.to(tl.int64) * rows * bytes_in_row
    end = tl.minimum((split + 1) * share, rows)
    found = tl.zeros((RANK, 64), tl.float32)
    for start in range(split * share, end, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        line = inner + row.to(tl.int64) * inner_stride + adapter * rank
        left = tl.load(line + component, mask=(row < end) & (component < rank), other=0.0)
        inside = (row < end) & (column < columns)
        value = tl.load(x + row.to(tl.int64) * x_stride + column, mask=inside, other=0.0)
        value = tl.where(_kept(bits, row, rows, bytes_in_row, tile), value, 0.0)
        found = tl.dot(tl.trans(left), value, found, input_precision=PRECISION)
    component = tl.arange(0, RANK)[:, None]
    place = parts + ((split * adapters + adapter) * rank + component).to(tl.int64) * columns
    tl.store(place + column, found * factor, mask=(component < rank) & (column < columns))

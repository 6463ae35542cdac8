"""Dropout in Triton, on packed masks: the functions of `dropout` and their kernels.

Bit j of byte 64 g + c in a mask's row belongs to column 512 g + 64 j + c, so that a tile of 64
columns reads 64 bytes, one bit of each. Kernels aren't specialised on the length of a row. Long
sums are split into shares, which keeps the device busy when the result is narrow; shares are summed
in a fixed order, so that reruns agree.

Import this only with Triton installed. Triton's compiler reads annotations, so kernels have none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_harness.fused.launch import launch, power_of_two

_BYTES = 512  # of a mask, drawn by one program
_COLUMNS = 64  # of a tile; 8 tiles share their bytes
_GROUPS = 4  # of a layer
_SUM_ROWS = 8
_PROGRAMS = 528  # four per multiprocessor of an H100
_LEAST = 8  # steps of a share; summing more shares takes longer than it saves
_LARGEST_RANK = 256


class DropoutTiling(NamedTuple):
    """How a dropout kernel divides its work."""

    rows: int  # of a tile
    warps: int
    stages: int  # loads in flight


# The first of each is the fastest on an H100, for 4,617 tokens, widths of 4,096 and 11,008 and rank
# 64; the others need less shared memory, for other ranks, dtypes and devices.
PRODUCT = (
    DropoutTiling(64, 4, 3),
    DropoutTiling(64, 4, 2),
    DropoutTiling(32, 4, 2),
    DropoutTiling(32, 4, 1),
)
ADD = DropoutTiling(64, 4, 1), DropoutTiling(32, 4, 1)
GRADIENT = (
    DropoutTiling(128, 4, 3),
    DropoutTiling(64, 4, 3),
    DropoutTiling(64, 4, 2),
    DropoutTiling(32, 4, 2),
    DropoutTiling(32, 4, 1),
)


class _Tilings(NamedTuple):
    product: DropoutTiling
    add: DropoutTiling
    gradient: DropoutTiling


def tilings(rank: int, like: Tensor) -> _Tilings | None:
    """Returns the tilings for a rank and dtype, or None if the device lacks shared memory."""
    return _first_tilings(_block(rank), like.element_size(), like.get_device())


@lru_cache(maxsize=64)
def _first_tilings(rank: int, size: int, device: int) -> _Tilings | None:
    """Returns the first tilings that fit a device; -1 is the CPU, for Triton's interpreter."""
    if rank > _LARGEST_RANK:
        return None
    room = sys.maxsize
    if device >= 0:
        properties = torch.cuda.get_device_properties(device)
        room = getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
        )
    kernels = (PRODUCT, _product_bytes), (ADD, _add_bytes), (GRADIENT, _gradient_bytes)
    product, add, gradient = (
        next((tiling for tiling in choices if needed(tiling, rank, size) <= room), None)
        for choices, needed in kernels
    )
    if product is None or add is None or gradient is None:
        return None
    return _Tilings(product, add, gradient)


# Upper bounds of a kernel's shared memory in bytes; an element takes `size`.


def _product_bytes(tiling: DropoutTiling, rank: int, size: int) -> int:
    rows, stages = tiling.rows, tiling.stages
    return (stages * (rows + rank) + rows) * _COLUMNS * size + rows * _COLUMNS


def _add_bytes(tiling: DropoutTiling, rank: int, size: int) -> int:
    return (tiling.rows + _COLUMNS) * rank * size + tiling.rows * _COLUMNS


def _gradient_bytes(tiling: DropoutTiling, rank: int, size: int) -> int:
    rows, stages = tiling.rows, tiling.stages
    return (stages * (rank + _COLUMNS) + _COLUMNS) * rows * size + rows * _COLUMNS


def draw(
    shapes: Sequence[tuple[int, int, int]], probability: float, seed: Tensor, device: torch.device
) -> list[Tensor]:
    """Draws a packed mask, [adapters, T, 64 ceil(K / 512)] uint8, for each (adapters, T, K).

    Philox-4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) gives 16 bits to each element,
    so the probability is rounded to a multiple of 2**-16. Its counters are a byte's number within
    the mask of an adapter, and the adapter's number within the layer, whatever the masks' lengths.
    """
    sizes = [(n, rows, -(-k // (8 * _COLUMNS)) * _COLUMNS) for n, rows, k in shapes]
    counts = [prod(size) for size in sizes]
    bits = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    assert len(bits) < 2**31  # the kernel counts in 32 bits
    groups = [
        (sum(counts[:i]), rows * width, sum(size[0] for size in sizes[:i]))
        for i, (_, rows, width) in enumerate(sizes)
    ]
    groups += [(len(bits), 1, 0)] * (_GROUPS - len(groups))
    arguments = (
        *(bits, seed, round(probability * 2**16), len(bits), groups[0][1]),
        *(number for group in groups[1:] for number in group),
    )
    launch(draw_kernel, (-(-len(bits) // _BYTES), 1, 1), arguments, _BYTES)
    parts = zip(torch.split(bits, counts), sizes, strict=True)
    return [part.view(size) for part, size in parts]


def products(x: Tensor, down: Tensor, bits: Tensor, factor: float, beside: Tensor | None) -> Tensor:
    """See `dropout.products`."""
    adapters, rows, bytes_in_row = bits.shape
    columns, border = x.shape[1], len(down)
    rank = border // adapters
    assert x.stride(1) == down.stride(1) == 1
    m, warps, stages = _chosen(rank, x).product
    tiles = -(-rows // m)
    share, splits = _shares(-(-columns // _COLUMNS), 1, tiles * adapters)
    parts = x.new_empty(splits, rows, border, dtype=torch.float32)
    launch(
        *(product_kernel, (adapters, tiles, splits)),
        (
            *(x, x.stride(0), down, down.stride(0), bits, parts, rows, columns, bytes_in_row),
            *(share, rank, factor),
        ),
        *(m, _block(rank), _precision(x)),
        num_warps=warps,
        num_stages=stages,
    )
    out = x.new_empty(rows, border)
    other = out if beside is None else beside
    arguments = parts, out, other, other.stride(0), rows, border, splits
    launch(sum_kernel, (-(-rows // _SUM_ROWS), 1, 1), arguments, _SUM_ROWS, _block(border))
    return out


def add_products(
    gradient: Tensor, d_inner: Tensor, down: Tensor, bits: Tensor, factor: float
) -> None:
    """See `dropout.add_products`."""
    adapters, rows, bytes_in_row = bits.shape
    columns, rank = gradient.shape[1], len(down) // adapters
    assert gradient.stride(1) == d_inner.stride(1) == down.stride(1) == 1
    m, warps, stages = _chosen(rank, gradient).add
    launch(
        *(add_kernel, (-(-columns // _COLUMNS), -(-rows // m), 1)),
        (
            *(gradient, gradient.stride(0), d_inner, d_inner.stride(0), down, down.stride(0), bits),
            *(rows, columns, bytes_in_row, rank, factor),
        ),
        *(adapters, m, _block(rank), _precision(gradient)),
        num_warps=warps,
        num_stages=stages,
    )


def gradients(d_inner: Tensor, x: Tensor, bits: Tensor, factor: float) -> Tensor:
    """See `dropout.gradients`; in float32."""
    adapters, rows, bytes_in_row = bits.shape
    columns, border = x.shape[1], d_inner.shape[1]
    rank = border // adapters
    assert x.stride(1) == d_inner.stride(1) == 1
    m, warps, stages = _chosen(rank, x).gradient
    tiles = -(-columns // _COLUMNS)
    share, splits = _shares(rows, m, tiles * adapters)
    parts = x.new_empty(splits, border, columns, dtype=torch.float32)
    launch(
        *(gradient_kernel, (adapters, tiles, splits)),
        (
            *(d_inner, d_inner.stride(0), x, x.stride(0), bits, parts, rows, columns, bytes_in_row),
            *(share, rank, factor),
        ),
        *(m, _block(rank), _precision(x)),
        num_warps=warps,
        num_stages=stages,
    )
    return parts.sum(0) if splits > 1 else parts[0]


def _chosen(rank: int, like: Tensor) -> _Tilings:
    chosen = tilings(rank, like)
    assert chosen is not None  # else the masks would not be packed
    return chosen


def _shares(length: int, step: int, programs: int) -> tuple[int, int]:
    """Returns the length of each share of a sum, a multiple of `step`, and their number."""
    steps = -(-length // step)
    share = max(_LEAST, -(-steps // max(1, _PROGRAMS // max(1, programs)))) * step
    return share, -(-length // share)


def _block(number: int) -> int:
    """Rounds up to a size that `tl.dot` supports."""
    return max(16, power_of_two(number))


def _precision(x: Tensor) -> str:
    """Returns the precision of products: float32 stays float32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit(
    do_not_specialize=[
        *("threshold", "count", "size_0", "start_1", "size_1", "first_1"),
        *("start_2", "size_2", "first_2", "start_3", "size_3", "first_3"),
    ]
)
def draw_kernel(
    bits, seed, threshold, count, size_0, start_1, size_1, first_1, start_2, size_2, first_2,
    start_3, size_3, first_3, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b draws block b of all masks, a byte from each 128 random bits.

    The masks of group i begin at byte `start` with those of adapter `first`, of `size` bytes each.
    """
    byte = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = byte * 0
    local, size, adapter = byte, zero + size_0, zero
    local = tl.where(byte >= start_1, byte - start_1, local)
    size = tl.where(byte >= start_1, size_1, size)
    adapter = tl.where(byte >= start_1, first_1, adapter)
    local = tl.where(byte >= start_2, byte - start_2, local)
    size = tl.where(byte >= start_2, size_2, size)
    adapter = tl.where(byte >= start_2, first_2, adapter)
    local = tl.where(byte >= start_3, byte - start_3, local)
    size = tl.where(byte >= start_3, size_3, size)
    adapter = tl.where(byte >= start_3, first_3, adapter)
    adapter += local // size
    words = tl.philox(tl.load(seed), local % size, adapter, zero, zero)
    keep = zero
    for i in tl.static_range(4):
        word = words[i]
        keep |= ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32) << (2 * i)
        keep |= ((word >> 16).to(tl.int32) >= threshold).to(tl.int32) << (2 * i + 1)
    tl.store(bits + byte, keep.to(tl.uint8), mask=byte < count)


@triton.jit
def _keeps(bits, row, rows, bytes_in_row, tile):
    """Whether the elements of a tile of 64 columns are kept; `bits` are an adapter's."""
    byte = (tile // 8) * 64 + tl.arange(0, 64)[None, :]
    value = tl.load(bits + row.to(tl.int64) * bytes_in_row + byte, mask=row < rows, other=0)
    return ((value.to(tl.int32) >> (tile % 8)) & 1) != 0


@triton.jit(do_not_specialize=["rows", "share"])
def product_kernel(
    x, x_stride, down, down_stride, bits, parts, rows, columns, bytes_in_row, share, rank, factor,
    ROWS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, t, s): rows t of drop_i(x) A_i^T over the tiles of columns of share s."""
    adapter = tl.program_id(0)
    adapters = tl.num_programs(0)
    split = tl.program_id(2)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    component = tl.arange(0, RANK)[:, None]
    bits += adapter.to(tl.int64) * rows * bytes_in_row
    end = tl.minimum((split + 1) * share, tl.cdiv(columns, 64))
    total = tl.zeros((ROWS, RANK), tl.float32)
    for tile in range(split * share, end):
        column = tile * 64 + tl.arange(0, 64)[None, :]
        inside = (row < rows) & (column < columns)
        value = tl.load(x + row.to(tl.int64) * x_stride + column, mask=inside, other=0.0)
        value = tl.where(_keeps(bits, row, rows, bytes_in_row, tile), value, 0.0)
        line = down + (adapter * rank + component).to(tl.int64) * down_stride
        weight = tl.load(line + column, mask=(component < rank) & (column < columns), other=0.0)
        total = tl.dot(value, tl.trans(weight), total, input_precision=PRECISION)
    component = tl.arange(0, RANK)[None, :]
    place = parts + (split.to(tl.int64) * rows + row) * adapters * rank + adapter * rank + component
    tl.store(place, total * factor, mask=(row < rows) & (component < rank))


@triton.jit(do_not_specialize=["rows", "splits"])
def sum_kernel(
    parts, out, beside, beside_stride, rows, border, splits,
    ROWS: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
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
    gradient, gradient_stride, inner, inner_stride, down, down_stride, bits, rows, columns,
    bytes_in_row, rank, factor,
    ADAPTERS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (c, t) adds sum_i drop_i(dh_i A_i) to a tile of the gradient."""
    tile = tl.program_id(0)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tile * 64 + tl.arange(0, 64)[None, :]
    inside = (row < rows) & (column < columns)
    total = tl.zeros((ROWS, 64), tl.float32)
    for adapter in tl.static_range(ADAPTERS):
        component = tl.arange(0, RANK)[None, :]
        line = inner + row.to(tl.int64) * inner_stride + adapter * rank
        left = tl.load(line + component, mask=(row < rows) & (component < rank), other=0.0)
        component = tl.arange(0, RANK)[:, None]
        line = down + (adapter * rank + component).to(tl.int64) * down_stride
        right = tl.load(line + column, mask=(component < rank) & (column < columns), other=0.0)
        part = tl.dot(left, right, input_precision=PRECISION)
        own = bits + (adapter * bytes_in_row).to(tl.int64) * rows
        total += tl.where(_keeps(own, row, rows, bytes_in_row, tile), part, 0.0)
    place = gradient + row.to(tl.int64) * gradient_stride + column
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32) + total * factor
    tl.store(place, total.to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "share"])
def gradient_kernel(
    inner, inner_stride, x, x_stride, bits, parts, rows, columns, bytes_in_row, share, rank, factor,
    ROWS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, c, s): a tile of columns of dh_i^T drop_i(x) over the rows of share s."""
    adapter = tl.program_id(0)
    adapters = tl.num_programs(0)
    split = tl.program_id(2)
    tile = tl.program_id(1)
    column = tile * 64 + tl.arange(0, 64)[None, :]
    component = tl.arange(0, RANK)[None, :]
    bits += adapter.to(tl.int64) * rows * bytes_in_row
    end = tl.minimum((split + 1) * share, rows)
    total = tl.zeros((RANK, 64), tl.float32)
    for start in range(split * share, end, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        line = inner + row.to(tl.int64) * inner_stride + adapter * rank
        left = tl.load(line + component, mask=(row < end) & (component < rank), other=0.0)
        inside = (row < end) & (column < columns)
        value = tl.load(x + row.to(tl.int64) * x_stride + column, mask=inside, other=0.0)
        value = tl.where(_keeps(bits, row, rows, bytes_in_row, tile), value, 0.0)
        total = tl.dot(tl.trans(left), value, total, input_precision=PRECISION)
    component = tl.arange(0, RANK)[:, None]
    place = parts + ((split * adapters + adapter) * rank + component).to(tl.int64) * columns
    tl.store(place + column, total * factor, mask=(component < rank) & (column < columns))

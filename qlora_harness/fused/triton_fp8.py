"""The functions of `fp8` and `fp8_weights` in Triton, for Hopper.

Import this only with Triton installed. Triton's compiler reads annotations, so kernels have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qlora_harness.fused.fp8 import Adapter, Quantised
from qlora_harness.fused.launch import launch, power_of_two
from qlora_harness.fused.triton_ops import scale_of
from qlora_harness.fused.triton_weights import is_expandable

# Tile sizes are the fastest of those tried on an H200, with 4,976 tokens and LLaMA-2-7B's layers.
_BM, _BN, _BK = 128, 256, 128  # of the product
_RANK_STEP = 64  # columns of h that it adds at once
_COPIED = 32  # rows of B that one program copies
_WARPS, _STAGES = 8, 3
# Of rounding, by whether weights are expanded and transposed: rows and columns of a tile, warps.
_ROUNDING = {
    (True, False): (128, 64, 4),
    (True, True): (256, 64, 8),
    (False, False): (16, 256, 4),
    (False, True): (128, 64, 8),
}


def quantise(x: Tensor, out: Quantised) -> None:
    """See `fp8.quantise`; the rows of x may be strided."""
    rows, columns = x.shape
    block = min(power_of_two(columns), 4096 if columns <= 2**14 else 8192)
    arguments = x, x.stride(0), *out, columns
    launch(quantise_kernel, (rows, 1, 1), arguments, block, num_warps=max(4, block // 512))


class Rounder:
    """Rounds the weights of an `Fp8Weights` to e4m3; `fits` says whether the kernel can."""

    def __init__(self, group: Any, states: Sequence[Any]) -> None:
        weights = [p.layer.weight for p in group.projections]
        self.fits = is_expandable(weights, states) and all(w.is_contiguous() for w in weights)
        if not self.fits:
            return
        first = states[0]
        nested = first is not None and first.nested
        self._arguments: list[Any] = []
        for weight, state in zip(weights, states, strict=True):
            scales = [weight] * 3  # never read
            if state is not None:
                outer = [state.state2.absmax, state.offset] if nested else [state.code] * 2
                scales = [state.absmax, *outer]
            self._arguments += [weight, *scales]
        self._arguments += self._arguments[:4] * (3 - len(states))
        codes = [weights[0]] * 2
        if first is not None:
            codes = [first.code, first.state2.code if nested else first.code]
        self._arguments += codes
        self._heights, self._width = group.heights, group.width
        self._factor = 1.0 / group.weight_scale
        self._kind = first is not None, nested

    def __call__(self, out: Tensor, transposed: bool) -> None:
        """Fills [N, K] or, transposed, [K, N]."""
        rows, columns, warps = _ROUNDING[self._kind[0], transposed]
        tiles = list(accumulate(-(-height // rows) for height in self._heights))
        second, third, height = _three(list(accumulate(self._heights)))
        first_tiles, second_tiles, _ = _three(tiles)
        grid = tiles[-1], -(-self._width // columns), 1
        arguments = (
            *(*self._arguments, out, out.stride(0), self._width, first_tiles, second_tiles),
            *(second, third, height, self._factor),
        )
        constants = *self._kind, transposed, rows, columns
        # Without fused multiply-add, scales are rounded twice, as in bitsandbytes.
        launch(round_kernel, grid, arguments, *constants, num_warps=warps, enable_fp_fusion=False)


def copy_adapters(group: Any, up: Tensor, down: Tensor) -> None:
    """Fills B, [N, R], and s A, [R, K], from the adapters of an `Fp8Weights`."""
    adapted = next(p for p in group.projections if p.down is not None)
    pairs = [(p.down, p.up) if p.down is not None else None for p in group.projections]
    pairs += [None] * (3 - len(pairs))
    tensors = [x for pair in pairs for x in pair or (adapted.down, adapted.up)]
    slots = [-1 if slot is None else slot for slot in group.slots] + [-1] * (3 - len(group.slots))
    second, third, height = _three(list(accumulate(group.heights)))
    arguments = (
        *(*tensors, up, up.stride(0), down, down.shape[1]),
        *(second, third, height, float(group.scale)),
    )
    rows = -(-height // _COPIED)
    constants = *slots, group.rank, power_of_two(group.border), _COPIED
    launch(copy_kernel, (rows + group.border, 1, 1), arguments, *constants)


def product(
    quantised: Quantised,
    weights: Tensor,
    scale: float,
    dtype: torch.dtype,
    adapter: Adapter | None,
    bias: Tensor | None,
) -> Tensor:
    """See `fp8.product`; `dtype` is bfloat16."""
    x, scales = quantised
    rows, depth = x.shape
    columns = len(weights)
    out = torch.empty(rows, columns, dtype=dtype, device=x.device)
    into = TensorDescriptor.from_tensor(out, [_BM, _BN // 2])
    inner = up = into  # never read without an adapter
    turned, ends, adapter_columns = False, [(columns, 0)], 0
    if adapter is not None:
        inner = TensorDescriptor.from_tensor(_on_16_bytes(adapter.inner), [_BM, _RANK_STEP])
        turned = adapter.up.stride(0) == 1
        up = (
            TensorDescriptor.from_tensor(adapter.up.t(), [_RANK_STEP, _BN])
            if turned
            else TensorDescriptor.from_tensor(adapter.up, [_BN, _RANK_STEP])
        )
        ends, adapter_columns = list(adapter.reach), adapter.inner.shape[1]
    second, third, _ = _three([row for row, _ in ends])
    arguments = (
        scales,
        TensorDescriptor.from_tensor(x, [_BM, _BK]),
        TensorDescriptor.from_tensor(weights, [_BN, _BK]),
        *(inner, up, into, out if bias is None else bias.to(dtype), scale),
        *(rows, columns, depth, second, third, *_three([column for _, column in ends])),
    )
    tiles = -(-rows // _BM) * -(-columns // _BN)
    constants = turned, adapter_columns > 0, bias is not None, _BM, _BN, _BK, _RANK_STEP
    grid = min(tiles, _multiprocessors(x.get_device())), 1, 1
    launch(product_kernel, grid, arguments, *constants, num_warps=_WARPS, num_stages=_STAGES)
    return out


def _on_16_bytes(x: Tensor) -> Tensor:
    """Returns a matrix whose rows start on 16 bytes, as TMA requires."""
    if x.stride(0) * x.element_size() % 16 == 0:
        return x
    wide = x.new_empty(len(x), -(-x.shape[1] // 8) * 8)[:, : x.shape[1]]
    return wide.copy_(x)


def _three(values: Sequence[int]) -> list[int]:
    """Repeats the last value for projections that a group doesn't have."""
    return [*values, *[values[-1]] * (3 - len(values))]


@lru_cache(maxsize=16)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def quantise_kernel(x, x_stride, values, scales, columns, BLOCK: tl.constexpr):
    """Program r rounds row r, whose largest magnitude then is in [128, 256)."""
    row = tl.program_id(0).to(tl.int64)
    line = x + row * x_stride
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(line + column, mask=column < columns, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(value))
    scale, factor = scale_of(tl.max(top, axis=0))
    tl.store(scales + row, scale)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        value = tl.load(line + column, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(values + row * columns + column, value.to(tl.float8e4nv), mask=inside)


@triton.jit
def round_kernel(
    weight_0, absmax_0, outer_0, offset_0,
    weight_1, absmax_1, outer_1, offset_1,
    weight_2, absmax_2, outer_2, offset_2,
    code, outer_code, out, stride, width, second_tile, third_tile, second, third, height, factor,
    EXPAND: tl.constexpr, NESTED: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rounds a tile of weights to bfloat16, and that times `factor` to e4m3.

    Tiles from `second_tile` on are the second projection's, whose rows begin at `second` in `out`,
    and so on.
    """
    tile = tl.program_id(0)
    weight = weight_0
    absmax = absmax_0
    outer = outer_0
    offset = offset_0
    begin = 0
    end = second
    if tile >= third_tile:
        weight = weight_2
        absmax = absmax_2
        outer = outer_2
        offset = offset_2
        begin = third
        end = height
        tile -= third_tile
    elif tile >= second_tile:
        weight = weight_1
        absmax = absmax_1
        outer = outer_1
        offset = offset_1
        begin = second
        end = third
        tile -= second_tile
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < end - begin)[:, None] & (column < width)[None, :]
    row = row.to(tl.int64)
    if EXPAND:
        BLOCKS: tl.constexpr = COLUMNS // 64
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        known = (row < end - begin)[:, None] & (block < width // 64)[None, :]
        block = row[:, None] * (width // 64) + block[None, :]
        if NESTED:
            level = tl.load(absmax + block, mask=known, other=0).to(tl.int32)
            above = tl.load(outer + block // 256, mask=known, other=0.0)
            scale = tl.load(outer_code + level) * above
            scale = scale + tl.load(offset)
        else:
            scale = tl.load(absmax + block, mask=known, other=0.0)
        at = block[:, :, None] * 32 + tl.arange(0, 32)[None, None, :]
        both = tl.load(weight + at, mask=known[:, :, None], other=0).to(tl.int32)
        high = tl.load(code + (both >> 4)) * scale[:, :, None]
        low = tl.load(code + (both & 15)) * scale[:, :, None]
        value = tl.reshape(tl.interleave(high, low), (ROWS, COLUMNS)).to(tl.bfloat16)
    else:
        at = row[:, None] * width + column[None, :]
        value = tl.load(weight + at, mask=inside, other=0.0)
    value = (value.to(tl.float32) * factor).to(tl.float8e4nv)
    row += begin
    if TRANSPOSED:
        at = column[:, None].to(tl.int64) * stride + row[None, :]
        tl.store(out + at, tl.trans(value), mask=tl.trans(inside))
    else:
        tl.store(out + row[:, None] * stride + column[None, :], value, mask=inside)


@triton.jit
def copy_kernel(
    down_0, up_0, down_1, up_1, down_2, up_2, up, up_stride, down, width, second, third, height,
    scale,
    SLOT_0: tl.constexpr, SLOT_1: tl.constexpr, SLOT_2: tl.constexpr, RANK: tl.constexpr,
    BORDER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The first programs write ROWS rows of B each, the others one row of s A.

    SLOT_i numbers the adapter of a projection, or is -1 without one.
    """
    rows = tl.cdiv(height, ROWS)
    if tl.program_id(0) < rows:
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
        column = tl.arange(0, BORDER)[None, :]
        slot = column // RANK
        first = (row < second) & (slot == SLOT_0)
        last = (row >= third) & (row < height) & (slot == SLOT_2)
        middle = (row >= second) & (row < third) & (slot == SLOT_1)
        at = row * RANK + column % RANK
        value = tl.load(up_0 + at, mask=first, other=0.0)
        value += tl.load(up_1 + at - second * RANK, mask=middle, other=0.0)
        value += tl.load(up_2 + at - third * RANK, mask=last, other=0.0)
        value = value.to(up.dtype.element_ty)
        inside = (row < height) & (column < up_stride)
        tl.store(up + row.to(tl.int64) * up_stride + column, value, mask=inside)
    else:
        line = tl.program_id(0) - rows
        source = down_0
        if line // RANK == SLOT_1:
            source = down_1
        elif line // RANK == SLOT_2:
            source = down_2
        for start in range(0, width, 2048):
            place = start + tl.arange(0, 2048)
            known = place < width
            scaled = tl.load(source + line % RANK * width + place, mask=known, other=0.0)
            scaled = scaled.to(tl.float32) * scale
            tl.store(down + line * width + place, scaled.to(down.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    scales, x, weights, inner, up, out, bias, scale, rows, columns, depth, second, third,
    end_0, end_1, end_2,
    TURNED: tl.constexpr, ADAPTER: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """Writes scales scale x weights^T + inner up^T + bias; each program computes several tiles.

    `up` is [N, R], or [R, N] if TURNED. Its rows from `second` on are the second projection's, and
    have entries in columns end_0 to end_1 only, and so on.
    """
    across, down = tl.cdiv(columns, BN), tl.cdiv(rows, BM)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        # Eight rows of tiles at a time, so that their weights stay in the L2 cache.
        first = tile // (8 * across) * 8
        size = tl.minimum(down - first, 8)
        m = (first + tile % (8 * across) % size) * BM
        n = tile % (8 * across) // size * BN
        sums = tl.zeros((BM, BN), tl.float32)
        for k in range(0, depth, BK):
            sums = tl.dot(x.load([m, k]), weights.load([n, k]).T, sums)
        row = m + tl.arange(0, BM)
        factor = tl.load(scales + row, mask=row < rows, other=0.0) * scale
        sums = sums * factor[:, None]
        if ADAPTER:
            last = n + BN - 1
            start = tl.where(n >= third, end_1, tl.where(n >= second, end_0, 0))
            end = tl.where(last >= third, end_2, tl.where(last >= second, end_1, end_0))
            for r in range(start // RANK_STEP * RANK_STEP, end, RANK_STEP):
                if TURNED:
                    sums = tl.dot(inner.load([m, r]), up.load([r, n]), sums)
                else:
                    sums = tl.dot(inner.load([m, r]), up.load([n, r]).T, sums)
        if BIAS:
            column = n + tl.arange(0, BN)
            more = tl.load(bias + column, mask=column < columns, other=0.0)
            sums = sums + more.to(tl.float32)[None, :]
        # In two halves, which need less shared memory.
        left, right = tl.split(tl.permute(tl.reshape(sums, (BM, 2, BN // 2)), (0, 2, 1)))
        out.store([m, n], left.to(out.dtype))
        out.store([m, n + BN // 2], right.to(out.dtype))

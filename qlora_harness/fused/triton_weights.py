"""Fills the matrices of `bordered` in Triton: expands 4-bit weights and copies adapters.

Import this only with Triton installed. Its compiler reads annotations, so the kernel has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_harness.fused.launch import launch, power_of_two

_BLOCK = 64  # weights per scale, as `model.base` quantises
_NESTED_BLOCK = 256  # scales per scale of scales
_CHUNK = 2048  # weights of a row that one program expands
_WARPS = 2  # the fastest of 2, 4 and 8 on an H100


class Loader:
    """Fills the matrix of a `Bordered`; `fits` says whether the kernel can.

    `states` holds bitsandbytes' QuantState of each weight, or None for one not in 4 bits.
    """

    def __init__(self, group: Any, states: Sequence[Any]) -> None:
        self.fits = is_expandable([p.layer.weight for p in group.projections], states)
        if not self.fits:
            return
        first = states[0]
        expand = first is not None
        nested = expand and first.nested
        missing = 3 - len(states)
        # Another tensor of the same dtype, never read, replaces a missing weight or adapter.
        self._weights: list[Any] = []
        for projection, state in zip(group.projections, states, strict=True):
            if expand:
                outer = [state.state2.absmax, state.offset] if nested else [state.code] * 2
                self._weights += [projection.layer.weight, state.absmax, *outer]
        self._weights += self._weights[:4] * missing
        if expand:
            self._weights += [first.code, first.state2.code if nested else first.code]
        some = [(p.down, p.up) for p in group.projections if p.down is not None]
        pairs = [
            (p.down, p.up) if p.down is not None else some[0] if some else None
            for p in group.projections
        ]
        pairs += pairs[:1] * missing
        self._adapters = [part for pair in pairs if pair is not None for part in pair]
        rows = group.height + group.border
        self._grid = (rows, -(-group.width // _CHUNK) if expand else 1, 1)
        self._numbers = (
            *(group.stride, group.width, group.border),
            *(group.heights[0], sum(group.heights[:2]), group.height, float(group.scale)),
        )
        slots = [-1 if slot is None else slot for slot in group.slots] + [-1] * missing
        border = power_of_two(max(group.border, 1))
        self._constants = (*slots, group.rank, border, expand, nested, _CHUNK // _BLOCK)

    def __call__(self, matrix: Tensor) -> None:
        """Fills M, [N + R, stride], contiguous with its unused columns."""
        weights, adapters = self._weights or [matrix] * 14, self._adapters or [matrix] * 6
        arguments = [*weights, *adapters, matrix, *self._numbers]
        # Without fused multiply-add, scales are rounded twice, as in bitsandbytes.
        options = {"enable_fp_fusion": False, "num_warps": _WARPS}
        launch(load_kernel, self._grid, arguments, *self._constants, **options)


def is_expandable(weights: Sequence[Tensor], states: Sequence[Any]) -> bool:
    """Whether the weights of a group are all in full precision, or all in 4 bits of one kind."""
    if len(states) > 3:
        return False
    if all(state is None for state in states):
        return True
    first = states[0]
    return all(
        state is not None
        and weight.dtype == torch.uint8
        and state.blocksize == _BLOCK
        and state.shape[1] % _BLOCK == 0
        and state.quant_type == first.quant_type
        and state.nested == first.nested
        and (not state.nested or state.state2.blocksize == _NESTED_BLOCK)
        for weight, state in zip(weights, states, strict=True)
    )


@triton.jit
def load_kernel(  # noqa: C901  # one kernel for every kind of group
    packed_0, absmax_0, outer_0, offset_0,
    packed_1, absmax_1, outer_1, offset_1,
    packed_2, absmax_2, outer_2, offset_2,
    code, outer_code, down_0, up_0, down_1, up_1, down_2, up_2,
    matrix, stride, width, border, second, third, height, scale,
    PLACE_0: tl.constexpr, PLACE_1: tl.constexpr, PLACE_2: tl.constexpr, RANK: tl.constexpr,
    BORDER: tl.constexpr, EXPAND: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Fills M of `bordered`: program (m, c) writes chunk c of row m.

    Rows before `second` are the first projection's, those before `third` the second's. PLACE_i is
    the place of a projection's adapter, -1 without one; a chunk is BLOCKS blocks of 64 weights.
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

"""The Triton kernel of `expand`; imported only where Triton is.

Triton compiles the annotations as well, so there are none.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCKS = 32


@triton.jit
def expand_kernel(
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    offset,
    out,
    blocks,
    NESTED: tl.constexpr,
):
    """Each program expands 32 blocks of 64 weights."""
    block = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = block < blocks
    if NESTED:
        level = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + block // 256, mask=inside, other=0.0)
        scale = tl.load(nested_code + level) * outer
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    both = tl.load(packed + place, mask=inside[:, None], other=0).to(tl.int32)
    first = tl.load(code + (both >> 4)) * scale[:, None]
    second = tl.load(code + (both & 15)) * scale[:, None]
    weights = tl.interleave(first, second)
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + place, weights.to(out.dtype.element_ty), mask=inside[:, None])

"""Attention along the paths of a prefix tree, in Triton.

FlashAttention-2's forward pass (Dao 2023, arXiv:2307.08691, algorithm 1) over the tiles in which a
block of queries sees a key. Products have the inputs' dtype and are summed in float32.

Compiling this takes a second, and one kernel serves packs of any length. FlexAttention, which does
the same, takes torch's compiler several seconds for each.

Import this only with Triton installed. Triton's compiler reads annotations, so kernels have none.
"""

from __future__ import annotations

from functools import cache
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_harness.fused.launch import launch, power_of_two
from qlora_harness.fused.triton_attention import AttentionTiling


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, end: Tensor, seen: Tensor) -> Tensor:
    """Returns the attention, [T, H, D], of queries [T, H, D] to keys and values, [T, K, D].

    `end` and `seen` are those of `tree_attention.TreeBlocks`; T is a multiple of its blocks.
    """
    tokens, heads, size = q.shape
    if k.stride() != v.stride() or k.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    out = q.new_empty(tokens, heads, size)
    columns = max(16, power_of_two(size))
    m, n, warps, stages = tiling(q.dtype, columns, _is_large(q.get_device()))
    launch(
        *(tree_kernel, (tokens // m, heads, 1)),
        (q, k, v, end, seen, out, *q.stride()[:2], *k.stride()[:2], len(seen), scale * log2(e)),
        *(heads // k.shape[1], size, columns, m, n, tokens // len(seen)),
        "ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
    )
    return out


def tiling(dtype: torch.dtype, columns: int, large: bool) -> AttentionTiling:
    """Returns what fits into the shared memory of a device, of 164 KiB if it is `large`, or 99."""
    if dtype == torch.float32:
        return AttentionTiling(32, 32, 4, 1)
    if columns > 128:
        return AttentionTiling(64, 32, 4, 2)
    return AttentionTiling(128, 64, 4 if columns <= 64 else 8, 3 if large else 2)


@cache
def _is_large(device: int) -> bool:
    """Whether a device is one for data centres; -1 is the CPU, for Triton's interpreter."""
    return device >= 0 and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


@triton.jit
def _load(line, first, stride, ROWS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Loads [rows, columns], with zeros in the columns after SIZE."""
    column = tl.arange(0, COLUMNS)[None, :]
    place = line + first.to(tl.int64) * stride + tl.arange(0, ROWS)[:, None] * stride + column
    if SIZE == COLUMNS:
        value = tl.load(place)
    else:
        value = tl.load(place, mask=column < SIZE, other=0.0)
    return value


@triton.jit
def _step(
    total, weight, top, q, k, v, stride, end, query, at, factor,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the running softmax; WHOLE: every query sees every key."""
    keys = _load(k, at, stride, N, SIZE, COLUMNS)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if not WHOLE:
        key = at + tl.arange(0, N)
        stop = tl.load(end + key)
        sees = (key[None, :] <= query[:, None]) & (query[:, None] < stop[None, :])
        scores = tl.where(sees, scores, float("-inf"))
    now = tl.maximum(top, tl.max(scores, axis=1) * factor)
    part = tl.exp2(scores * factor - now[:, None])
    shrink = tl.exp2(top - now)
    weight = weight * shrink + tl.sum(part, axis=1)
    total = total * shrink[:, None]
    values = _load(v, at, stride, N, SIZE, COLUMNS)
    total = tl.dot(part.to(values.dtype), values, total, input_precision=PRECISION)
    return total, weight, now


@triton.jit(do_not_specialize=["blocks"])
def tree_kernel(
    q, k, v, end, seen, out, q_token, q_head, k_token, k_head, blocks, factor,
    GROUP: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the attention of a tile of queries."""
    first = tl.program_id(0) * M
    head = tl.program_id(1)
    query = first + tl.arange(0, M)
    k += (head // GROUP).to(tl.int64) * k_head
    v += (head // GROUP).to(tl.int64) * k_head
    queries = _load(q + head.to(tl.int64) * q_head, first, q_token, M, SIZE, COLUMNS)
    total = tl.zeros([M, COLUMNS], tl.float32)
    weight = tl.zeros([M], tl.float32)
    # Finite, since a query may see nothing of its first tiles.
    top = tl.full([M], -1.0e30, tl.float32)
    seen += first // BLOCK * (blocks + 2)
    whole = tl.load(seen) * (BLOCK // N)
    some = tl.load(seen + 1) * (BLOCK // N)
    for tile in range(0, whole):
        at = tl.load(seen + 2 + tile // (BLOCK // N)) * BLOCK + tile % (BLOCK // N) * N
        total, weight, top = _step(
            total, weight, top, queries, k, v, k_token, end, query, at, factor, SIZE, COLUMNS, N,
            PRECISION, True,
        )  # fmt: skip
    for tile in range(whole, some):
        at = tl.load(seen + 2 + tile // (BLOCK // N)) * BLOCK + tile % (BLOCK // N) * N
        total, weight, top = _step(
            total, weight, top, queries, k, v, k_token, end, query, at, factor, SIZE, COLUMNS, N,
            PRECISION, False,
        )  # fmt: skip
    total = total / weight[:, None]
    width = tl.num_programs(1) * SIZE
    column = tl.arange(0, COLUMNS)[None, :]
    line = out + first.to(tl.int64) * width + head * SIZE
    place = line + tl.arange(0, M)[:, None] * width + column
    tl.store(place, total.to(out.dtype.element_ty), mask=column < SIZE)

"""Attention within the short texts of a packed row, in Triton, on rotated queries and keys.

Follows FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2): tiles with a running
softmax, and a backward pass from the log-sum-exp of each query. With c = scale log2(e):

    S = c Q K^T, masked; L = log2(sum 2^S); P = 2^(S - L); O = P V
    D = rowsum(dO O); dP = dO V^T; dS = P (dP - D)
    dV = P^T dO; dQ = scale dS K; dK = scale dS^T Q

FlashAttention uses large tiles, and as many for each text as the longest has; with many short texts
in a row, most are empty. Here a list (`PackedRow.tiles`) holds only the tiles that exist. A program
has one tile of one text and one head, [first, first + M) of its queries or [first, first + N) of
its keys, and visits only what that tile sees or is seen by.

Gradients of queries and keys are rotated back as they are written: a head with halves [x, y]
becomes [x cos + y sin, y cos - x sin]. Products have the row's dtype and are summed in float32.

Import this only with Triton installed. Triton's compiler reads annotations, so kernels have none.
"""

from __future__ import annotations

from math import e, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_harness.fused.launch import launch
from qlora_harness.fused.packed_row import PackedRow


class AttentionTiling(NamedTuple):
    """How an attention kernel divides its work."""

    queries: int  # of a tile
    keys: int
    warps: int  # a product of 64 rows needs four
    stages: int  # loads in flight


# The fastest of ten each on an H100, for 28 texts of 300 tokens and 32 heads of 128.
FORWARD = AttentionTiling(64, 32, 4, 3)
QUERY_GRADIENT = AttentionTiling(64, 32, 4, 2)
KEY_GRADIENT = AttentionTiling(32, 64, 4, 1)


def forward(
    projected: Tensor, heads: int, key_heads: int, row: PackedRow, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.forward`; also returns L, [heads, T] float32."""
    tokens, size = row.cos.shape
    assert projected.is_contiguous()
    attended = projected.new_empty(tokens, heads, size)
    lse = projected.new_empty(heads, tokens, dtype=torch.float32)
    m, n, warps, stages = FORWARD
    tiles = row.tiles(m)
    launch(
        *(forward_kernel, (len(tiles) * heads, 1, 1)),
        (projected, tiles, attended, lse, tokens, _factor(scale)),
        *(heads, key_heads, size, m, n),
        num_warps=warps,
        num_stages=stages,
    )
    return attended, lse


def backward(
    d_attended: Tensor,
    projected: Tensor,
    attended: Tensor,
    lse: Tensor,
    row: PackedRow,
    scale: float,
) -> Tensor:
    """See `attention.backward`; the tokens of `d_attended` may have any stride."""
    tokens, heads, size = attended.shape
    key_heads = (projected.shape[1] // size - heads) // 2
    if d_attended.stride()[1:] != (size, 1):
        d_attended = d_attended.contiguous()
    assert projected.is_contiguous()
    assert attended.is_contiguous()
    out, delta = torch.empty_like(projected), torch.empty_like(lse)
    ends = out, tokens, float(scale), _factor(scale)
    d_rows = d_attended, d_attended.stride(0), delta
    shape = heads, key_heads, size
    m, n, warps, stages = QUERY_GRADIENT
    tiles = row.tiles(m)
    launch(
        *(query_gradient_kernel, (len(tiles) * heads, 1, 1)),
        (projected, row.cos, row.sin, tiles, attended, lse, *d_rows, *ends),
        *(*shape, m, n),
        num_warps=warps,
        num_stages=stages,
    )
    m, n, warps, stages = KEY_GRADIENT
    tiles = row.tiles(n)
    launch(
        *(key_gradient_kernel, (len(tiles) * key_heads, 1, 1)),
        (projected, row.cos, row.sin, tiles, lse, *d_rows, *ends),
        *(*shape, m, n),
        num_warps=warps,
        num_stages=stages,
    )
    return out


def _factor(scale: float) -> float:
    """Returns the scale of scores for exponentials of base 2."""
    return float(scale) * log2(e)


@triton.jit
def _tile(tiles, number):
    """Reads a line of `tiles`."""
    place = tiles + number * 3
    start = tl.load(place).to(tl.int64)
    length = tl.load(place + 1)
    first = tl.load(place + 2)
    return start, length, first


@triton.jit
def _load(line, token, length, stride, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """Loads [tokens, columns]; zeros behind the end of the text."""
    place = line + token[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    if WHOLE:
        value = tl.load(place)
    else:
        value = tl.load(place, mask=token[:, None] < length, other=0.0)
    return value


@triton.jit
def _store_turned_back(
    line, cos, sin, gradient, token, length, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    """Writes the gradient of a head before it was rotated, given that of the rotated one."""
    halves = tl.reshape(gradient, [gradient.shape[0], 2, SIZE // 2])
    first, second = tl.split(tl.permute(halves, 0, 2, 1))
    half = tl.arange(0, SIZE // 2)[None, :]
    inside = token[:, None] < length
    turn = token[:, None] * SIZE + half
    c = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
    place = line + token[:, None] * WIDTH + half
    kind = line.dtype.element_ty
    tl.store(place, (first * c + second * s).to(kind), mask=inside)
    tl.store(place + SIZE // 2, (second * c - first * s).to(kind), mask=inside)


@triton.jit
def _attend(
    total, weight, top, q, keys, values, query, at, length, factor,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the running softmax; EDGE: some keys are behind some queries."""
    key = at + tl.arange(0, N)
    k = _load(keys, key, length, WIDTH, SIZE, not EDGE)
    scores = tl.dot(q, tl.trans(k))
    if EDGE:
        scores = tl.where(key[None, :] <= query[:, None], scores, float("-inf"))
    now = tl.maximum(top, tl.max(scores, axis=1) * factor)
    part = tl.exp2(scores * factor - now[:, None])
    shrink = tl.exp2(top - now)
    weight = weight * shrink + tl.sum(part, axis=1)
    total = total * shrink[:, None]
    v = _load(values, key, length, WIDTH, SIZE, not EDGE)
    total = tl.dot(part.to(v.dtype), v, total)
    return total, weight, now


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    projected, tiles, attended, lse, tokens, factor,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Writes O and L of a tile of queries."""
    WIDTH: tl.constexpr = (HEADS + 2 * KEY_HEADS) * SIZE
    head = tl.program_id(0) % HEADS
    start, length, first = _tile(tiles, tl.program_id(0) // HEADS)
    line = projected + start * WIDTH
    keys = line + (HEADS + head // (HEADS // KEY_HEADS)) * SIZE
    values = keys + KEY_HEADS * SIZE
    query = first + tl.arange(0, M)
    q = _load(line + head * SIZE, query, length, WIDTH, SIZE, False)
    total = tl.zeros([M, SIZE], tl.float32)
    weight = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    edge = first // N * N
    for at in range(0, edge, N):
        total, weight, top = _attend(
            total, weight, top, q, keys, values, query, at, length, factor, WIDTH, SIZE, N, False
        )
    for at in range(edge, tl.minimum(first + M, length), N):
        total, weight, top = _attend(
            total, weight, top, q, keys, values, query, at, length, factor, WIDTH, SIZE, N, True
        )
    inside = query < length
    total = total / weight[:, None]
    out = attended + start * (HEADS * SIZE) + head * SIZE
    place = out + query[:, None] * (HEADS * SIZE) + tl.arange(0, SIZE)[None, :]
    tl.store(place, total.to(attended.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + head * tokens + start + query, top + tl.log2(weight), mask=inside)


@triton.jit
def _query_step(
    dq, q, dout, level, inner, keys, values, query, at, length, factor,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of keys gives to dQ, without the scale."""
    key = at + tl.arange(0, N)
    k = _load(keys, key, length, WIDTH, SIZE, not EDGE)
    v = _load(values, key, length, WIDTH, SIZE, not EDGE)
    scores = tl.dot(q, tl.trans(k))
    dp = tl.dot(dout, tl.trans(v))
    part = tl.exp2(scores * factor - level[:, None])
    if EDGE:
        part = tl.where(key[None, :] <= query[:, None], part, 0.0)
    ds = (part * (dp - inner[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq)


@triton.jit(do_not_specialize=["tokens"])
def query_gradient_kernel(
    projected, cos, sin, tiles, attended, lse, dout, dout_stride, delta, out, tokens, scale, factor,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Writes D of a tile of queries to `delta`, and dQ, rotated back, to `out`."""
    WIDTH: tl.constexpr = (HEADS + 2 * KEY_HEADS) * SIZE
    head = tl.program_id(0) % HEADS
    start, length, first = _tile(tiles, tl.program_id(0) // HEADS)
    line = projected + start * WIDTH
    cos += start * SIZE
    sin += start * SIZE
    keys = line + (HEADS + head // (HEADS // KEY_HEADS)) * SIZE
    values = keys + KEY_HEADS * SIZE
    query = first + tl.arange(0, M)
    inside = query < length
    q = _load(line + head * SIZE, query, length, WIDTH, SIZE, False)
    d_rows = dout + start * dout_stride + head * SIZE
    d_o = _load(d_rows, query, length, dout_stride, SIZE, False)
    rows = attended + start * (HEADS * SIZE) + head * SIZE
    output = _load(rows, query, length, HEADS * SIZE, SIZE, False)
    inner = tl.sum(d_o.to(tl.float32) * output.to(tl.float32), axis=1)
    entry = head * tokens + start + query
    tl.store(delta + entry, inner, mask=inside)
    level = tl.load(lse + entry, mask=inside, other=0.0)
    dq = tl.zeros([M, SIZE], tl.float32)
    edge = first // N * N
    for at in range(0, edge, N):
        dq = _query_step(
            dq, q, d_o, level, inner, keys, values, query, at, length, factor, WIDTH, SIZE, N, False
        )
    for at in range(edge, tl.minimum(first + M, length), N):
        dq = _query_step(
            dq, q, d_o, level, inner, keys, values, query, at, length, factor, WIDTH, SIZE, N, True
        )
    place = out + start * WIDTH + head * SIZE
    _store_turned_back(place, cos, sin, dq * scale, query, length, WIDTH, SIZE)


@triton.jit
def _key_step(
    dk, dv, k, v, queries, dout, dout_stride, lse, delta, key, at, length, factor,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of queries gives to dK, without the scale, and to dV; S is transposed."""
    query = at + tl.arange(0, M)
    inside = query < length
    q = _load(queries, query, length, WIDTH, SIZE, False)
    d_tile = _load(dout, query, length, dout_stride, SIZE, False)
    level = tl.load(lse + query, mask=inside, other=0.0)
    inner = tl.load(delta + query, mask=inside, other=0.0)
    scores = tl.dot(k, tl.trans(q))
    dp = tl.dot(v, tl.trans(d_tile))
    part = tl.exp2(scores * factor - level[None, :])
    if EDGE:
        part = tl.where(key[:, None] <= query[None, :], part, 0.0)
    dv = tl.dot(part.to(v.dtype), d_tile, dv)
    ds = (part * (dp - inner[None, :])).to(v.dtype)
    return tl.dot(ds, q, dk), dv


@triton.jit(do_not_specialize=["tokens"])
def key_gradient_kernel(
    projected, cos, sin, tiles, lse, dout, dout_stride, delta, out, tokens, scale, factor,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Writes dK, rotated back, and dV of a tile of keys, summed over the query heads they serve."""
    WIDTH: tl.constexpr = (HEADS + 2 * KEY_HEADS) * SIZE
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    key_head = tl.program_id(0) % KEY_HEADS
    start, length, first = _tile(tiles, tl.program_id(0) // KEY_HEADS)
    line = projected + start * WIDTH
    cos += start * SIZE
    sin += start * SIZE
    keys = line + (HEADS + key_head) * SIZE
    key = first + tl.arange(0, N)
    k = _load(keys, key, length, WIDTH, SIZE, False)
    v = _load(keys + KEY_HEADS * SIZE, key, length, WIDTH, SIZE, False)
    dk = tl.zeros([N, SIZE], tl.float32)
    dv = tl.zeros([N, SIZE], tl.float32)
    edge = tl.minimum(first + N, length)
    for head in range(key_head * GROUP, (key_head + 1) * GROUP):
        queries = line + head * SIZE
        d_rows = dout + start * dout_stride + head * SIZE
        levels = lse + head * tokens + start
        inners = delta + head * tokens + start
        for at in range(first, edge, M):
            dk, dv = _key_step(
                dk, dv, k, v, queries, d_rows, dout_stride, levels, inners, key, at, length, factor,
                WIDTH, SIZE, M, True,
            )  # fmt: skip
        for at in range(first + tl.cdiv(N, M) * M, length, M):
            dk, dv = _key_step(
                dk, dv, k, v, queries, d_rows, dout_stride, levels, inners, key, at, length, factor,
                WIDTH, SIZE, M, False,
            )  # fmt: skip
    place = out + start * WIDTH + (HEADS + key_head) * SIZE
    _store_turned_back(place, cos, sin, dk * scale, key, length, WIDTH, SIZE)
    place += KEY_HEADS * SIZE + key[:, None] * WIDTH + tl.arange(0, SIZE)[None, :]
    tl.store(place, dv.to(out.dtype.element_ty), mask=key[:, None] < length)

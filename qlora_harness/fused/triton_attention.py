"""Attention of a row of short texts in Triton, of queries and keys that are rotated already.

FlashAttention-2 (Dao 2023, arXiv:2307.08691) takes large tiles, and a program for each tile that
the longest text could have; where many short texts share a row, much of that is empty. Here a list
of tiles names only those there are. Importable where there is no Triton; see `attention_kernels`.
"""

from __future__ import annotations

from math import e, log2
from typing import NamedTuple

import torch

from qlora_harness.fused.row import Row
from qlora_harness.fused.triton_ops import launch
from qlora_harness.fused.triton_ops import usable as usable_by_triton

_SIZES = 64, 128  # of heads


class Tiling(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        queries: Of a tile, M.
        keys: Of a tile, N.
        warps: Of a program; a product of 64 rows takes four.
        stages: Loads of the loop under way at once.
    """

    queries: int
    keys: int
    warps: int
    stages: int


# The fastest of ten each on an H100, for 28 texts of 300 tokens and 32 heads of 128.
FORWARD = Tiling(64, 32, 4, 3)
QUERY_GRADIENT = Tiling(64, 32, 4, 2)
KEY_GRADIENT = Tiling(32, 64, 4, 1)


def usable(projected: torch.Tensor, size: int) -> bool:
    """Whether the kernels can work on a row.

    Args:
        projected: Queries, keys and values side by side, [T, (heads + 2 key heads) D].
        size: D.
    """
    return (
        usable_by_triton(projected)
        and projected.dtype in (torch.bfloat16, torch.float16)
        and projected.is_contiguous()
        and size in _SIZES
    )


def forward(
    projected: torch.Tensor, heads: int, key_heads: int, row: Row, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside each text of a row.

    Args:
        projected: Rotated queries and keys, and values, side by side, [T, (heads + 2 key heads) D],
            contiguous.
        heads: Of queries.
        key_heads: Of keys and of values; divides `heads`.
        row: Where the texts lie.
        scale: Factor of the scores.

    Returns:
        [T, heads, D], and the logarithm to base 2 of the sum of exponentials for each query, which
        `backward` needs, [heads, T] float32.
    """
    from qlora_harness.fused.attention_kernels import forward_kernel

    tokens, size = row.cos.shape
    assert projected.is_contiguous()
    attended = projected.new_empty(tokens, heads, size)
    lse = projected.new_empty(heads, tokens, dtype=torch.float32)
    m, n, warps, stages = FORWARD
    tiles = row.tiles(m)
    arguments = projected, tiles, attended, lse, tokens, _factor(scale)
    launch(
        *(forward_kernel, (len(tiles) * heads, 1, 1), arguments),
        *(heads, key_heads, size, m, n),
        num_warps=warps,
        num_stages=stages,
    )
    return attended, lse


def backward(
    d_attended: torch.Tensor,
    projected: torch.Tensor,
    attended: torch.Tensor,
    lse: torch.Tensor,
    row: Row,
    scale: float,
) -> torch.Tensor:
    """Returns the gradient of the row before it was rotated, side by side like `projected`.

    Args:
        d_attended: Gradient of `attended`, [T, heads, D]; tokens may be further apart.
        projected: As in `forward`.
        attended: From `forward`.
        lse: From `forward`.
        row: As in `forward`, with the angles of its tokens.
        scale: As in `forward`.
    """
    from qlora_harness.fused.attention_kernels import key_gradient_kernel, query_gradient_kernel

    tokens, heads, size = attended.shape
    key_heads = (projected.shape[1] // size - heads) // 2
    if d_attended.stride()[1:] != (size, 1):
        d_attended = d_attended.contiguous()
    assert projected.is_contiguous() and attended.is_contiguous()
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
    """Of scores whose exponentials have base 2."""
    return float(scale) * log2(e)

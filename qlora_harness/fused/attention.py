"""Causal attention within each text of a packed row, forward and backward, outside autograd.

Three backends: on CUDA in 16 bits, Triton for head sizes 64 and 128, which is faster for short
texts, and FlashAttention for others; elsewhere torch's attention, text by text.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qlora_harness.fused import launch
from qlora_harness.fused.ops import rotated
from qlora_harness.fused.packed_row import PackedRow


def forward(
    projected: Tensor, heads: int, key_heads: int, row: PackedRow, scale: float
) -> tuple[Tensor, Any]:
    """Returns the attended values, [T, heads, D], and a state for `backward`.

    `projected` holds rotated queries, rotated keys and values side by side,
    [T, (heads + 2 key heads) D]; `scale` multiplies the scores.
    """
    if uses_triton(projected, row.cos.shape[1]):
        from qlora_harness.fused import triton_attention

        return triton_attention.forward(projected, heads, key_heads, row, scale)
    q, k, v = split_heads(projected, heads, key_heads)
    if _uses_flash(q):
        return _flash(q, k, v, row, scale)
    return torch.cat([_plain(a, b, c, scale) for a, b, c in _texts((q, k, v), row)]), None


def backward(
    d_attended: Tensor,
    projected: Tensor,
    attended: Tensor,
    state: Any,
    row: PackedRow,
    scale: float,
) -> Tensor:
    """Returns the gradient of `projected` before rotation, from that of `attended`."""
    heads, size = attended.shape[1:]
    if uses_triton(projected, size):
        from qlora_harness.fused import triton_attention

        return triton_attention.backward(d_attended, projected, attended, state, row, scale)
    q, k, v = split_heads(projected, heads, (projected.shape[1] // size - heads) // 2)
    if _uses_flash(q):
        out, leaves = state
        dq, dk, dv = torch.autograd.grad(out, leaves, d_attended)
    else:
        gradients = [
            _plain_backward(d, a, b, c, scale) for a, b, c, d in _texts((q, k, v, d_attended), row)
        ]
        dq, dk, dv = (torch.cat(parts) for parts in zip(*gradients, strict=True))
    parts = rotated(dq, row, back=True), rotated(dk, row, back=True), dv
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def uses_triton(projected: Tensor, size: int) -> bool:
    """Whether the Triton kernels support a row with heads of a size."""
    return (
        launch.usable(projected)
        and projected.dtype in (torch.bfloat16, torch.float16)
        and projected.is_contiguous()
        and size in (64, 128)
    )


def split_heads(projected: Tensor, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views of queries, keys and values, [T, heads, D]."""
    x = projected.view(len(projected), heads + 2 * key_heads, -1)
    return x[:, :heads], x[:, heads : heads + key_heads], x[:, heads + key_heads :]


def _uses_flash(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def _flash(
    q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scale: float
) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
    """Returns the output; and for backward, the output with its graph, and the graph's leaves."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 accepts any number of key heads; later versions need a flag if it differs.
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    with torch.enable_grad():
        out = varlen_attn(
            q, k, v, row.cu_seqlens, row.cu_seqlens, row.max_seqlen, row.max_seqlen, **options
        )
    assert isinstance(out, Tensor)
    return out.detach(), (out, leaves)


def _texts(tensors: tuple[Tensor, ...], row: PackedRow) -> list[tuple[Tensor, ...]]:
    return [
        tuple(x[start:stop] for x in tensors)
        for start, stop in zip(row.starts[:-1], row.starts[1:], strict=True)
    ]


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attends within one text, [t, heads, D]."""
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def _plain_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = _plain(leaves[0], leaves[1], leaves[2], scale)
    return torch.autograd.grad(out, leaves, d_out)

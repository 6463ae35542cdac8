"""The operations of a layer and their backward, outside autograd: fused on CUDA, plain elsewhere.

All work on rows of tokens: [T, H], or [T, heads, D] inside attention. On CUDA norms, gated
products, rotations and, with heads of 64 or 128, attention are Triton kernels, and other attention
in 16 bits is FlashAttention over variable lengths; everywhere else they are a few lines of torch,
which the tests compare with autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from qlora_harness.fused import triton_attention, triton_ops
from qlora_harness.fused.row import Rotation, Row


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalises rows as LLaMA does: in float32, cast back, then multiplied.

    Args:
        x: [T, H], contiguous.
        weight: [H].
        eps: Added to the mean square.
        out: [T, H], written.
        add: Added to x first, [T, H], contiguous.

    Returns:
        What was normalised: x, or its sum with `add`.
    """
    if triton_ops.usable(x):
        return triton_ops.rms_norm(x, weight, eps, out, add)
    total = x if add is None else x + add
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    out.copy_(weight * (wide * scale).to(x.dtype))
    return total


def rms_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    add: torch.Tensor | None = None,
) -> None:
    """Writes the gradient of x; the weight is frozen.

    Args:
        gradient: Of the normalised rows, [T, H]; becomes the normalised rows themselves.
        x: [T, H], contiguous.
        weight: [H].
        eps: As in `rms_norm`.
        out: [T, H], written.
        add: Added to the gradient of x, [T, H].
    """
    if triton_ops.usable(x):
        triton_ops.rms_norm_backward(gradient, x, weight, eps, out, add)
        return
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normed = wide * scale
    inner = (gradient * weight).float()
    found = scale * (inner - normed * (inner * normed).mean(dim=-1, keepdim=True))
    out.copy_(found if add is None else found + add)
    gradient.copy_(weight * normed.to(x.dtype))


def copy(source: torch.Tensor, out: torch.Tensor) -> None:
    """Copies rows into longer ones; torch's own copy takes three times as long there.

    Args:
        source: [T, N], contiguous.
        out: [T, N], written.
    """
    if triton_ops.usable(source):
        triton_ops.copy(source, out)
    else:
        out.copy_(source)


def swiglu(gates: torch.Tensor, out: torch.Tensor) -> None:
    """Writes silu(gate) * up.

    Args:
        gates: [gate, up] side by side, [T, 2 I], contiguous.
        out: [T, I], written.
    """
    if triton_ops.usable(gates):
        triton_ops.swiglu(gates, out)
        return
    gate, up = gates.chunk(2, dim=1)
    torch.mul(silu(gate), up, out=out)


def swiglu_backward(gates: torch.Tensor, gradient: torch.Tensor) -> None:
    """Turns gate and up into their gradients, and the product's gradient into the product.

    Args:
        gates: As in `swiglu`; overwritten.
        gradient: Of the product, [T, I]; overwritten.
    """
    if triton_ops.usable(gates):
        triton_ops.swiglu_backward(gates, gradient)
        return
    gate, up = gates.chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate.float()).to(gate.dtype)
    active = silu(gate)
    d_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = gradient * active
    torch.mul(active, up, out=gradient)
    gate.copy_(d_gate)
    up.copy_(d_up)


def rotate(projected: torch.Tensor, heads: int, row: Rotation) -> None:
    """Rotates heads by their positions, in place.

    Args:
        projected: Queries, keys and values side by side, [T, N].
        heads: How many of the first heads are rotated.
        row: Holds cosines and sines.
    """
    if triton_ops.usable(projected):
        triton_ops.rotate(projected, heads, row.cos, row.sin)
        return
    size = row.cos.shape[1]
    turned = projected[:, : heads * size].view(len(projected), heads, size)
    turned.copy_(_rotate_half(turned, row, back=False))


def _turned_back(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, row: Row) -> torch.Tensor:
    """Rotates the gradients of queries and keys back, and puts all side by side, [T, N]."""
    parts = _rotate_half(dq, row, back=True), _rotate_half(dk, row, back=True), dv
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _rotate_half(x: torch.Tensor, row: Rotation, back: bool) -> torch.Tensor:
    cos, sin = row.cos[:, None], row.sin[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((second, -first) if back else (-second, first), dim=-1)
    return x * cos + turned * sin


def _flash(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def attention(
    projected: torch.Tensor, heads: int, key_heads: int, row: Row, scale: float
) -> tuple[torch.Tensor, Any]:
    """Causal attention inside each text of a row.

    Args:
        projected: Rotated queries and keys, and values, side by side, [T, (heads + 2 key heads) D].
        heads: Of queries.
        key_heads: Of keys and of values; divides `heads`.
        row: Where the texts lie.
        scale: Factor of the scores.

    Returns:
        [T, heads, D], and what `attention_backward` needs besides.
    """
    if triton_attention.usable(projected, row.cos.shape[1]):
        return triton_attention.forward(projected, heads, key_heads, row, scale)
    q, k, v = split_heads(projected, heads, key_heads)
    if _flash(q):
        out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, row.borders, row.borders, row.longest, row.longest, 0.0, True, False),
            scale=scale,
        )
        return out, (lse, rng, unused)
    return torch.cat([_plain(a, b, c, scale) for a, b, c in _parts((q, k, v), row)]), None


def attention_backward(
    dout: torch.Tensor,
    projected: torch.Tensor,
    out: torch.Tensor,
    state: Any,
    row: Row,
    scale: float,
) -> torch.Tensor:
    """Returns the gradient of the row before it was rotated, side by side, [T, N].

    Args:
        dout: Of what was attended, [T, heads, D].
        projected: As in `attention`.
        out: From `attention`.
        state: From `attention`.
        row: Where the texts lie, and the angles of its tokens.
        scale: Factor of the scores.
    """
    heads, size = out.shape[1:]
    if triton_attention.usable(projected, size):
        return triton_attention.backward(dout, projected, out, state, row, scale)
    q, k, v = split_heads(projected, heads, (projected.shape[1] // size - heads) // 2)
    if _flash(q):
        lse, rng, unused = state
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *(dout, q, k, v, out, lse, row.borders, row.borders, row.longest, row.longest),
            *(0.0, True, rng, unused),
            scale=scale,
        )
        return _turned_back(dq, dk, dv, row)
    found = []
    with torch.enable_grad():
        for a, b, c, d in _parts((q, k, v, dout), row):
            leaves = [x.detach().requires_grad_() for x in (a, b, c)]
            out = _plain(leaves[0], leaves[1], leaves[2], scale)
            found.append(torch.autograd.grad(out, leaves, d))
    dq, dk, dv = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _turned_back(dq, dk, dv, row)


def split_heads(
    projected: torch.Tensor, heads: int, key_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns views of queries, keys and values, [T, heads, D].

    Args:
        projected: Side by side, [T, (heads + 2 key heads) D].
        heads: Of queries.
        key_heads: Of keys and of values.
    """
    x = projected.view(len(projected), heads + 2 * key_heads, -1)
    return x[:, :heads], x[:, heads : heads + key_heads], x[:, heads + key_heads :]


def _parts(tensors: tuple[torch.Tensor, ...], row: Row) -> list[tuple[torch.Tensor, ...]]:
    return [
        tuple(x[start:stop] for x in tensors)
        for start, stop in zip(row.starts[:-1], row.starts[1:], strict=True)
    ]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One text: [t, heads, D]."""
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)

"""The operations of a layer and their backward, outside autograd: fused on CUDA, plain elsewhere.

All work on rows of tokens: [T, H], or [T, heads, D] inside attention. On CUDA in bfloat16 norms,
gated products and rotations are Liger's kernels and attention is FlashAttention over variable
lengths; everywhere else they are a few lines of torch, which the tests compare with autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from qlora_harness.fused.row import Row
from qlora_harness.model.kernels import has_liger

_ROWS = 1024  # of logits at a time
_LLAMA = 0  # Liger's number of "multiply by the weight after casting back"


def _fused(x: torch.Tensor) -> bool:
    return x.is_cuda and has_liger()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, Any]:
    """Normalises rows as LLaMA does: in float32, cast back, then multiplied.

    Args:
        x: [T, H].
        weight: [H].
        eps: Added to the mean square.

    Returns:
        [T, H] in x's dtype, and what `rms_norm_backward` needs besides x.
    """
    if _fused(x):
        from liger_kernel.ops import rms_norm_forward

        y: torch.Tensor
        y, _, rstd, block, warps, _ = rms_norm_forward(x, weight, eps, 0.0, "llama", None)
        return y, (rstd, block, warps)
    rstd = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
    normed: torch.Tensor = weight * (x.float() * rstd).to(x.dtype)
    return normed, rstd


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, state: Any
) -> torch.Tensor:
    """Returns the gradient of x; the weight is frozen.

    Args:
        dy: [T, H]; may be overwritten.
        x: [T, H].
        weight: [H].
        state: From `rms_norm`.
    """
    if _fused(x):
        from liger_kernel.ops import rms_norm_backward as backward

        rstd, block, warps = state
        dx: torch.Tensor = backward(
            dy, x, weight, rstd, 0.0, _LLAMA, block, warps, True, None, needs_dw=False
        )[0]
        return dx
    normed = x.float() * state
    inner = (dy * weight).float()
    mean = (inner * normed).mean(dim=-1, keepdim=True)
    plain: torch.Tensor = (state * (inner - normed * mean)).to(x.dtype)
    return plain


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) * up.

    Args:
        gate: [T, I].
        up: [T, I].
    """
    if _fused(gate):
        from liger_kernel.ops import swiglu_forward

        product: torch.Tensor = swiglu_forward(gate, up)[-1]
        return product
    return silu(gate) * up


def swiglu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of gate and up; on CUDA they overwrite both.

    Args:
        dy: [T, I].
        gate: [T, I].
        up: [T, I].
    """
    if _fused(gate):
        from liger_kernel.ops import swiglu_backward as backward

        dgate, dup = backward(gate, up, dy)
        return dgate, dup
    sigmoid = torch.sigmoid(gate.float()).to(gate.dtype)
    return dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid


def rotate(
    q: torch.Tensor, k: torch.Tensor, row: Row, *, back: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys by their positions; on CUDA in place.

    Args:
        q: [T, heads, D].
        k: [T, key heads, D].
        row: Holds cosines and sines.
        back: Whether to rotate the other way, which is the gradient.
    """
    if _fused(q):
        from liger_kernel.ops import rope_backward, rope_forward

        function = rope_backward if back else rope_forward
        cos, sin = row.cos[None], row.sin[None]
        turned = function(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)
        return turned[0].transpose(1, 2)[0], turned[1].transpose(1, 2)[0]
    return _rotate_half(q, row, back), _rotate_half(k, row, back)


def _rotate_half(x: torch.Tensor, row: Row, back: bool) -> torch.Tensor:
    cos, sin = row.cos[:, None], row.sin[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((second, -first) if back else (-second, first), dim=-1)
    return x * cos + turned * sin


def _flash(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: Row, scale: float
) -> tuple[torch.Tensor, Any]:
    """Causal attention inside each text of a row.

    Args:
        q: [T, heads, D], rotated.
        k: [T, key heads, D], rotated.
        v: [T, key heads, D].
        row: Where the texts lie.
        scale: Factor of the scores.

    Returns:
        [T, heads, D], and what `attention_backward` needs besides.
    """
    if _flash(q):
        out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, row.borders, row.borders, row.longest, row.longest, 0.0, True, False),
            scale=scale,
        )
        return out, (lse, rng, unused)
    return torch.cat([_plain(a, b, c, scale) for a, b, c in _parts((q, k, v), row)]), None


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    state: Any,
    row: Row,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of q, k and v.

    Args:
        dout: [T, heads, D].
        q: As in `attention`.
        k: As in `attention`.
        v: As in `attention`.
        out: From `attention`.
        state: From `attention`.
        row: Where the texts lie.
        scale: Factor of the scores.
    """
    if _flash(q):
        lse, rng, unused = state
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *(dout, q, k, v, out, lse, row.borders, row.borders, row.longest, row.longest),
            *(0.0, True, rng, unused),
            scale=scale,
        )
        return dq, dk, dv
    found = []
    with torch.enable_grad():
        for a, b, c, d in _parts((q, k, v, dout), row):
            leaves = [x.detach().requires_grad_() for x in (a, b, c)]
            out = _plain(leaves[0], leaves[1], leaves[2], scale)
            found.append(torch.autograd.grad(out, leaves, d))
    dq, dk, dv = (torch.cat(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv


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


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Returns the summed negative log-likelihood, nats, float32; on CUDA without whole logits.

    Args:
        hidden: [R, H]; differentiable.
        weight: Of the output head, [V, H]; frozen.
        targets: [R] int64.
    """
    if _fused(hidden):
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

        loss = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum"
        )
        total: torch.Tensor = loss[0] if isinstance(loss, tuple) else loss
        return total.float()
    logits = torch.nn.functional.linear(hidden, weight).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def cross_entropies(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Returns the negative log-likelihood of each token, nats, [R] float32; not for training.

    Args:
        hidden: [R, H].
        weight: Of the output head, [V, H].
        targets: [R] int64.
    """
    parts = [
        torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(rows, weight).float(), wanted, reduction="none"
        )
        for rows, wanted in zip(
            torch.split(hidden, _ROWS), torch.split(targets, _ROWS), strict=True
        )
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def drop(x: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    """Dropout that can be repeated: the same seed drops the same elements.

    Args:
        x: Any shape.
        probability: Of dropping an element; the others are divided by 1 - probability.
        seed: 0 to 2**63 - 1.
    """
    generator = torch.Generator(x.device)
    generator.manual_seed(seed)
    kept = torch.empty_like(x).bernoulli_(1.0 - probability, generator=generator)
    # The factor apart: 1 / (1 - p) rounded to bfloat16 would shift the mean.
    return kept.mul_(x).mul_(1.0 / (1.0 - probability))

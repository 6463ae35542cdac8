"""One decoder layer as one differentiable function, with the choice of what is kept for backward.

    n = norm(x); q, k, v = rotate(project(n)); h = x + o(attention(q, k, v))
    (Qwen3 normalises the heads of q and k before it rotates them)
    m = norm(h); y = h + down(silu(gate(m)) * up(m))

What is kept between forward and backward:

- none (no checkpointing): everything but norms and the gated product, which are cheap to repeat
- selective: all but the two large activations of the MLP, which are computed again
- full: the input of the layer alone; the products with o and down are not needed again, or only
  for what follows them
- offload: the input of the layer, in pinned memory of the host
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora_harness.fused import ops
from qlora_harness.fused.lora_group import Inner, LoraGroup
from qlora_harness.fused.row import Row


@dataclass
class FusedLayer:
    """The parts of a decoder layer.

    Attributes:
        attention_norm: [H] weight of the norm before attention.
        mlp_norm: [H] weight of the norm before the MLP.
        eps: Of the norms.
        head_size: D.
        scale: Factor of the scores.
        qkv: Queries, keys and values.
        out: Output of attention.
        gate_up: Gate and up.
        down: Down.
        checkpointing: What is kept; one of `settings.CHECKPOINTING`.
        head_norms: [D] weights of the norms of query and key heads, or None for a model without.
    """

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    eps: float
    head_size: int
    scale: float
    qkv: LoraGroup
    out: LoraGroup
    gate_up: LoraGroup
    down: LoraGroup
    checkpointing: str = "none"
    head_norms: tuple[torch.Tensor, torch.Tensor] | None = None

    def groups(self) -> tuple[LoraGroup, ...]:
        """The groups in the order of their parameters."""
        return self.qkv, self.out, self.gate_up, self.down

    def __call__(self, x: torch.Tensor, row: Row, *, training: bool) -> torch.Tensor:
        """Runs the layer.

        Args:
            x: [T, H].
            row: Where the texts lie.
            training: Whether the adapters' dropout acts.
        """
        parameters = [p for group in self.groups() for p in group.parameters()]
        dropped = training and any(group.dropout for group in self.groups())
        # From torch's own generator, so that seeding, checkpoints and resuming cover it.
        seed = int(torch.randint(0, 2**62, ())) if dropped else None
        y: torch.Tensor = _Layer.apply(x, self, row, seed, *parameters)  # type: ignore[no-untyped-call]
        return y


@dataclass
class _Attention:
    """What backward needs of the first half."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attended: torch.Tensor
    state: Any
    inner_qkv: Inner
    inner_out: Inner
    raw: tuple[torch.Tensor, torch.Tensor] | None  # q and k before the norms of their heads


@dataclass
class _Mlp:
    """What backward needs of the second half."""

    gate: torch.Tensor
    up: torch.Tensor
    inner_gate_up: Inner
    inner_down: Inner


def _first_half(
    layer: FusedLayer, x: torch.Tensor, row: Row, seed: int | None
) -> tuple[torch.Tensor, _Attention]:
    normed, _ = ops.rms_norm(x, layer.attention_norm, layer.eps)
    (q, k, v), inner_qkv = layer.qkv.forward(normed, seed)
    q, k, v = (y.view(len(x), -1, layer.head_size) for y in (q, k, v))
    raw = None
    if layer.head_norms is not None:
        raw = q, k
        q, k = (
            ops.rms_norm(y.reshape(-1, layer.head_size), weight, layer.eps)[0].view_as(y)
            for y, weight in zip(raw, layer.head_norms, strict=True)
        )
    q, k = ops.rotate(q, k, row)
    attended, state = ops.attention(q, k, v, row, layer.scale)
    (h,), inner_out = layer.out.forward(attended.reshape(len(x), -1), _next(seed, 3), add_to=x)
    return h, _Attention(q, k, v, attended, state, inner_qkv, inner_out, raw)


def _gates(layer: FusedLayer, h: torch.Tensor, seed: int | None) -> _Mlp:
    """The second half without the product with down."""
    normed, _ = ops.rms_norm(h, layer.mlp_norm, layer.eps)
    (gate, up), inner = layer.gate_up.forward(normed, _next(seed, 4))
    return _Mlp(gate, up, inner, None)


def _second_half(layer: FusedLayer, h: torch.Tensor, seed: int | None) -> tuple[torch.Tensor, _Mlp]:
    kept = _gates(layer, h, seed)
    (y,), kept.inner_down = layer.down.forward(
        ops.swiglu(kept.gate, kept.up), _next(seed, 6), add_to=h
    )
    return y, kept


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: FusedLayer, row: Row, seed: int | None, *parameters: Any
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            _load(layer, x)
            h, attention = _first_half(layer, x, row, seed)
            y, mlp = _second_half(layer, h, seed)
        ctx.layer, ctx.row, ctx.seed = layer, row, seed
        ctx.kept = None
        if not any(ctx.needs_input_grad):
            return y
        if layer.checkpointing == "offload":
            ctx.kept = _to_host(x)
        elif layer.checkpointing == "full":
            ctx.kept = x
        elif layer.checkpointing == "selective":
            ctx.kept = x, h, attention, None
        else:
            ctx.kept = x, h, attention, mlp
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        layer, row, seed, kept = ctx.layer, ctx.row, ctx.seed, ctx.kept
        if kept is None:
            raise RuntimeError("the backward pass of a fused layer runs once")
        ctx.kept = None
        mlp: _Mlp | None
        with torch.autocast(dy.device.type, enabled=False), torch.no_grad():
            _load(layer, dy)
            if layer.checkpointing in ("none", "selective"):
                x, h, attention, mlp = kept
            else:
                x = kept if layer.checkpointing == "full" else kept.to(dy.device, non_blocking=True)
                h, attention = _first_half(layer, x, row, seed)
                mlp = None
            del kept
            if mlp is None:
                mlp = _gates(layer, h, seed)
            dh, mlp_grads = _second_half_backward(layer, dy, h, mlp, seed)
            del mlp, h
            dx, attention_grads = _first_half_backward(
                layer, dh, x, attention, row, seed, needs_input=ctx.needs_input_grad[0]
            )
        return dx, None, None, None, *attention_grads, *mlp_grads


def _second_half_backward(
    layer: FusedLayer, dy: torch.Tensor, h: torch.Tensor, mlp: _Mlp, seed: int | None
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    product = ops.swiglu(mlp.gate, mlp.up)
    inner = mlp.inner_down
    if inner is None:
        inner = layer.down.inner(product, _next(seed, 6))
    d_product, down_grads = layer.down.backward(
        [dy], product, inner, _next(seed, 6), needs_input=True
    )
    del product
    assert d_product is not None
    d_gate, d_up = ops.swiglu_backward(d_product, mlp.gate, mlp.up)
    del d_product
    normed, state = ops.rms_norm(h, layer.mlp_norm, layer.eps)
    d_normed, grads = layer.gate_up.backward(
        [d_gate, d_up], normed, mlp.inner_gate_up, _next(seed, 4), needs_input=True
    )
    assert d_normed is not None
    dh = ops.rms_norm_backward(d_normed, h, layer.mlp_norm, state)
    return dh + dy, [*grads, *down_grads]


def _first_half_backward(
    layer: FusedLayer,
    dh: torch.Tensor,
    x: torch.Tensor,
    kept: _Attention,
    row: Row,
    seed: int | None,
    *,
    needs_input: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    tokens = len(x)
    attended = kept.attended.reshape(tokens, -1)
    d_attended, out_grads = layer.out.backward(
        [dh], attended, kept.inner_out, _next(seed, 3), needs_input=True
    )
    assert d_attended is not None
    dq, dk, dv = ops.attention_backward(
        d_attended.view_as(kept.attended),
        *(kept.q, kept.k, kept.v, kept.attended, kept.state, row, layer.scale),
    )
    dq, dk = ops.rotate(dq, dk, row, back=True)
    if kept.raw is not None and layer.head_norms is not None:
        dq, dk = (
            _head_norm_backward(dy, y, weight, layer.eps)
            for dy, y, weight in zip((dq, dk), kept.raw, layer.head_norms, strict=True)
        )
    normed, state = ops.rms_norm(x, layer.attention_norm, layer.eps)
    d_normed, grads = layer.qkv.backward(
        [g.reshape(tokens, -1) for g in (dq, dk, dv)],
        *(normed, kept.inner_qkv, seed),
        needs_input=needs_input,
    )
    if d_normed is None:
        return None, [*grads, *out_grads]
    dx = ops.rms_norm_backward(d_normed, x, layer.attention_norm, state)
    return dx + dh, [*grads, *out_grads]


def _head_norm_backward(
    dy: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    heads = y.reshape(-1, y.shape[-1])
    _, state = ops.rms_norm(heads, weight, eps)
    dy = dy.reshape(-1, y.shape[-1]).contiguous()
    return ops.rms_norm_backward(dy, heads, weight, state).view_as(y)


def _load(layer: FusedLayer, x: torch.Tensor) -> None:
    for group in layer.groups():
        group.load(x)


def _next(seed: int | None, number: int) -> int | None:
    """Each projection of a layer drops by a seed of its own."""
    return None if seed is None else seed + number


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, made while the device goes on."""
    if not x.is_cuda:
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    return host

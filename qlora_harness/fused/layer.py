"""One decoder layer as one differentiable function, with the choice of what is kept for backward.

    n = norm(x); q, k, v = rotate(project(n)); h = x + o(attention(q, k, v))
    (Qwen3 normalises the heads of q and k before it rotates them)
    m = norm(h); y = h + down(silu(gate(m)) * up(m))

What is kept between forward and backward:

- none (no checkpointing): everything but norms and the gated product, which are cheap to repeat
- selective: all but the two large activations of the MLP; those of two layers in three go to
  pinned memory of the host and come back, those of the third are computed again
- full: the input of the layer alone; the products with o and down are not needed again, or only
  for what follows them
- offload: the input of the layer, in pinned memory of the host

A layer takes and gives h and what the MLP adds to it apart: the next norm adds them on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qlora_harness.fused import dropout, ops
from qlora_harness.fused.dropout import Masks
from qlora_harness.fused.host_memory import HostMemory, Stored
from qlora_harness.fused.lora_group import Gradients, Inner, LoraGroup
from qlora_harness.fused.row import Rotation, Row

# Attention of queries [T, heads, D] to keys and values [T, key heads, D], with the factor of the
# scores: [T, heads, D].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass
class FusedLayer:
    """The parts of a decoder layer.

    Attributes:
        attention_norm: [H] weight of the norm before attention.
        mlp_norm: [H] weight of the norm before the MLP.
        eps: Of the norms.
        heads: Query heads.
        key_heads: Heads of keys and values.
        head_size: D.
        scale: Factor of the scores.
        qkv: Queries, keys and values.
        out: Output of attention.
        gate_up: Gate and up.
        down: Down.
        checkpointing: What is kept; one of `settings.CHECKPOINTING`.
        head_norms: [D] weights of the norms of query and key heads, or None for a model without.
        host: Where inputs go with offload, and gates; all layers have the same.
        gates_on_host: Whether gate and up go there with selective, while there is room.
    """

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    eps: float
    heads: int
    key_heads: int
    head_size: int
    scale: float
    qkv: LoraGroup
    out: LoraGroup
    gate_up: LoraGroup
    down: LoraGroup
    checkpointing: str = "none"
    head_norms: tuple[torch.Tensor, torch.Tensor] | None = None
    host: HostMemory | None = None
    gates_on_host: bool = False

    def groups(self) -> tuple[LoraGroup, ...]:
        """The groups in the order of their parameters."""
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def dropout(self) -> float:
        """Probability, on the inputs of all adapters."""
        return max(group.dropout for group in self.groups())

    def has_adapters_of(self, layer: Any) -> bool:
        """Whether the adapters are still those of a decoder layer.

        Args:
            layer: Of the model, with PEFT's modules.
        """
        own = {id(p) for group in self.groups() for p in group.parameters() if p is not None}
        return own <= {id(p) for p in layer.parameters()}

    def __call__(
        self,
        x: torch.Tensor,
        added: torch.Tensor | None,
        row: Row,
        *,
        training: bool,
        places: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the layer on x + added.

        Args:
            x: [T, H].
            added: [T, H], or None for nothing.
            row: Where the texts lie.
            training: Whether the adapters' dropout acts.
            places: The tokens that are wanted, [R] int64, each once, or None for all: in the last
                layer only those that are read.

        Returns:
            Two tensors, [T, H] or [R, H], whose sum is the layer's output.
        """
        parameters = [p for group in self.groups() for p in group.parameters()]
        # From torch's own generator, so that seeding, checkpoints and resuming cover it.
        seed = int(torch.randint(0, 2**62, ())) if training and self.dropout else None
        keep = torch.is_grad_enabled()  # inside `forward` it never is
        found: tuple[torch.Tensor, torch.Tensor] = _Layer.apply(  # type: ignore[no-untyped-call]
            x, added, self, row, places, seed, keep, *parameters
        )
        return found

    def infer(
        self,
        x: torch.Tensor,
        added: torch.Tensor | None,
        rotation: Rotation,
        attend: Attend,
        places: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the layer without dropout and gradients, with any attention.

        Args:
            x: [T, H].
            added: [T, H], or None for nothing.
            rotation: Of the tokens.
            attend: Computes attention.
            places: The tokens that are wanted, [R] int64, or None for all.

        Returns:
            Two tensors, [R, H], whose sum is the layer's output.
        """
        x, projected, _, _ = _project(self, x, added, rotation, _Drops())
        attended = attend(*ops.split_heads(projected, self.heads, self.key_heads), self.scale)
        del projected, added
        y, _ = _leave(self, attended, places, _Drops())
        del attended
        h, y, _ = _second_half(self, _at(x, places), y, _Drops())
        return h, y


class _Drops(NamedTuple):
    """What the adapters see of the inputs; None where that is everything."""

    qkv: Masks | None = None
    out: Masks | None = None
    gate_up: Masks | None = None
    down: Masks | None = None


def _draw(
    layer: FusedLayer,
    row: Row,
    places: torch.Tensor | None,
    seed: int | None,
    like: torch.Tensor,
) -> _Drops:
    """Draws the masks of a layer; `like` gives dtype and device."""
    if seed is None:
        return _Drops()
    tokens = len(row.cos)
    rows = [tokens, *[tokens if places is None else len(places)] * 3]
    shapes = [group.mask_shape(n) for group, n in zip(layer.groups(), rows, strict=True)]
    packed = all(group.packs_masks(like) for group in layer.groups())
    return _Drops(*dropout.draw(shapes, layer.dropout, seed, like.device, packed=packed))


@dataclass
class _Attention:
    """What backward needs of the first half."""

    projected: torch.Tensor  # queries, keys and values side by side, rotated
    attended: torch.Tensor
    state: Any
    inner_qkv: Inner
    inner_out: Inner
    raw: torch.Tensor | None  # queries and keys before the norms of their heads


@dataclass
class _Mlp:
    """What backward needs of the second half."""

    gates: torch.Tensor  # gate and up side by side
    inner_gate_up: Inner
    inner_down: Inner


@dataclass
class _MlpAway:
    """The same with its gates in the host's memory."""

    gates: Stored
    inner_gate_up: Inner
    inner_down: Inner


def _first_half(
    layer: FusedLayer,
    x: torch.Tensor,
    added: torch.Tensor | None,
    row: Row,
    places: torch.Tensor | None,
    drops: _Drops,
) -> tuple[torch.Tensor, torch.Tensor, _Attention]:
    """Returns x + added, what attention adds to its places, and what backward needs."""
    x, projected, inner_qkv, raw = _project(layer, x, added, row, drops)
    attended, state = ops.attention(projected, layer.heads, layer.key_heads, row, layer.scale)
    y, inner_out = _leave(layer, attended, places, drops)
    return x, y, _Attention(projected, attended, state, inner_qkv, inner_out, raw)


def _project(
    layer: FusedLayer,
    x: torch.Tensor,
    added: torch.Tensor | None,
    rotation: Rotation,
    drops: _Drops,
) -> tuple[torch.Tensor, torch.Tensor, Inner, torch.Tensor | None]:
    """Returns x + added; queries, keys and values, rotated; what backward needs of them."""
    wide = layer.qkv.input(len(x), x)
    x = ops.rms_norm(x, layer.attention_norm, layer.eps, wide[:, : x.shape[1]], add=added)
    projected, inner = layer.qkv.forward(wide, drops.qkv)
    del wide
    raw = _normalise_heads(layer, projected)
    ops.rotate(projected, layer.heads + layer.key_heads, rotation)
    return x, projected, inner, raw


def _leave(
    layer: FusedLayer, attended: torch.Tensor, places: torch.Tensor | None, drops: _Drops
) -> tuple[torch.Tensor, Inner]:
    """The product with o of what attention found, [T, heads, D], at some places."""
    wanted = _at(attended.flatten(1), places)
    return layer.out.forward(layer.out.as_input(wanted), drops.out)


def _gates(
    layer: FusedLayer, x: torch.Tensor, added: torch.Tensor | None, drops: _Drops
) -> tuple[torch.Tensor, _Mlp]:
    """The second half of x + added without the product with down; returns the sum as well."""
    wide = layer.gate_up.input(len(x), x)
    h = ops.rms_norm(x, layer.mlp_norm, layer.eps, wide[:, : x.shape[1]], add=added)
    gates, inner = layer.gate_up.forward(wide, drops.gate_up)
    return h, _Mlp(gates, inner, None)


def _second_half(
    layer: FusedLayer, x: torch.Tensor, added: torch.Tensor, drops: _Drops
) -> tuple[torch.Tensor, torch.Tensor, _Mlp]:
    """Returns x + added, what the MLP adds, and what backward needs."""
    h, kept = _gates(layer, x, added, drops)
    wide = layer.down.input(len(x), x)
    ops.swiglu(kept.gates, wide[:, : kept.gates.shape[1] // 2])
    y, kept.inner_down = layer.down.forward(wide, drops.down)
    return h, y, kept


def _at(rows: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """The rows at some places; all of them without."""
    return rows if places is None else rows[places]


def _spread(rows: torch.Tensor, places: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The opposite of `_at`: rows at their places among zeros."""
    if places is None:
        return rows
    return rows.new_zeros(tokens, rows.shape[1]).index_copy_(0, places, rows)


def _put_away(layer: FusedLayer, mlp: _Mlp) -> _MlpAway | None:
    """Begins to copy gates to the host, if they belong there and there is room."""
    if layer.host is None or not layer.gates_on_host or not layer.host.serves(mlp.gates):
        return None
    stored = layer.host.put_if_room(mlp.gates)
    return None if stored is None else _MlpAway(stored, mlp.inner_gate_up, mlp.inner_down)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        added: torch.Tensor | None,
        layer: FusedLayer,
        row: Row,
        places: torch.Tensor | None,
        seed: int | None,
        keep: bool,
        *parameters: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            drops = _draw(layer, row, places, seed, x)
            x, added, attention = _first_half(layer, x, added, row, places, drops)
            h, y, mlp = _second_half(layer, _at(x, places), added, drops)
        ctx.layer, ctx.row, ctx.places, ctx.seed = layer, row, places, seed
        ctx.kept = None
        if not keep:
            return h, y
        if layer.checkpointing == "offload" and layer.host is not None and layer.host.serves(x):
            ctx.kept = layer.host.put(x)
        elif layer.checkpointing in ("full", "offload"):
            ctx.kept = x
        else:
            # Not h itself: what holds its own output is freed by the garbage collector alone.
            mlp_kept = _put_away(layer, mlp) if layer.checkpointing == "selective" else mlp
            ctx.kept = x, h.detach(), attention, mlp_kept
        return h, y

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor, dy: torch.Tensor) -> Any:
        """Both gradients are the same: only the sum of the outputs is used."""
        del dh
        layer, row, places, seed = ctx.layer, ctx.row, ctx.places, ctx.seed
        kept = ctx.kept
        if kept is None:
            raise RuntimeError("the backward pass of a fused layer runs once")
        ctx.kept = None
        mlp: _Mlp | _MlpAway | None
        with torch.autocast(dy.device.type, enabled=False), torch.no_grad():
            drops = _draw(layer, row, places, seed, dy)
            if layer.checkpointing in ("none", "selective"):
                x, h, attention, mlp = kept
            else:
                x = layer.host.get(kept) if isinstance(kept, Stored) else kept
                _, added, attention = _first_half(layer, x, None, row, places, drops)
                h, mlp = _gates(layer, _at(x, places), added, drops)
                del added
            del kept
            if mlp is None:
                _, mlp = _gates(layer, h, None, drops)
            elif isinstance(mlp, _MlpAway):
                assert layer.host is not None
                mlp = _Mlp(layer.host.get(mlp.gates), mlp.inner_gate_up, mlp.inner_down)
            dh, mlp_grads = _second_half_backward(layer, dy, h, mlp, drops)
            del mlp, h
            # The input of the first layer learns nothing.
            wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
            dx, attention_grads = _first_half_backward(
                layer, dh, x, attention, row, places, drops, wanted
            )
        return dx, dx, None, None, None, None, None, *attention_grads, *mlp_grads


def _second_half_backward(
    layer: FusedLayer, dy: torch.Tensor, h: torch.Tensor, mlp: _Mlp, drops: _Drops
) -> tuple[torch.Tensor, Gradients]:
    """Returns the gradient of h, in memory with room for what follows, and those of adapters."""
    tokens, hidden = dy.shape
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    wide = layer.down.with_room(dy)
    product, d_inner = layer.down.backward(wide, drops.down)
    del wide
    ops.swiglu_backward(mlp.gates, product)
    down_grads = layer.down.gradients(dy, d_inner, product, mlp.inner_down, drops.down)
    del product
    normed, d_inner = layer.gate_up.backward(mlp.gates, drops.gate_up)
    dh = layer.out.output_gradient(tokens, dy)
    ops.rms_norm_backward(normed, h, layer.mlp_norm, layer.eps, dh[:, :hidden], add=dy)
    grads = layer.gate_up.gradients(mlp.gates, d_inner, normed, mlp.inner_gate_up, drops.gate_up)
    return dh, [*grads, *down_grads]


def _first_half_backward(
    layer: FusedLayer,
    dh: torch.Tensor,
    x: torch.Tensor,
    kept: _Attention,
    row: Row,
    places: torch.Tensor | None,
    drops: _Drops,
    wanted: bool,
) -> tuple[torch.Tensor | None, Gradients]:
    """Returns the gradient of x if it is wanted, and those of adapters."""
    tokens = len(x)
    d_attended, d_inner = layer.out.backward(dh, drops.out)
    attended = _at(kept.attended.flatten(1), places)
    out_grads = layer.out.gradients(dh, d_inner, attended, kept.inner_out, drops.out)
    del attended
    d_projected = ops.attention_backward(
        _spread(d_attended, places, tokens).view_as(kept.attended),
        *(kept.projected, kept.attended, kept.state, row, layer.scale),
    )
    del d_attended
    _normalise_heads_backward(layer, d_projected, kept.raw)
    dx: torch.Tensor | None = None
    if wanted:
        normed, d_inner = layer.qkv.backward(d_projected, drops.qkv)
        # With the room that the layer below needs.
        dx = layer.down.output_gradient(tokens, x)[:, : x.shape[1]]
        residual = _spread(dh[:, : x.shape[1]], places, tokens)
        ops.rms_norm_backward(normed, x, layer.attention_norm, layer.eps, dx, add=residual)
    else:
        d_inner = layer.qkv.backward_inner(d_projected)
        normed = torch.empty_like(x)
        ops.rms_norm(x, layer.attention_norm, layer.eps, normed)
    grads = layer.qkv.gradients(d_projected, d_inner, normed, kept.inner_qkv, drops.qkv)
    return dx, [*grads, *out_grads]


def _normalise_heads(layer: FusedLayer, projected: torch.Tensor) -> torch.Tensor | None:
    """Normalises the heads of queries and keys in place, and returns what they were."""
    if layer.head_norms is None:
        return None
    raw = projected[:, : (layer.heads + layer.key_heads) * layer.head_size].clone()
    for weight, place in zip(layer.head_norms, _head_columns(layer), strict=True):
        heads = raw[:, place].reshape(-1, layer.head_size).contiguous()
        normed = torch.empty_like(heads)
        ops.rms_norm(heads, weight, layer.eps, normed)
        projected[:, place] = normed.view(len(raw), -1)
    return raw


def _normalise_heads_backward(
    layer: FusedLayer, d_projected: torch.Tensor, raw: torch.Tensor | None
) -> None:
    """In place."""
    if layer.head_norms is None or raw is None:
        return
    for weight, place in zip(layer.head_norms, _head_columns(layer), strict=True):
        heads = raw[:, place].reshape(-1, layer.head_size).contiguous()
        gradient = d_projected[:, place].reshape(-1, layer.head_size)
        found = torch.empty_like(heads)
        ops.rms_norm_backward(gradient, heads, weight, layer.eps, found)
        d_projected[:, place] = found.view(len(raw), -1)


def _head_columns(layer: FusedLayer) -> tuple[slice, slice]:
    """Where queries and keys stand."""
    queries = layer.heads * layer.head_size
    return slice(0, queries), slice(queries, queries + layer.key_heads * layer.head_size)

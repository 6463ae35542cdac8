"""One decoder layer as one differentiable function, with a choice of what it saves for backward.

    n = norm(x); q, k, v = rotate(project(n)); h = x + o(attention(q, k, v))
    (Qwen3 normalises the heads of q and k before rotation)
    m = norm(h); y = h + down(silu(gate(m)) * up(m))

What it saves, by checkpointing:

- none: everything except norms and the gated product, which are cheap to recompute
- selective: also without the MLP's two large activations; two layers in three move theirs to pinned
  host memory, the third recomputes them
- full: only the layer's input
- offload: only the layer's input, in pinned host memory

A layer returns h and the MLP's output separately, and the next layer's norm adds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_harness.fused import attention, dropout, ops
from qlora_harness.fused.dropout import Masks
from qlora_harness.fused.group import Gradients, Group, Inner
from qlora_harness.fused.host_memory import HostMemory, Stored
from qlora_harness.fused.packed_row import PackedRow, Rotation
from qlora_harness.model.shape import Shape
from qlora_harness.model.sharded import ShardedLayers

# At once in an MLP without gradients on a CPU; for larger results the system clears fresh memory.
_CPU_ROWS = 1024

# Attention of queries [T, heads, D] to keys and values [T, key heads, D], with the factor of the
# scores: [T, heads, D].
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class _Drops(NamedTuple):
    """The dropout masks of the groups; None without dropout."""

    qkv: Masks | None = None
    out: Masks | None = None
    gate_up: Masks | None = None
    down: Masks | None = None


@dataclass
class _Attention:
    """What backward needs from the first half."""

    projected: Tensor  # queries, keys and values side by side, rotated
    attended: Tensor
    state: Any
    inner_qkv: Inner
    inner_out: Inner
    raw: Tensor | None  # queries and keys before the norms of their heads


@dataclass
class _Mlp:
    """What backward needs from the second half."""

    gates: Tensor | Stored  # gate and up side by side
    inner_gate_up: Inner
    inner_down: Inner


@dataclass
class FusedLayer:
    """The parts of a decoder layer.

    A layer reads x + added, [T, H] each, and returns two tensors whose sum is its output.
    `read_at`, [R] int64 without duplicates, lists the tokens whose output is needed; None means
    all. The last layer computes only keys and values for the others.
    """

    attention_norm: Tensor  # [H]
    mlp_norm: Tensor  # [H]
    eps: float  # of the norms
    heads: int
    key_heads: int
    head_size: int
    scale: float  # of the scores
    qkv: Group
    out: Group
    gate_up: Group
    down: Group
    checkpointing: str = "none"  # one of `settings.CHECKPOINTING`
    head_norms: tuple[Tensor, Tensor] | None = None  # [D] each, of queries and keys
    host: HostMemory | None = None  # shared by all layers
    gates_on_host: bool = False  # with selective: whether gate and up go to the host, given room
    number: int = 0  # in the model
    sharded: ShardedLayers | None = None  # if the weights are spread over processes

    def groups(self) -> tuple[Group, ...]:
        """Returns the groups in the order of their parameters."""
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def dropout(self) -> float:
        """Probability, on the inputs of all adapters."""
        return max(group.dropout for group in self.groups())

    def has_adapters_of(self, layer: Any) -> bool:
        """Whether the model's decoder layer still has the same adapters."""
        own = {id(p) for p in self.parameters() if p is not None}
        return own <= {id(p) for p in layer.parameters()}

    def __call__(
        self,
        x: Tensor,
        added: Tensor | None,
        row: PackedRow,
        *,
        seed: Tensor | None,
        read_at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the layer on a row; a seed, see `dropout.draw`, turns dropout on."""
        keep = torch.is_grad_enabled()  # always False inside `_Layer.forward`
        output: tuple[Tensor, Tensor] = _Layer.apply(  # type: ignore[no-untyped-call]
            x, added, self, row, read_at, seed, keep, *self.parameters()
        )
        return output

    def parameters(self) -> list[torch.nn.Parameter | None]:
        """Returns the parameters of all groups, in the order of their gradients."""
        return [p for group in self.groups() for p in group.parameters()]

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        row: PackedRow,
        read_at: Tensor | None,
        seed: Tensor | None,
        saved: list[Any] | None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the layer outside autograd; appends what `backward` needs to `saved`, if given."""
        self._fetch(then=self.number + 1)
        with torch.autocast(x.device.type, enabled=False):
            drops = self.draw(row, read_at, seed, x)
            x, added, first = self.first_half(x, added, row, read_at, drops)
            h, y, second = self.second_half(_at(x, read_at), added, drops)
            if saved is not None:
                saved.append(self.keep(x, h, first, second))
        return h, y

    def backward(
        self,
        dy: Tensor,
        saved: list[Any],
        row: PackedRow,
        read_at: Tensor | None,
        seed: Tensor | None,
        *,
        needs_dx: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """Returns the gradients of the input, if it is needed, and of `parameters`.

        dy is the gradient of either output. Takes the last item of `saved`, to free each part of it
        when it is done with it.
        """
        self._fetch(then=self.number - 1)
        with torch.autocast(dy.device.type, enabled=False), torch.no_grad():
            drops = self.draw(row, read_at, seed, dy)
            x, h, first, mlp = self.restore(saved.pop(), row, read_at, drops)
            dh, mlp_grads = self.second_half_backward(dy, h, mlp, drops)
            del mlp, h
            dx, attention_grads = self.first_half_backward(
                dh, x, first, row, read_at, drops, needs_dx=needs_dx
            )
        return dx, [*attention_grads, *mlp_grads]

    def infer(
        self,
        x: Tensor,
        added: Tensor | None,
        rotation: Rotation,
        attend: Attend,
        read_at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the layer without dropout and gradients, with a given attention."""
        self._fetch(then=self.number + 1)
        x, projected, _, _ = self._project(x, added, rotation, _Drops())
        q, k, v = attention.split_heads(projected, self.heads, self.key_heads)
        attended = attend(q, k, v, self.scale)
        del q, k, v, projected, added
        y, _ = self._leave(attended, read_at, _Drops())
        del attended
        return self._infer_mlp(_at(x, read_at), y)

    def _fetch(self, *, then: int) -> None:
        if self.sharded is not None:
            self.sharded.fetch(self.number, then)

    def _infer_mlp(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """Runs `second_half` without dropout, on a CPU a few rows at a time."""
        size = _CPU_ROWS if x.device.type == "cpu" else len(x)
        parts = zip(x.split(size), added.split(size), strict=True)
        h, y = zip(*(self.second_half(*part, _Drops())[:2] for part in parts), strict=True)
        return (h[0], y[0]) if len(h) == 1 else (torch.cat(h), torch.cat(y))

    def draw(
        self, row: PackedRow, read_at: Tensor | None, seed: Tensor | None, like: Tensor
    ) -> _Drops:
        """Draws the masks of a layer; `like` gives dtype and device."""
        if seed is None or not self.dropout:
            return _Drops()
        tokens = len(row.cos)
        rows = [tokens, *[tokens if read_at is None else len(read_at)] * 3]
        shapes = [group.mask_shape(n) for group, n in zip(self.groups(), rows, strict=True)]
        packed = self.packs_masks(like)
        return _Drops(*dropout.draw(shapes, self.dropout, seed, like.device, packed=packed))

    def packs_masks(self, like: Tensor) -> bool:
        """Whether masks for inputs such as `like` are packed."""
        return all(group.can_pack_masks(like) for group in self.groups())

    def first_half(
        self, x: Tensor, added: Tensor | None, row: PackedRow, read_at: Tensor | None, drops: _Drops
    ) -> tuple[Tensor, Tensor, _Attention]:
        """Returns x + added, what attention adds at `read_at`, and what backward needs."""
        x, projected, inner_qkv, raw = self._project(x, added, row, drops)
        attended, state = attention.forward(projected, self.heads, self.key_heads, row, self.scale)
        y, inner_out = self._leave(attended, read_at, drops)
        return x, y, _Attention(projected, attended, state, inner_qkv, inner_out, raw)

    def _project(
        self, x: Tensor, added: Tensor | None, rotation: Rotation, drops: _Drops
    ) -> tuple[Tensor, Tensor, Inner, Tensor | None]:
        """Returns x + added, the rotated projections, and what backward needs from them."""
        wide = self.qkv.input(len(x), x)
        rounded = self.qkv.rounded_input(len(x), x)
        normed = wide[:, : x.shape[1]]
        x = ops.rms_norm(x, self.attention_norm, self.eps, normed, added, rounded)
        projected, inner = self.qkv.forward(wide, drops.qkv, rounded)
        del wide, normed, rounded
        raw = self._normalise_heads(projected)
        ops.rotate(projected, self.heads + self.key_heads, rotation)
        return x, projected, inner, raw

    def _leave(
        self, attended: Tensor, read_at: Tensor | None, drops: _Drops
    ) -> tuple[Tensor, Inner]:
        """Applies the output projection to the attended values, [T, heads, D], at `read_at`."""
        x = _at(attended.flatten(1), read_at)
        return self.out.forward(self.out.as_input(x), drops.out)

    def _gates(self, x: Tensor, added: Tensor | None, drops: _Drops) -> tuple[Tensor, _Mlp]:
        """Returns x + added, and gate and up of it."""
        wide = self.gate_up.input(len(x), x)
        rounded = self.gate_up.rounded_input(len(x), x)
        h = ops.rms_norm(x, self.mlp_norm, self.eps, wide[:, : x.shape[1]], added, rounded)
        gates, inner = self.gate_up.forward(wide, drops.gate_up, rounded)
        return h, _Mlp(gates, inner, None)

    def second_half(self, x: Tensor, added: Tensor, drops: _Drops) -> tuple[Tensor, Tensor, _Mlp]:
        """Returns x + added, what the MLP adds, and what backward needs."""
        h, mlp = self._gates(x, added, drops)
        assert isinstance(mlp.gates, Tensor)
        wide = self.down.input(len(x), x)
        rounded = self.down.rounded_input(len(x), x)
        ops.swiglu(mlp.gates, wide[:, : mlp.gates.shape[1] // 2], rounded)
        y, mlp.inner_down = self.down.forward(wide, drops.down, rounded)
        return h, y, mlp

    def keep(self, x: Tensor, h: Tensor, first: _Attention, second: _Mlp) -> Any:
        """Returns what to save for backward; see the top of this file."""
        if self.checkpointing == "offload" and self.host is not None and self.host.serves(x):
            return self.host.put(x)
        if self.checkpointing in ("full", "offload"):
            return x
        mlp = self._put_away(second) if self.checkpointing == "selective" else second
        # Detached: saving the function's own output would make a reference cycle.
        return x, h.detach(), first, mlp

    def _put_away(self, mlp: _Mlp) -> _Mlp | None:
        """Starts copying gates to the host, if they belong there and there is room."""
        gates = mlp.gates
        assert isinstance(gates, Tensor)
        if self.host is None or not self.gates_on_host or not self.host.serves(gates):
            return None
        stored = self.host.put_if_room(gates)
        return None if stored is None else _Mlp(stored, mlp.inner_gate_up, mlp.inner_down)

    def restore(
        self, saved: Any, row: PackedRow, read_at: Tensor | None, drops: _Drops
    ) -> tuple[Tensor, Tensor, _Attention, _Mlp]:
        """Returns the arguments of `keep`, recomputing what it left out."""
        if self.checkpointing in ("none", "selective"):
            x, h, first, mlp = saved
        else:
            x = self._from_host(saved) if isinstance(saved, Stored) else saved
            _, added, first = self.first_half(x, None, row, read_at, drops)
            h, mlp = self._gates(_at(x, read_at), added, drops)
        if mlp is None:
            _, mlp = self._gates(h, None, drops)
        elif isinstance(mlp.gates, Stored):
            mlp = _Mlp(self._from_host(mlp.gates), mlp.inner_gate_up, mlp.inner_down)
        return x, h, first, mlp

    def _from_host(self, stored: Stored) -> Tensor:
        assert self.host is not None
        return self.host.get(stored)

    def second_half_backward(
        self, dy: Tensor, h: Tensor, mlp: _Mlp, drops: _Drops
    ) -> tuple[Tensor, Gradients]:
        """Returns the gradient of h, with room for the next group's dh, and those of adapters."""
        tokens, hidden = dy.shape
        gates = mlp.gates
        assert isinstance(gates, Tensor)
        if dy.stride(1) != 1:
            dy = dy.contiguous()
        wide = self.down.with_room(dy)
        product, d_inner = self.down.backward(wide, drops.down)
        del wide
        rounded = self.gate_up.rounded_gradient(tokens, dy)
        ops.swiglu_backward(gates, product, rounded)
        down_grads = self.down.gradients(dy, d_inner, product, mlp.inner_down, drops.down)
        del product
        normed, d_inner = self.gate_up.backward(gates, drops.gate_up, rounded)
        del rounded
        dh = self.out.output_gradient(tokens, dy)
        ops.rms_norm_backward(normed, h, self.mlp_norm, self.eps, dh[:, :hidden], add=dy)
        grads = self.gate_up.gradients(gates, d_inner, normed, mlp.inner_gate_up, drops.gate_up)
        return dh, [*grads, *down_grads]

    def first_half_backward(
        self,
        dh: Tensor,
        x: Tensor,
        saved: _Attention,
        row: PackedRow,
        read_at: Tensor | None,
        drops: _Drops,
        *,
        needs_dx: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """Returns the gradient of x, if it is needed, and those of adapters."""
        tokens, hidden = x.shape
        d_attended, d_inner = self.out.backward(dh, drops.out)
        attended = _at(saved.attended.flatten(1), read_at)
        out_grads = self.out.gradients(dh, d_inner, attended, saved.inner_out, drops.out)
        del attended
        d_projected = attention.backward(
            _spread(d_attended, read_at, tokens).view_as(saved.attended),
            *(saved.projected, saved.attended, saved.state, row, self.scale),
        )
        del d_attended
        self._normalise_heads_backward(d_projected, saved.raw)
        dx: Tensor | None = None
        if needs_dx:
            normed, d_inner = self.qkv.backward(d_projected, drops.qkv)
            # With room for dh in the layer below.
            dx = self.down.output_gradient(tokens, x)[:, :hidden]
            residual = _spread(dh[:, :hidden], read_at, tokens)
            ops.rms_norm_backward(normed, x, self.attention_norm, self.eps, dx, add=residual)
        else:
            d_inner = self.qkv.backward_inner(d_projected)
            normed = torch.empty_like(x)
            ops.rms_norm(x, self.attention_norm, self.eps, normed)
        grads = self.qkv.gradients(d_projected, d_inner, normed, saved.inner_qkv, drops.qkv)
        return dx, [*grads, *out_grads]

    def _normalise_heads(self, projected: Tensor) -> Tensor | None:
        """Normalises the heads of queries and keys in place; returns a copy from before."""
        if self.head_norms is None:
            return None
        raw = projected[:, : (self.heads + self.key_heads) * self.head_size].clone()
        for weight, columns in zip(self.head_norms, self._head_columns(), strict=True):
            heads = raw[:, columns].reshape(-1, self.head_size).contiguous()
            normed = torch.empty_like(heads)
            ops.rms_norm(heads, weight, self.eps, normed)
            projected[:, columns] = normed.view(len(raw), -1)
        return raw

    def _normalise_heads_backward(self, d_projected: Tensor, raw: Tensor | None) -> None:
        if self.head_norms is None or raw is None:
            return
        for weight, columns in zip(self.head_norms, self._head_columns(), strict=True):
            heads = raw[:, columns].reshape(-1, self.head_size).contiguous()
            gradient = d_projected[:, columns].reshape(-1, self.head_size)
            d_heads = torch.empty_like(heads)
            ops.rms_norm_backward(gradient, heads, weight, self.eps, d_heads)
            d_projected[:, columns] = d_heads.view(len(raw), -1)

    def _head_columns(self) -> tuple[slice, slice]:
        queries = self.heads * self.head_size
        return slice(0, queries), slice(queries, queries + self.key_heads * self.head_size)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        layer: FusedLayer,
        row: PackedRow,
        read_at: Tensor | None,
        seed: Tensor | None,
        keep: bool,
        *parameters: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.layer, ctx.row, ctx.read_at, ctx.seed = layer, row, read_at, seed
        ctx.saved = [] if keep else None
        return layer.forward(x, added, row, read_at, seed, ctx.saved)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dy: Tensor) -> Any:
        """Both gradients are equal, since only the sum of the outputs is used."""
        del dh
        if not ctx.saved:
            raise RuntimeError("the backward pass of a fused layer runs once")
        # False in the first layer: embeddings are frozen.
        needs_dx = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx, gradients = ctx.layer.backward(
            dy, ctx.saved, ctx.row, ctx.read_at, ctx.seed, needs_dx=needs_dx
        )
        return dx, dx, None, None, None, None, None, *gradients


def _at(rows: Tensor, read_at: Tensor | None) -> Tensor:
    return rows if read_at is None else rows[read_at]


def _spread(rows: Tensor, read_at: Tensor | None, tokens: int) -> Tensor:
    """Inverts `_at`, with zeros in the other rows."""
    if read_at is None:
        return rows
    return rows.new_zeros(tokens, rows.shape[1]).index_copy_(0, read_at, rows)


def fused_activation_bytes(
    shape: Shape, rank: int, *, has_dropout: bool, checkpointing: str, tokens: int, size: int
) -> tuple[int, int]:
    """Returns the bytes that all layers save for backward, and those of the layer at work.

    An element takes `size` bytes.
    """
    hidden, inner, adapters = shape.hidden, shape.inner, rank * shape.adapted
    first = 2 * hidden + 2 * shape.queries + 2 * shape.keys + adapters * 4 / 7
    first += (shape.queries + shape.keys) * shape.head_norms
    second = 2 * inner + adapters * 3 / 7
    saved = {"none": first + second, "selective": first, "full": hidden, "offload": 0}
    # The MLP's gated product, then its gradient; norms and residual stream.
    work = float(inner + 4 * hidden)
    if has_dropout:  # one bit per element that an adapter reads
        work += (5 * hidden + shape.queries + inner) * shape.adapted / 7 / 8 / size
    work += {
        "none": 0,
        "selective": second + 2 * inner,  # with another layer's gates on their way back
        "full": first + second,
        "offload": first + second + hidden,  # with the next input on its way back
    }[checkpointing]
    return int(saved[checkpointing] * size * tokens * shape.layers), int(work * size * tokens)

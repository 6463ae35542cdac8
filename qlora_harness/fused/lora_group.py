"""Linear layers with LoRA that share one input, forward and backward, outside autograd.

y_i = x W_i^T + b_i + h_i B_i^T,  h_i = s drop_i(x) A_i^T

One matrix M (`bordered`) holds the weights and adapters of a group, so that its forward is one
product, [x, h] [W, B]^T. The gradients (W and b are frozen):

dB_i = dy_i^T h_i,  dh_i = dy_i B_i,  dA_i = s dh_i^T drop_i(x),
dx = sum_i dy_i W_i + drop_i(s dh_i A_i)

A group of several layers computes [dx, dh] = dy [W, B] in one product and adds dh A; a single layer
computes the narrow dh = dy B first, then dx = [dy, dh] [W; s A].

Adapters have their own dtype; M has the input's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_harness.fused import dropout
from qlora_harness.fused.bordered import Bordered, Projection, Scratch, aligned
from qlora_harness.fused.dropout import Masks
from qlora_harness.fused.ops import copy
from qlora_harness.fused.products import linear

Gradients = list[Tensor | None]
Inner = Tensor | None


class LoraGroup:
    """Projections of one input. All adapters share scale, rank, dropout and dtype."""

    def __init__(self, projections: Sequence[Projection], scratch: Scratch) -> None:
        self.projections = list(projections)
        self.dropout = max(p.dropout for p in projections)
        self._weights = Bordered(projections, scratch)
        # (index, slot) of each projection with an adapter.
        self._adapted = [(i, n) for i, n in enumerate(self._weights.slots) if n is not None]
        self._dtype = next((p.down.dtype for p in projections if p.down is not None), torch.float32)
        self._bias: Tensor | None = None
        if any(p.layer.bias is not None for p in projections):
            heights = zip(projections, self._weights.heights, strict=True)
            self._bias = torch.cat(
                [
                    p.layer.weight.new_zeros(n) if p.layer.bias is None else p.layer.bias.detach()
                    for p, n in heights
                ]
            )

    def parameters(self) -> list[torch.nn.Parameter | None]:
        """Returns A and B of each projection."""
        return [p for projection in self.projections for p in (projection.down, projection.up)]

    def release(self) -> None:
        """Gives full-precision weights separate memory again; the group is unusable afterwards."""
        self._weights.move_out()

    def input(self, tokens: int, like: Tensor) -> Tensor:
        """Allocates an input with room for h beside it, [T, K + R]."""
        return _room(tokens, self._weights.width + self._weights.border, like)

    def as_input(self, x: Tensor) -> Tensor:
        """Returns x, [T, K], with room for h; x itself if the group has no adapter."""
        if not self._weights.border:
            return x
        wide = self.input(len(x), x)
        copy(x.contiguous(), wide[:, : self._weights.width])
        return wide

    def output_gradient(self, tokens: int, like: Tensor) -> Tensor:
        """Allocates dy with room for dh beside it, [T, N + R], for a group of one."""
        return _room(tokens, self._weights.height + self._weights.border, like)

    def with_room(self, dy: Tensor) -> Tensor:
        """Returns dy, [T, N], with room for dh; a view if its memory has it already."""
        columns = self._weights.height + self._weights.border
        stride = aligned(columns)
        bytes_needed = len(dy) * stride * dy.element_size()
        if (
            dy.stride() == (stride, 1)
            and dy.storage_offset() == 0
            and dy.untyped_storage().nbytes() >= bytes_needed
        ):
            return dy.as_strided((len(dy), columns), (stride, 1))
        wide = self.output_gradient(len(dy), dy)
        wide[:, : dy.shape[1]] = dy
        return wide

    def can_pack_masks(self, like: Tensor) -> bool:
        """Whether the masks of its adapters can be packed, on inputs such as `like`."""
        return not self._adapted or dropout.can_pack(self._weights.rank, like)

    def mask_shape(self, tokens: int) -> tuple[int, int, int]:
        """Returns the shape of the group's masks, (adapters, T, K)."""
        return len(self._adapted), tokens, self._weights.width

    def forward(self, wide: Tensor, masks: Masks | None) -> tuple[Tensor, Inner]:
        """Returns the outputs side by side, [T, N], and h, [T, R].

        `wide` comes from `input`, with its first K columns filled.
        """
        m = self._weights
        views = m.load(wide)
        inner = self._inner(wide[:, : m.width], views.down, masks, wide[:, m.width :])
        bias = None if self._bias is None else self._bias.to(wide.dtype)
        return linear(wide, views.weights, bias), inner

    def backward(self, dy: Tensor, masks: Masks | None) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients of x, [T, K], and h, [T, R], from that of the outputs, [T, N].

        For a group of one with an adapter, dy comes from `output_gradient` or `with_room`.
        """
        m = self._weights
        views = m.load(dy, again=True)
        if not m.border:
            return dy @ views.frozen, None
        if len(self.projections) == 1:
            own, room = dy[:, : m.height], dy[:, m.height :]
            inner = own @ views.up
            if masks is None:
                copy(inner, room)
                return dy @ views.left, inner
            dx = own @ views.frozen
        else:
            both = _room(len(dy), m.width + m.border, dy)
            torch.mm(dy, views.weights, out=both)
            dx, inner = both[:, : m.width], both[:, m.width :]
            if masks is None:
                return dx.addmm_(inner, views.down), inner
        dropout.add_products(dx, inner, views.down, masks)
        return dx, inner

    def backward_inner(self, dy: Tensor) -> Tensor | None:
        """Returns the gradient of h alone, [T, R]."""
        if not self._weights.border:
            return None
        return dy @ self._weights.load(dy, again=True).up

    def gradients(
        self, dy: Tensor, d_inner: Tensor | None, x: Tensor, inner: Inner, masks: Masks | None
    ) -> Gradients:
        """Returns the gradients of A and B of each projection; call it after `backward`.

        dy is [T, N] or wider; `inner` is recomputed if None.
        """
        m = self._weights
        gradients: Gradients = [None] * (2 * len(self.projections))
        if d_inner is None:
            return gradients
        if inner is None:
            inner = self._inner(x, m.loaded(x).down, masks, None)
            assert inner is not None
        parts = torch.split(dy[:, : m.height], m.heights, dim=1)
        rank = m.rank
        for i, slot in self._adapted:
            own = inner[:, slot * rank : (slot + 1) * rank]
            gradients[2 * i + 1] = _product(parts[i].t(), own, self._dtype)
        if masks is None:
            downs = _product((d_inner * m.scale).t(), x, self._dtype)
        else:
            downs = dropout.gradients(d_inner, x, masks, m.scale, self._dtype)
        for i, slot in self._adapted:
            gradients[2 * i] = downs[slot * rank : (slot + 1) * rank]
        return gradients

    def _inner(self, x: Tensor, down: Tensor, masks: Masks | None, beside: Tensor | None) -> Inner:
        """Returns h, and writes it to `beside`; None without adapters."""
        if not self._weights.border:
            return None
        if masks is not None:
            return dropout.products(x, down, masks, beside)
        inner = x @ down.t()
        if beside is not None:
            copy(inner, beside)
        return inner


def _room(tokens: int, columns: int, like: Tensor) -> Tensor:
    # On CPUs with AMX, oneDNN multiplies the padding by zero in bfloat16, so NaN there would spread
    # (https://github.com/uxlfoundation/oneDNN/issues/5717).
    stride = aligned(columns)
    padded = like.device.type == "cpu" and stride > columns
    new = like.new_zeros if padded else like.new_empty
    return new(tokens, stride)[:, :columns]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies matrices into another dtype; on CUDA without rounding to theirs first."""
    if a.is_cuda and dtype == torch.float32 and a.dtype == torch.bfloat16:
        wide: Tensor = torch.mm(a, b, out_dtype=dtype)
        return wide
    return (a @ b).to(dtype)

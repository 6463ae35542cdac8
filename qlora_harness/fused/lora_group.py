"""A group of layers (see `group`) whose products are in the dtype of their input.

One matrix M (`bordered`) holds the weights and adapters of a group, so that its forward is one
product, [x, h] [W, B]^T. Backward, a group of several layers computes [dx, dh] = dy [W, B] in one
product and adds dh A; a single layer computes the narrow dh = dy B first, then
dx = [dy, dh] [W; s A].

Adapters have their own dtype; M has the input's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_harness.fused import dropout
from qlora_harness.fused.bordered import Bordered, Projection, Scratch, aligned
from qlora_harness.fused.dropout import Masks
from qlora_harness.fused.fp8 import Quantised
from qlora_harness.fused.group import Group, Inner
from qlora_harness.fused.ops import copy
from qlora_harness.fused.products import linear


class LoraGroup(Group):
    """A group whose products are in the dtype of its input."""

    def __init__(self, projections: Sequence[Projection], scratch: Scratch) -> None:
        self._weights = Bordered(projections, scratch)
        super().__init__(projections, self._weights)

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

    def forward(
        self, wide: Tensor, masks: Masks | None, rounded: Quantised | None = None
    ) -> tuple[Tensor, Inner]:
        """See `Group`."""
        m = self._weights
        views = m.load(wide)
        inner = self._inner(wide[:, : m.width], views.down, masks, wide[:, m.width :])
        bias = None if self._bias is None else self._bias.to(wide.dtype)
        return linear(wide, views.weights, bias), inner

    def backward(
        self, dy: Tensor, masks: Masks | None, rounded: Quantised | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Group`."""
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

    def _down(self, like: Tensor) -> Tensor:
        return self._weights.loaded(like).down


def _room(tokens: int, columns: int, like: Tensor) -> Tensor:
    # On CPUs with AMX, oneDNN multiplies the padding by zero in bfloat16, so NaN there would spread
    # (https://github.com/uxlfoundation/oneDNN/issues/5717).
    stride = aligned(columns)
    padded = like.device.type == "cpu" and stride > columns
    new = like.new_zeros if padded else like.new_empty
    return new(tokens, stride)[:, :columns]

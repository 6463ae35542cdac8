"""A group of layers (see `group`) whose products with the frozen weights are in 8 bits.

The forward pass and the gradient of the input multiply e4m3 (`fp8`) by e4m3 (`fp8_weights`). The
adapters compute in the dtype of the input, from its values before rounding. Both parts of a result
are added in float32, and the sum rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_harness.fused import dropout, fp8
from qlora_harness.fused.bordered import Projection, Scratch
from qlora_harness.fused.dropout import Masks
from qlora_harness.fused.fp8 import Quantised
from qlora_harness.fused.fp8_weights import Fp8Weights
from qlora_harness.fused.group import Group, Inner


class Fp8Group(Group):
    """A group with e4m3 products."""

    def __init__(self, projections: Sequence[Projection], scratch: Scratch) -> None:
        self._weights = Fp8Weights(projections, scratch)
        super().__init__(projections, self._weights)

    def release(self) -> None:
        """Does nothing: the weights were never moved."""

    def input(self, tokens: int, like: Tensor) -> Tensor:
        """Allocates an input, [T, K]."""
        return like.new_empty(tokens, self._weights.width)

    def as_input(self, x: Tensor) -> Tensor:
        """Returns x, [T, K]."""
        return x

    def output_gradient(self, tokens: int, like: Tensor) -> Tensor:
        """Allocates dy, [T, N]."""
        return like.new_empty(tokens, self._weights.height)

    def with_room(self, dy: Tensor) -> Tensor:
        """Returns dy, [T, N]."""
        return dy

    def rounded_input(self, tokens: int, like: Tensor) -> Quantised:
        """Allocates x in e4m3, [T, K]."""
        return fp8.room(tokens, self._weights.width, like)

    def rounded_gradient(self, tokens: int, like: Tensor) -> Quantised:
        """Allocates dy in e4m3, [T, N]."""
        return fp8.room(tokens, self._weights.height, like)

    def forward(
        self, wide: Tensor, masks: Masks | None, rounded: Quantised | None = None
    ) -> tuple[Tensor, Inner]:
        """See `Group`."""
        m = self._weights
        matrices = m.load(wide, transposed=False)
        inner = self._inner(wide, matrices.down, masks, None)
        adapter = None if inner is None else fp8.Adapter(inner, matrices.up, m.reach())
        y = fp8.product(
            *(rounded or fp8.quantise(wide), matrices.values, m.weight_scale),
            dtype=wide.dtype,
            adapter=adapter,
            bias=self._bias,
        )
        return y, inner

    def backward(
        self, dy: Tensor, masks: Masks | None, rounded: Quantised | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Group`."""
        m = self._weights
        matrices = m.load(dy, transposed=True)
        inner = self._inner_gradient(dy, matrices.up)
        adapter = None
        if inner is not None and masks is None:
            adapter = fp8.Adapter(inner, matrices.down.t(), [(m.width, m.border)])
        dx = fp8.product(
            *(rounded or fp8.quantise(dy), matrices.values, m.weight_scale),
            dtype=dy.dtype,
            adapter=adapter,
        )
        if inner is not None and masks is not None:
            dropout.add_products(dx, inner, matrices.down, masks)
        return dx, inner

    def backward_inner(self, dy: Tensor) -> Tensor | None:
        """Returns the gradient of h alone, [T, R]."""
        if not self._weights.border:
            return None
        return self._inner_gradient(dy, self._weights.load_adapters(dy).up)

    def _inner_gradient(self, dy: Tensor, up: Tensor) -> Tensor | None:
        """Returns dh_i = dy_i B_i side by side, [T, R]; None without adapters."""
        m = self._weights
        if not m.border:
            return None
        inner = dy.new_empty(len(dy), m.border)
        gradients, rows = dy.split(m.heights, dim=1), up.split(m.heights)
        for index, slot in self._adapted:
            columns = slice(slot * m.rank, (slot + 1) * m.rank)
            torch.mm(gradients[index], rows[index][:, columns], out=inner[:, columns])
        return inner

    def _down(self, like: Tensor) -> Tensor:
        return self._weights.loaded(like, transposed=False).down

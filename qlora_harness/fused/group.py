"""Linear layers with LoRA that share one input, forward and backward, outside autograd.

y_i = x W_i^T + b_i + h_i B_i^T,  h_i = s drop_i(x) A_i^T

The gradients (W and b are frozen):

dB_i = dy_i^T h_i,  dh_i = dy_i B_i,  dA_i = s dh_i^T drop_i(x),
dx = sum_i dy_i W_i + drop_i(s dh_i A_i)

`lora_group` multiplies by the frozen weights in their own dtype, `fp8_group` in 8 bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_harness.fused import dropout
from qlora_harness.fused.bordered import Projection, Sizes
from qlora_harness.fused.dropout import Masks
from qlora_harness.fused.fp8 import Quantised
from qlora_harness.fused.ops import copy

Gradients = list[Tensor | None]
Inner = Tensor | None


class Group(ABC):
    """Projections of one input. All adapters share scale, rank, dropout and dtype."""

    def __init__(self, projections: Sequence[Projection], sizes: Sizes) -> None:
        self.projections = list(projections)
        self.dropout = max(p.dropout for p in projections)
        self._sizes = sizes
        # (index, slot) of each projection with an adapter.
        self._adapted = [(i, n) for i, n in enumerate(sizes.slots) if n is not None]
        self._dtype = next((p.down.dtype for p in projections if p.down is not None), torch.float32)
        self._bias: Tensor | None = None
        if any(p.layer.bias is not None for p in projections):
            heights = zip(projections, sizes.heights, strict=True)
            self._bias = torch.cat(
                [
                    p.layer.weight.new_zeros(n) if p.layer.bias is None else p.layer.bias.detach()
                    for p, n in heights
                ]
            )

    @abstractmethod
    def release(self) -> None:
        """Gives unquantised weights separate memory again; the group is unusable afterwards."""

    @abstractmethod
    def input(self, tokens: int, like: Tensor) -> Tensor:
        """Allocates an input, [T, K] or wider."""

    @abstractmethod
    def as_input(self, x: Tensor) -> Tensor:
        """Returns x, [T, K], as `input` would hold it."""

    @abstractmethod
    def output_gradient(self, tokens: int, like: Tensor) -> Tensor:
        """Allocates dy, [T, N] or wider, for a group of one."""

    @abstractmethod
    def with_room(self, dy: Tensor) -> Tensor:
        """Returns dy, [T, N], as `output_gradient` would hold it."""

    def rounded_input(self, tokens: int, like: Tensor) -> Quantised | None:
        """Allocates x in e4m3, [T, K], if products need it."""
        return None

    def rounded_gradient(self, tokens: int, like: Tensor) -> Quantised | None:
        """Allocates dy in e4m3, [T, N], if products need it."""
        return None

    @abstractmethod
    def forward(
        self, wide: Tensor, masks: Masks | None, rounded: Quantised | None = None
    ) -> tuple[Tensor, Inner]:
        """Returns the outputs side by side, [T, N], and h, [T, R].

        `wide` comes from `input`, with its first K columns filled; `rounded` is x in e4m3, if an
        earlier operation has filled it.
        """

    @abstractmethod
    def backward(
        self, dy: Tensor, masks: Masks | None, rounded: Quantised | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients of x, [T, K], and h, [T, R], from that of the outputs, [T, N].

        For a group of one with an adapter, dy comes from `output_gradient` or `with_room`;
        `rounded` is dy in e4m3, if an earlier operation has filled it.
        """

    @abstractmethod
    def backward_inner(self, dy: Tensor) -> Tensor | None:
        """Returns the gradient of h alone, [T, R]."""

    @abstractmethod
    def _down(self, like: Tensor) -> Tensor:
        """Returns s A, [R, K], of the last pass."""

    def parameters(self) -> list[torch.nn.Parameter | None]:
        """Returns A and B of each projection."""
        return [p for projection in self.projections for p in (projection.down, projection.up)]

    def can_pack_masks(self, like: Tensor) -> bool:
        """Whether the masks of its adapters can be packed, on inputs such as `like`."""
        return not self._adapted or dropout.can_pack(self._sizes.rank, like)

    def mask_shape(self, tokens: int) -> tuple[int, int, int]:
        """Returns the shape of the group's masks, (adapters, T, K)."""
        return len(self._adapted), tokens, self._sizes.width

    def gradients(
        self, dy: Tensor, d_inner: Tensor | None, x: Tensor, inner: Inner, masks: Masks | None
    ) -> Gradients:
        """Returns the gradients of A and B of each projection; call it after `backward`.

        dy is [T, N] or wider; `inner` is recomputed if None.
        """
        m = self._sizes
        gradients: Gradients = [None] * (2 * len(self.projections))
        if d_inner is None:
            return gradients
        if inner is None:
            inner = self._inner(x, self._down(x), masks, None)
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
        if not self._sizes.border:
            return None
        if masks is not None:
            return dropout.products(x, down, masks, beside)
        inner = x @ down.t()
        if beside is not None:
            copy(inner, beside)
        return inner


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies matrices into another dtype; on CUDA without rounding to theirs first."""
    if a.is_cuda and dtype == torch.float32 and a.dtype == torch.bfloat16:
        wide: Tensor = torch.mm(a, b, out_dtype=dtype)
        return wide
    return (a @ b).to(dtype)

"""Linear layers with LoRA that read one input, forward and backward, outside autograd.

y_i = x W_i^T + b_i + h_i B_i^T,  h_i = s drop_i(x) A_i^T

A frozen weight is expanded once a pass; the A's of a group are one product where nothing is
dropped; second products accumulate in place. Gradients follow by hand (W and b are frozen):

dB_i = dy_i^T h_i,  dh_i = s dy_i B_i,  dA_i = dh_i^T drop_i(x),
dx = sum_i dy_i W_i + drop_i(dh_i A_i)

Adapters are held in their own dtype and copied to that of the input layer by layer, into memory
that all layers share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_harness.fused.expand import expanded
from qlora_harness.fused.ops import drop

Gradients = list[torch.Tensor | None]
Inner = torch.Tensor | None


@dataclass
class Projection:
    """One linear layer of a group.

    Attributes:
        layer: The frozen layer.
        down: LoRA's A, [r, K], or None for a layer without an adapter.
        up: LoRA's B, [N, r], or None.
        scale: alpha / r.
        dropout: Probability, on the adapter's input.
    """

    layer: Any
    down: torch.nn.Parameter | None
    up: torch.nn.Parameter | None
    scale: float
    dropout: float


class Scratch:
    """Memory that layers of the same shape share, as they run one after the other."""

    def __init__(self) -> None:
        self._buffers: dict[Any, torch.Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Returns a buffer; its content is whatever was written last.

        Args:
            name: Buffers of different names never overlap.
            shape: Of the buffer.
            like: Gives dtype and device.
        """
        key = (name, shape, like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(shape, dtype=like.dtype, device=like.device)
        return self._buffers[key]


class LoraGroup:
    """Projections of one input.

    Args:
        projections: In the order of the outputs; those with an adapter have one scale, rank and
            dropout.
        name: Of the group in a layer.
        scratch: Shared by all layers.
    """

    def __init__(self, projections: Sequence[Projection], name: str, scratch: Scratch) -> None:
        self.projections = list(projections)
        self._adapted = [i for i, p in enumerate(self.projections) if p.down is not None]
        some = self.projections[self._adapted[0]] if self._adapted else None
        self.dropout = some.dropout if some else 0.0
        self._scale = some.scale if some else 1.0
        self._name, self._scratch = name, scratch
        self._downs: list[torch.Tensor] = []
        self._ups: list[torch.Tensor] = []
        self._all_downs: torch.Tensor | None = None

    def parameters(self) -> list[torch.nn.Parameter | None]:
        """A and B of each projection."""
        return [p for projection in self.projections for p in (projection.down, projection.up)]

    def load(self, x: torch.Tensor) -> None:
        """Copies the adapters into the shared memory, in the dtype of x.

        Args:
            x: Gives dtype and device.
        """
        if not self._adapted:
            return
        downs = [p.down.detach() for p in self.projections if p.down is not None]
        ups = [p.up.detach() for p in self.projections if p.up is not None]
        shape = (sum(d.shape[0] for d in downs), downs[0].shape[1])
        self._all_downs = self._scratch.get(f"{self._name}.down", shape, x)
        self._downs = list(torch.split(self._all_downs, [d.shape[0] for d in downs]))
        self._ups = [
            self._scratch.get(f"{self._name}.up.{i}", tuple(up.shape), x)
            for i, up in enumerate(ups)
        ]
        torch._foreach_copy_([*self._downs, *self._ups], [*downs, *ups])

    def forward(
        self, x: torch.Tensor, seed: int | None, add_to: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], Inner]:
        """Returns the outputs, each [T, N_i], and the adapters' inner activations, [T, sum r].

        Args:
            x: [T, K].
            seed: Of the dropout, or None to drop nothing.
            add_to: Added to the output of a group of one (the residual), [T, N].
        """
        inner = self.inner(x, seed)
        parts = self._parts(inner)
        outputs = []
        for i, projection in enumerate(self.projections):
            weight = expanded(projection.layer, x.dtype)
            y = x @ weight.t()
            del weight
            if projection.layer.bias is not None:
                y += projection.layer.bias
            if i in parts:
                h, place = parts[i]
                y.addmm_(h, self._ups[place].t())
            if add_to is not None:
                # Last: an adapter's small product, added to the larger residual alone, would
                # vanish in bfloat16's rounding.
                y += add_to
            outputs.append(y)
        return outputs, inner

    def inner(self, x: torch.Tensor, seed: int | None) -> Inner:
        """Returns s drop(x) A^T of all adapters side by side, or None where there is none.

        Args:
            x: [T, K].
            seed: Of the dropout, or None to drop nothing.
        """
        if self._all_downs is None:
            return None
        if self.dropout and seed is not None:
            inner = torch.cat(
                [
                    drop(x, self.dropout, seed + i) @ down.t()
                    for i, down in zip(self._adapted, self._downs, strict=True)
                ],
                dim=1,
            )
        else:
            inner = x @ self._all_downs.t()
        return inner.mul_(self._scale)

    def backward(
        self,
        grads: Sequence[torch.Tensor],
        x: torch.Tensor,
        inner: Inner,
        seed: int | None,
        *,
        needs_input: bool,
    ) -> tuple[torch.Tensor | None, Gradients]:
        """Returns the gradient of x, [T, K], and those of A and B of each projection.

        Args:
            grads: Gradient of each output, [T, N_i].
            x: The input.
            inner: From `forward`.
            seed: As in `forward`.
            needs_input: Whether the gradient of x is wanted.
        """
        dx: torch.Tensor | None = None
        if needs_input:
            for p, dy in zip(self.projections, grads, strict=True):
                weight = expanded(p.layer, x.dtype)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
                del weight
        found: Gradients = [None] * (2 * len(self.projections))
        if inner is None or self._all_downs is None:
            return dx, found
        d_inner = torch.empty_like(inner)
        for i, (h, place) in self._parts(inner).items():
            up = self.projections[i].up
            assert up is not None
            found[2 * i + 1] = _product(grads[i].t(), h, up.dtype)
            torch.mm(grads[i], self._ups[place], out=self._part(d_inner, place))
        d_inner.mul_(self._scale)
        if self.dropout and seed is not None:
            for i, (dh, place) in self._parts(d_inner).items():
                down = self.projections[i].down
                assert down is not None
                found[2 * i] = _product(dh.t(), drop(x, self.dropout, seed + i), down.dtype)
                if dx is not None:
                    dx += drop(dh @ self._downs[place], self.dropout, seed + i)
            return dx, found
        if dx is not None:
            dx.addmm_(d_inner, self._all_downs)
        first = self.projections[self._adapted[0]].down
        assert first is not None
        d_downs = _product(d_inner.t(), x, first.dtype)
        for i, (_, place) in self._parts(d_inner).items():
            found[2 * i] = self._rows(d_downs, place)
        return dx, found

    def _parts(self, inner: Inner) -> dict[int, tuple[torch.Tensor, int]]:
        """The columns of each adapted projection, and its place among them."""
        if inner is None:
            return {}
        return {i: (self._part(inner, place), place) for place, i in enumerate(self._adapted)}

    def _part(self, inner: torch.Tensor, place: int) -> torch.Tensor:
        rank = self._downs[place].shape[0]
        return inner[:, place * rank : (place + 1) * rank]

    def _rows(self, d_downs: torch.Tensor, place: int) -> torch.Tensor:
        rank = self._downs[place].shape[0]
        return d_downs[place * rank : (place + 1) * rank]


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A matrix product in another dtype than its factors', without rounding in between on CUDA."""
    if a.is_cuda and dtype == torch.float32 and a.dtype == torch.bfloat16:
        wide: torch.Tensor = torch.mm(a, b, out_dtype=dtype)
        return wide
    return (a @ b).to(dtype)

"""Linear layers with LoRA that read one input, forward and backward, outside autograd.

y_i = x W_i^T + b_i + s_i (drop_i(x) A_i^T) B_i^T

The frozen weight is expanded once a pass; A's of a group are one product where nothing is dropped;
second products accumulate in place. Gradients follow by hand (W and b are frozen):

dB_i = s_i dy_i^T h_i,  dh_i = s_i dy_i B_i,  dA_i = dh_i^T drop_i(x),
dx = sum_i dy_i W_i + drop_i(dh_i A_i)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_harness.fused.expand import expanded
from qlora_harness.fused.ops import drop

Gradients = list[torch.Tensor | None]


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

    @property
    def parameters(self) -> list[torch.nn.Parameter | None]:
        """A and B."""
        return [self.down, self.up]


class LoraGroup:
    """Projections of one input.

    Args:
        projections: In the order of the outputs.
    """

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.projections = list(projections)
        self._adapted = [p for p in self.projections if p.down is not None]
        self.dropout = max((p.dropout for p in self._adapted), default=0.0)

    def parameters(self) -> list[torch.nn.Parameter | None]:
        """A and B of each projection."""
        return [p for projection in self.projections for p in projection.parameters]

    def forward(
        self, x: torch.Tensor, seed: int | None, add_to: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Returns the outputs, each [T, N_i], and the adapters' inner activations, [T, r].

        Args:
            x: [T, K].
            seed: Of the dropout, or None to drop nothing.
            add_to: Added to the output of a group of one (the residual), [T, N].
        """
        inner = self.inner(x, seed)
        outputs = []
        for projection, h in zip(self.projections, inner, strict=True):
            weight = expanded(projection.layer, x.dtype)
            if add_to is not None:
                y = torch.addmm(add_to, x, weight.t())
            else:
                y = x @ weight.t()
            del weight
            if projection.layer.bias is not None:
                y += projection.layer.bias
            if h is not None and projection.up is not None:
                y.addmm_(h, projection.up.to(x.dtype).t(), alpha=projection.scale)
            outputs.append(y)
        return outputs, inner

    def inner(self, x: torch.Tensor, seed: int | None) -> list[torch.Tensor | None]:
        """Returns drop(x) A^T of each projection, [T, r], or None where there is no adapter.

        Args:
            x: [T, K].
            seed: Of the dropout, or None to drop nothing.
        """
        if self.dropout and seed is not None:
            return [
                None if p.down is None else drop(x, p.dropout, seed + i) @ p.down.to(x.dtype).t()
                for i, p in enumerate(self.projections)
            ]
        if not self._adapted:
            return [None] * len(self.projections)
        together = x @ self._downs(x.dtype).t()
        parts = iter(torch.split(together, self._ranks(), dim=1))
        return [None if p.down is None else next(parts) for p in self.projections]

    def backward(
        self,
        grads: Sequence[torch.Tensor],
        x: torch.Tensor,
        inner: Sequence[torch.Tensor | None],
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
        inner_grads: list[torch.Tensor | None] = []
        found: Gradients = []
        for i, (p, dy, h) in enumerate(zip(self.projections, grads, inner, strict=True)):
            if needs_input:
                weight = expanded(p.layer, x.dtype)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
                del weight
            if p.down is None or p.up is None or h is None:
                inner_grads.append(None)
                found += [None, None]
                continue
            dh = (dy @ p.up.to(x.dtype)).mul_(p.scale)
            d_up = (dy.t() @ h).mul_(p.scale).to(p.up.dtype)
            inner_grads.append(dh)
            d_down = None
            if self.dropout and seed is not None:
                d_down = (dh.t() @ drop(x, p.dropout, seed + i)).to(p.down.dtype)
                if dx is not None:
                    dx += drop(dh @ p.down.to(x.dtype), p.dropout, seed + i)
            found += [d_down, d_up]
        present = [dh for dh in inner_grads if dh is not None]
        if present and not (self.dropout and seed is not None):
            together = torch.cat(present, dim=1) if len(present) > 1 else present[0]
            if dx is not None:
                dx.addmm_(together, self._downs(x.dtype))
            d_downs = iter(torch.split(together.t() @ x, self._ranks()))
            for i, p in enumerate(self.projections):
                if p.down is not None:
                    found[2 * i] = next(d_downs).to(p.down.dtype)
        return dx, found

    def _ranks(self) -> list[int]:
        return [p.down.shape[0] for p in self._adapted if p.down is not None]

    def _downs(self, dtype: torch.dtype) -> torch.Tensor:
        downs = [p.down for p in self._adapted if p.down is not None]
        return downs[0].to(dtype) if len(downs) == 1 else torch.cat([d.to(dtype) for d in downs])

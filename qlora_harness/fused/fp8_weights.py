"""The weights of a group in e4m3, in memory that all groups share.

The base stays in 4 or 16 bits. Each pass rounds the weights that `bordered` would multiply by to
e4m3: as they are for y = x W^T, transposed for dx = dy W, because tensor cores read both operands
along the sum. Beside them are the adapters, in the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_harness.fused.bordered import Projection, Scratch, Sizes, aligned, group_sizes
from qlora_harness.fused.fp8 import E4M3, weight_scale
from qlora_harness.fused.launch import usable
from qlora_harness.model.base import expand_4bit
from qlora_harness.model.shape import Shape


class Matrices(NamedTuple):
    """What a pass multiplies by; valid until the next group is loaded."""

    values: Tensor  # W / scale in e4m3, [N, K] or transposed, [K, N]
    up: Tensor  # the adapters' B, each beside its layer's rows and zero elsewhere, [N, R]
    down: Tensor  # s A, [R, K]


class Fp8Weights(Sizes):
    """The weights and adapters of a group; `weight_scale` is the weights' power of two."""

    def __init__(self, projections: Sequence[Projection], scratch: Scratch) -> None:
        super().__init__(projections)
        self.projections, self._scratch = list(projections), scratch
        self._states = [getattr(p.layer.weight, "quant_state", None) for p in projections]
        self.weight_scale = weight_scale(max(map(_largest, projections, self._states)))
        self._rounder: Any = None
        self._stride = aligned(self.border)
        self._bytes = self.height * self.width
        scratch.announce(
            -(-self._bytes // 2) + self.height * self._stride + self.border * self.width
        )

    def load(self, like: Tensor, *, transposed: bool) -> Matrices:
        """Rounds the weights and copies the adapters; `like` gives dtype and device."""
        matrices = self.loaded(like, transposed=transposed)
        if not (usable(matrices.values) and self._round_in_triton(matrices.values, transposed)):
            rows = matrices.values.t() if transposed else matrices.values
            self._round(torch.split(rows, self.heights), like.dtype)
        if self.border:
            self._copy_adapters(matrices)
        return matrices

    def load_adapters(self, like: Tensor) -> Matrices:
        """Copies the adapters alone."""
        matrices = self.loaded(like, transposed=False)
        self._copy_adapters(matrices)
        return matrices

    def loaded(self, like: Tensor, *, transposed: bool) -> Matrices:
        """Returns the matrices without filling them."""
        memory = self._scratch.get(like)
        shape = (self.width, self.height) if transposed else (self.height, self.width)
        first = -(-self._bytes // memory.element_size())
        second = first + self.height * self._stride
        up = memory[first:second].view(self.height, self._stride)
        return Matrices(
            memory[:first].view(E4M3)[: self._bytes].view(shape),
            up[:, : self.border],
            memory[second : second + self.border * self.width].view(self.border, self.width),
        )

    def _round_in_triton(self, out: Tensor, transposed: bool) -> bool:
        """Returns whether the kernel supports these weights."""
        if self._rounder is None:
            from qlora_harness.fused.triton_fp8 import Rounder

            self._rounder = Rounder(self, self._states)
        if self._rounder.fits:
            self._rounder(out, transposed)
        return bool(self._rounder.fits)

    def _round(self, parts: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Rounds each weight, [n, K], first to `dtype` as for products in it, then to e4m3."""
        for projection, state, part in zip(self.projections, self._states, parts, strict=True):
            weight = projection.layer.weight
            full = weight.detach() if state is None else expand_4bit(weight.data, state, dtype)
            part.copy_((full.float() / self.weight_scale).to(E4M3))

    def _copy_adapters(self, matrices: Matrices) -> None:
        if usable(matrices.up):
            from qlora_harness.fused import triton_fp8

            triton_fp8.copy_adapters(self, matrices.up, matrices.down)
            return
        if len(self.projections) > 1:
            matrices.up.zero_()
        rows = torch.split(matrices.up, self.heights)
        for projection, part, slot in zip(self.projections, rows, self.slots, strict=True):
            if projection.up is None or projection.down is None or slot is None:
                continue
            columns = slice(slot * self.rank, (slot + 1) * self.rank)
            part[:, columns] = projection.up.detach()
            torch.mul(projection.down.detach(), self.scale, out=matrices.down[columns])


def _largest(projection: Projection, state: Any) -> float:
    weight = projection.layer.weight
    full = weight.detach() if state is None else expand_4bit(weight.data, state, torch.float32)
    return float(torch.linalg.vector_norm(full, float("inf")))


def working_bytes(shape: Shape, rank: int, tokens: int) -> int:
    """Returns the bytes of the largest group's matrices and of its quantised input or gradient."""
    share = rank * shape.adapted / 7
    matrices = []
    for height, width, count in group_sizes(shape):
        border = int(share * count)
        matrices.append(height * width + 2 * (height * aligned(border) + border * width))
    return max(matrices) + 2 * shape.inner * tokens

"""The weights of linear layers that read one input, bordered by their adapters.

    M = [ W  B ]    W: the frozen weights one below the other, [N, K]
        [ A  0 ]    B: the adapters' second matrices, each beside its own rows, [N, R]
                    A: the adapters' first matrices times alpha / r, [R, K]

One product then gives a layer with its adapter, in one rounding: [x, h] [W, B]^T with h = x A^T;
and dy [W, B] is the gradient of both x and h.

A 4-bit W is expanded into memory that all groups share, at every pass. A full-precision W moves
into its M once, and the layer's own weight becomes a view of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_harness.fused import triton_ops
from qlora_harness.model.base import expand_4bit

_ALIGN = 64  # elements; rows that start on 128 bytes are read faster


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
    """Memory that groups share, as they run one after the other."""

    def __init__(self) -> None:
        self._flat: torch.Tensor | None = None

    def get(self, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """Returns [rows, columns]; its content is whatever was written last.

        Args:
            rows: Of the matrix.
            columns: Of the matrix.
            like: Gives dtype and device.
        """
        flat, count = self._flat, rows * columns
        if (
            flat is None
            or flat.numel() < count
            or flat.dtype != like.dtype
            or flat.device != like.device
        ):
            self._flat = None  # given back before more is asked for
            self._flat = flat = torch.empty(count, dtype=like.dtype, device=like.device)
        return flat[:count].view(rows, columns)


class Bordered:
    """M of a group.

    Args:
        projections: In the order of the outputs; those with an adapter have one scale and rank.
        scratch: Shared by all groups of a model.

    Attributes:
        heights: N of each projection.
        height: Their sum, N.
        width: K.
        rank: r of each adapter; 0 without any.
        border: R, the ranks of all adapters.
        places: For each projection its place among the adapters, or None.
        scale: alpha / r.
    """

    def __init__(self, projections: Sequence[Projection], scratch: Scratch) -> None:
        self.projections, self._scratch = list(projections), scratch
        self.heights = [int(p.layer.out_features) for p in projections]
        self.height, self.width = sum(self.heights), int(projections[0].layer.in_features)
        adapted = [p for p in projections if p.down is not None]
        self.rank = int(adapted[0].down.shape[0]) if adapted and adapted[0].down is not None else 0
        self.border = self.rank * len(adapted)
        self.scale = adapted[0].scale if adapted else 1.0
        numbers = iter(range(len(adapted)))
        self.places = [None if p.down is None else next(numbers) for p in projections]
        self.stride = aligned(self.width + self.border)
        self._states = [getattr(p.layer.weight, "quant_state", None) for p in projections]
        self._own: torch.Tensor | None = None
        if all(state is None for state in self._states):
            self._own = self._move_in()

    def _move_in(self) -> torch.Tensor:
        weight = self.projections[0].layer.weight
        own = weight.new_zeros(self.height + self.border, self.stride)
        start = 0
        for projection, height in zip(self.projections, self.heights, strict=True):
            view = own[start : start + height, : self.width]
            view.copy_(projection.layer.weight.data)
            projection.layer.weight.data = view
            start += height
        return own

    def load(self, like: torch.Tensor, *, again: bool = False) -> torch.Tensor:
        """Returns M, [N + R, K + R]; valid until another group of a 4-bit base is loaded.

        Args:
            like: Gives dtype and device.
            again: Whether adapters have not changed since the last time, as in a backward pass.
        """
        matrix = self.loaded(like)
        if self._own is not None and again:
            return matrix
        if triton_ops.usable(matrix) and triton_ops.can_load(self._states):
            triton_ops.load(self, self._states, matrix)
        else:
            self._load(matrix)
        return matrix

    def loaded(self, like: torch.Tensor) -> torch.Tensor:
        """Returns M as it was loaded last, [N + R, K + R].

        Args:
            like: Gives dtype and device.
        """
        matrix = self._own
        if matrix is None:
            matrix = self._scratch.get(self.height + self.border, self.stride, like)
        return matrix[:, : self.width + self.border]

    def _load(self, matrix: torch.Tensor) -> None:
        start = 0
        for projection, state, height, place in zip(
            self.projections, self._states, self.heights, self.places, strict=True
        ):
            rows = matrix[start : start + height]
            start += height
            if self._own is None:
                weight = projection.layer.weight.data
                rows[:, : self.width] = (
                    weight if state is None else expand_4bit(weight, state, matrix.dtype)
                )
                rows[:, self.width :] = 0  # where no adapter of its own is
            if projection.up is not None and projection.down is not None and place is not None:
                at = place * self.rank
                rows[:, self.width + at : self.width + at + self.rank] = projection.up.detach()
                down = matrix[self.height + at : self.height + at + self.rank, : self.width]
                down.copy_(projection.down.detach() * self.scale)


def aligned(columns: int) -> int:
    """Returns a number of columns rounded up to whole 128 bytes of bfloat16.

    Args:
        columns: At least 1.
    """
    return -(-columns // _ALIGN) * _ALIGN

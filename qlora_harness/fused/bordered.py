"""The weights of linear layers that read one input, bordered by their adapters.

    M = [ W  B ]    W: the frozen weights one below the other, [N, K]
        [ A    ]    B: the adapters' second matrices, each beside its own rows, [N, R]
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
        self._count = 0

    def announce(self, count: int) -> None:
        """Says that a group will need room, so that all is asked for at once.

        Args:
            count: Elements.
        """
        self._count = max(self._count, count)

    def get(self, like: torch.Tensor) -> torch.Tensor:
        """Returns the memory, [elements]; what it holds was written last.

        Args:
            like: Gives dtype and device.
        """
        flat = self._flat
        if flat is None or flat.dtype != like.dtype or flat.device != like.device:
            self._flat = flat = torch.empty(self._count, dtype=like.dtype, device=like.device)
        return flat


@dataclass(frozen=True)
class Views:
    """Parts of M.

    Attributes:
        weights: [W, B], [N, K + R].
        frozen: W, [N, K].
        up: B, [N, R].
        down: s A, [R, K].
        left: W and below it s A, [N + R, K].
        whole: M with the unused columns at its right, [N + R, stride].
    """

    weights: torch.Tensor
    frozen: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    left: torch.Tensor
    whole: torch.Tensor


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
        downs = [p.down for p in projections if p.down is not None]
        self.rank = len(downs[0]) if downs else 0
        self.border = self.rank * len(downs)
        self.scale = next((p.scale for p in projections if p.down is not None), 1.0)
        numbers = iter(range(len(downs)))
        self.places = [None if p.down is None else next(numbers) for p in projections]
        self.stride = aligned(self.width + self.border)
        self._states = [getattr(p.layer.weight, "quant_state", None) for p in projections]
        self._loader = triton_ops.Loader(self, self._states)
        self._memory: torch.Tensor | None = None
        self._views: Views | None = None
        self._owns = all(state is None for state in self._states)
        if self._owns:
            self._move_in()
        else:
            scratch.announce((self.height + self.border) * self.stride)

    def _move_in(self) -> None:
        weight = self.projections[0].layer.weight
        own = weight.new_zeros((self.height + self.border) * self.stride)
        self._views = self._parts(own)
        views = torch.split(self._views.frozen, self.heights)
        for projection, view in zip(self.projections, views, strict=True):
            view.copy_(projection.layer.weight.data)
            projection.layer.weight.data = view

    def move_out(self) -> None:
        """Gives full-precision weights memory of their own again."""
        if self._owns:
            for projection in self.projections:
                projection.layer.weight.data = projection.layer.weight.data.contiguous()
            self._views = None

    def load(self, like: torch.Tensor, *, again: bool = False) -> Views:
        """Fills M; it is valid until another group of a 4-bit base is loaded.

        Args:
            like: Gives dtype and device.
            again: Whether adapters have not changed since the last time, as in a backward pass.
        """
        views = self.loaded(like)
        if self._owns and (again or not self.border):
            return views
        if triton_ops.usable(views.whole) and self._loader.fits:
            self._loader(views.whole)
        else:
            self._load(views.whole)
        return views

    def loaded(self, like: torch.Tensor) -> Views:
        """Returns M as it was loaded last.

        Args:
            like: Gives dtype and device.
        """
        views = self._views
        if self._owns:
            assert views is not None
            return views
        memory = self._scratch.get(like)
        if views is None or memory is not self._memory:
            self._memory = memory
            self._views = views = self._parts(memory)
        return views

    def _parts(self, memory: torch.Tensor) -> Views:
        rows = self.height + self.border
        whole = memory[: rows * self.stride].view(rows, self.stride)
        columns = self.width + self.border
        return Views(
            weights=whole[: self.height, :columns],
            frozen=whole[: self.height, : self.width],
            up=whole[: self.height, self.width : columns],
            down=whole[self.height :, : self.width],
            left=whole[:, : self.width],
            whole=whole,
        )

    def _load(self, matrix: torch.Tensor) -> None:
        parts = torch.split(matrix[: self.height], self.heights)
        for projection, state, rows, place in zip(
            self.projections, self._states, parts, self.places, strict=True
        ):
            if not self._owns:
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

"""The weights of linear layers that share one input, bordered by their adapters.

    M = [ W  B ]    W: the stacked frozen weights, [N, K]
        [ A    ]    B: the adapters' second matrices, each beside its layer's rows, [N, R]
                    A: the adapters' stacked first matrices times alpha / r, [R, K]

One product then computes layers and adapters with one rounding: [x, h] [W, B]^T with h = x A^T;
and dy [W, B] is the gradient of both x and h.

Every pass expands a 4-bit W into memory that all groups share. A full-precision W moves into its M
once, and the layer's own weight becomes a view of it; one that is spread over processes is copied
in every pass, as a 4-bit one is expanded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qlora_harness.fused.launch import usable
from qlora_harness.model.base import expand_4bit
from qlora_harness.model.shape import Shape

_ALIGN = 64  # elements; rows that start on 128 bytes are read faster


@dataclass
class Projection:
    """One frozen linear layer of a group, and its adapter, if any."""

    layer: Any
    down: torch.nn.Parameter | None  # LoRA's A, [r, K]
    up: torch.nn.Parameter | None  # LoRA's B, [N, r]
    scale: float  # alpha / r
    dropout: float  # probability, on the adapter's input


class Sizes:
    """The sizes of a group of projections, whose adapters share scale and rank.

    `heights` are the output sizes, `height` is N, `width` K, and `border` R, the sum of ranks.
    `slots` numbers the projections with an adapter; the others have None.
    """

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.heights = [int(p.layer.out_features) for p in projections]
        self.height, self.width = sum(self.heights), int(projections[0].layer.in_features)
        downs = [p.down for p in projections if p.down is not None]
        self.rank = len(downs[0]) if downs else 0
        self.border = self.rank * len(downs)
        self.scale = next((p.scale for p in projections if p.down is not None), 1.0)
        numbers = iter(range(len(downs)))
        self.slots = [None if p.down is None else next(numbers) for p in projections]

    def reach(self) -> list[tuple[int, int]]:
        """Returns, of each projection, the ends of its rows and of its adapter's columns."""
        adapted = accumulate(slot is not None for slot in self.slots)
        columns = (self.rank * count for count in adapted)
        return list(zip(accumulate(self.heights), columns, strict=True))


class Scratch:
    """Memory that all groups share, since they run one after the other.

    `sharded` says that weights are valid only while their layer computes.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        self.sharded = sharded
        self._flat: Tensor | None = None
        self._count = 0

    def announce(self, count: int) -> None:
        """Registers the elements that a group needs, so that one allocation suffices."""
        self._count = max(self._count, count)

    def get(self, like: Tensor) -> Tensor:
        """Returns the memory, [elements], in the dtype and on the device of `like`."""
        flat = self._flat
        if flat is None or flat.dtype != like.dtype or flat.device != like.device:
            self._flat = flat = torch.empty(self._count, dtype=like.dtype, device=like.device)
        return flat


@dataclass(frozen=True)
class Views:
    """Parts of M."""

    weights: Tensor  # [W, B], [N, K + R]
    frozen: Tensor  # W, [N, K]
    up: Tensor  # B, [N, R]
    down: Tensor  # s A, [R, K]
    left: Tensor  # W and below it s A, [N + R, K]
    whole: Tensor  # with the unused columns at its right, [N + R, stride]


class Bordered(Sizes):
    """M of a group of projections."""

    def __init__(self, projections: Sequence[Projection], scratch: Scratch) -> None:
        super().__init__(projections)
        self.projections, self._scratch = list(projections), scratch
        self.stride = aligned(self.width + self.border)
        self._states = [getattr(p.layer.weight, "quant_state", None) for p in projections]
        self._loader: Any = None
        self._memory: Tensor | None = None
        self._views: Views | None = None
        self._owns = not scratch.sharded and all(state is None for state in self._states)
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
        """Gives full-precision weights separate memory again."""
        if self._owns:
            for projection in self.projections:
                projection.layer.weight.data = projection.layer.weight.data.contiguous()
            self._views = None

    def load(self, like: Tensor, *, again: bool = False) -> Views:
        """Fills M, which stays valid until another 4-bit group is loaded.

        `again` promises that the adapters haven't changed since the last call.
        """
        views = self.loaded(like)
        if self._owns and (again or not self.border):
            return views
        if not (usable(views.whole) and self._load_in_triton(views.whole)):
            self._load(views.whole)
        return views

    def loaded(self, like: Tensor) -> Views:
        """Returns M without filling it."""
        views = self._views
        if self._owns:
            assert views is not None
            return views
        memory = self._scratch.get(like)
        if views is None or memory is not self._memory:
            self._memory = memory
            self._views = views = self._parts(memory)
        return views

    def _parts(self, memory: Tensor) -> Views:
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

    def _load_in_triton(self, matrix: Tensor) -> bool:
        """Returns whether the kernel supports these weights."""
        if self._loader is None:
            from qlora_harness.fused.triton_weights import Loader

            self._loader = Loader(self, self._states)
        if self._loader.fits:
            if not self._owns and self._states[0] is None:
                parts = torch.split(matrix[: self.height, : self.width], self.heights)
                for projection, part in zip(self.projections, parts, strict=True):
                    part.copy_(projection.layer.weight.data)
            self._loader(matrix)
        return bool(self._loader.fits)

    def _load(self, matrix: Tensor) -> None:
        parts = torch.split(matrix[: self.height], self.heights)
        for projection, state, rows, slot in zip(
            self.projections, self._states, parts, self.slots, strict=True
        ):
            if not self._owns:
                weight = projection.layer.weight.data
                rows[:, : self.width] = (
                    weight if state is None else expand_4bit(weight, state, matrix.dtype)
                )
                rows[:, self.width :] = 0  # beside other projections' adapters
            if projection.up is not None and projection.down is not None and slot is not None:
                at = slot * self.rank
                rows[:, self.width + at : self.width + at + self.rank] = projection.up.detach()
                down = matrix[self.height + at : self.height + at + self.rank, : self.width]
                down.copy_(projection.down.detach() * self.scale)


def aligned(columns: int) -> int:
    """Rounds columns up to a multiple of 128 bytes of bfloat16."""
    return -(-columns // _ALIGN) * _ALIGN


def matrix_sizes(shape: Shape, rank: int) -> list[int]:
    """Returns the elements of M for each group of a decoder layer."""
    share = rank * shape.adapted / 7
    return [
        int(n + share * count) * aligned(int(k + share * count))
        for n, k, count in group_sizes(shape)
    ]


def group_sizes(shape: Shape) -> list[tuple[int, int, int]]:
    """Returns outputs, inputs and projections of each group of a decoder layer."""
    return [
        (shape.queries + 2 * shape.keys, shape.hidden, 3),
        (shape.hidden, shape.queries, 1),
        (2 * shape.inner, shape.hidden, 2),
        (shape.hidden, shape.inner, 1),
    ]


def matrix_bytes(shape: Shape, rank: int, size: int, *, shared: bool) -> int:
    """Returns the bytes that the matrices take in addition to the base; an element takes `size`.

    That is the largest matrix for a 4-bit or a sharded base, whose groups have `shared` memory, and
    the added borders for full-precision weights.
    """
    matrices = matrix_sizes(shape, rank)
    if shared:
        return max(matrices) * size
    return (sum(matrices) - shape.linear // shape.layers) * size * shape.layers

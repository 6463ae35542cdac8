"""A packed row: several texts in sequence, without padding, none of which attends to another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_harness.fused.host_memory import to_device


@dataclass
class Rotation:
    """Rotary cosines and sines of each token, [T, D] each; both halves of D are equal."""

    cos: Tensor
    sin: Tensor


@dataclass
class PackedRow(Rotation):
    """The rotation of a row's tokens, and where its texts begin and end."""

    cu_seqlens: Tensor  # first token of each text and the end of the last, [N + 1] int32
    starts: tuple[int, ...]  # cu_seqlens on the host
    max_seqlen: int  # tokens of the longest text
    _tiles: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def tiles(self, size: int) -> Tensor:
        """Cuts the texts into tiles of `size` tokens: [tiles, 3] int32 on the device.

        The columns are the text's first token in the row, its length, and the tile's first token in
        the text. Long texts come first, each from its last tile, which sees the most tokens: the
        slowest tiles start early, and those of one text share the cache.
        """
        if size not in self._tiles:
            texts = [(b - a, a) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
            lines = [
                (start, length, first)
                for length, start in sorted(texts, reverse=True)
                for first in reversed(range(0, length, size))
            ]
            tiles = torch.tensor(lines, dtype=torch.int32).view(-1, 3)
            self._tiles[size] = to_device(tiles, self.cos.device)
        return self._tiles[size]

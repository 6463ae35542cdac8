"""A row: several texts one after the other, without padding, none of which sees another."""

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
    """Where the texts of a row begin and end, beside the rotation of its tokens."""

    cu_seqlens: Tensor  # first token of each text and the end of the last, [N + 1] int32
    starts: tuple[int, ...]  # cu_seqlens on the host
    max_seqlen: int  # tokens of the longest text
    _tiles: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def tiles(self, size: int) -> Tensor:
        """Returns the texts cut into tiles of so many tokens, [tiles, 3] int32 on the device.

        A line holds the text's first token in the row, its length, and the tile's first token in
        the text. The longest texts come first, and of each the last tile, which sees most: what
        takes long starts early, and the tiles of a text meet in the cache.
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

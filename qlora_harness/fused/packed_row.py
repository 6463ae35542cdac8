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
            self._tiles[size] = to_device(self._listed(size), self.cos.device)
        return self._tiles[size]

    def _listed(self, size: int) -> Tensor:
        """Returns the tiles on the host."""
        texts = [(b - a, a) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
        lines = [
            (start, length, first)
            for length, start in sorted(texts, reverse=True)
            for first in reversed(range(0, length, size))
        ]
        return torch.tensor(lines, dtype=torch.int32).view(-1, 3)


class RowBuffer(PackedRow):
    """A row of fixed length and memory, which holds one row after another.

    The tokens behind a row form a text of their own. Tiles that a row doesn't need are empty.
    """

    def __init__(self, tokens: int, texts: int, like: Rotation) -> None:
        """Allocates room for `tokens` in at most `texts`; `like` gives head size and dtype."""
        cos, sin = (like.cos.new_zeros(tokens, like.cos.shape[1]) for _ in range(2))
        borders = like.cos.new_zeros(texts + 2, dtype=torch.int32)
        super().__init__(cos, sin, borders, (0, tokens), tokens)

    def tiles(self, size: int) -> Tensor:
        """Returns the tiles of the current row, of which there are always as many."""
        if size not in self._tiles:
            most = len(self.cos) // size + len(self.cu_seqlens)
            self._tiles[size] = self.cu_seqlens.new_zeros(most, 3)
            self._write(size)
        return self._tiles[size]

    def fill(self, row: PackedRow) -> None:
        """Takes the rotation and the borders of a row."""
        length = len(row.cos)
        self.cos[:length], self.sin[:length] = row.cos, row.sin
        self.starts = (*row.starts, len(self.cos)) if length < len(self.cos) else row.starts
        for size in self._tiles:
            self._write(size)

    def _write(self, size: int) -> None:
        tiles, listed = self._tiles[size], self._listed(size)
        padded = torch.nn.functional.pad(listed, (0, 0, 0, len(tiles) - len(listed)))
        tiles.copy_(to_device(padded, tiles.device))

"""A row: several texts one after the other, without padding, none of which sees another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qlora_harness.fused.host_memory import to_device


@dataclass
class Rotation:
    """How the tokens of a row are rotated by their positions.

    Attributes:
        cos: Rotary cosines of each token, [T, D]; both halves are equal.
        sin: Rotary sines, [T, D]; likewise.
    """

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass
class Row(Rotation):
    """Where the texts of a row lie.

    Attributes:
        borders: First token of each text and the end of the last, [N + 1] int32, on the device.
        starts: The same on the host.
        longest: Tokens of the longest text.
    """

    borders: torch.Tensor
    starts: tuple[int, ...]
    longest: int
    _tiles: dict[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def tiles(self, size: int) -> torch.Tensor:
        """The texts cut into tiles, made once.

        The longest texts come first, and of each the last tile, which sees most: what takes long
        starts early, and the tiles of a text meet in the cache.

        Args:
            size: Tokens of a tile; the last of a text may have fewer.

        Returns:
            [tiles, 3] int32 on the device: first token of the text in the row, tokens of the
            text, and first token of the tile in the text.
        """
        if size not in self._tiles:
            texts = [(b - a, a) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
            found = [
                (start, length, first)
                for length, start in sorted(texts, reverse=True)
                for first in reversed(range(0, length, size))
            ]
            tiles = torch.tensor(found, dtype=torch.int32).view(-1, 3)
            self._tiles[size] = to_device(tiles, self.cos.device)
        return self._tiles[size]

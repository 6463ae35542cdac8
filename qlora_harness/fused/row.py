"""A row: several texts one after the other, without padding, none of which sees another."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Rotation:
    """How the tokens of a row are rotated by their positions.

    Attributes:
        cos: Rotary cosines of each token, [T, D].
        sin: Rotary sines, [T, D].
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

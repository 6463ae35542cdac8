"""The sizes of a decoder that the memory of a training run depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes in elements, counts of parameters."""

    hidden: int
    inner: int  # of the MLP
    queries: int  # query heads times head size
    keys: int  # key heads times head size
    layers: int
    vocabulary: int  # rows of the output head
    linear: int  # parameters of the linear layers, which a 4-bit base holds in 4 bits
    largest: int  # parameters of the largest of them
    others: int  # all other parameters
    sides: int  # in- and output sizes of the linear layers that get an adapter, summed
    adapted: float  # adapters in a layer
    fused: bool  # whether it can have fused layers
    head_norms: bool  # whether heads of queries and keys are normalised, which keeps both twice

"""The sizes of a decoder that decide how much memory training takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes in elements; counts of parameters."""

    hidden: int
    inner: int  # of the MLP
    queries: int  # query heads times head size
    keys: int  # key heads times head size
    layers: int
    vocabulary: int  # rows of the output head
    linear: int  # parameters of the linear layers, all but the head, which are quantised
    rows: int  # outputs of these, all together
    largest: int  # parameters of the largest of these
    others: int  # all other parameters
    sides: int  # input plus output sizes of all linear layers with an adapter
    outputs: int  # output sizes of these
    adapted: float  # adapters per layer
    fused: bool  # whether the model can have fused layers
    head_norms: bool  # whether query and key heads are normalised, so that each is saved twice

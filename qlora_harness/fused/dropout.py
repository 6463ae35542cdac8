"""Dropout on the inputs of LoRA: masks of groups of adapters, and the products that they enter.

Each adapter of a group has a mask of its own on the one input, as PEFT has a module for each. The
masks of a layer are drawn at once from a seed, and anew in the backward pass. With Triton they are
bits, and no input without its dropped elements is written down: each product reads the input and
the bits. Elsewhere a few lines of torch do the same, and the tests compare both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_harness.fused import triton_dropout, triton_ops


@dataclass(frozen=True)
class Masks:
    """What each adapter of a group sees of one input.

    Attributes:
        kept: [adapters, T, K] bool; or packed, as from `triton_dropout.draw`.
        factor: 1 / (1 - p), of what is kept.
    """

    kept: torch.Tensor
    factor: float

    @property
    def packed(self) -> bool:
        """Whether the kernels can take them."""
        return self.kept.dtype == torch.uint8


def packs(rank: int, like: torch.Tensor) -> bool:
    """Whether masks for such tensors may be packed, for the kernels.

    Args:
        rank: Of the adapters.
        like: Has the dtype and the device of the inputs.
    """
    return triton_ops.usable(like) and triton_dropout.fits(rank, like)


def draw(
    shapes: Sequence[tuple[int, int, int]],
    probability: float,
    seed: int,
    device: torch.device,
    *,
    packed: bool,
) -> list[Masks]:
    """Draws masks; the same arguments give the same.

    Args:
        shapes: Of each input: adapters, T, K.
        probability: Of dropping an element, p.
        seed: 0 to 2**62.
        device: Of the masks.
        packed: Whether `packs` says so for all of them.
    """
    factor = 1.0 / (1.0 - probability)
    if packed:
        drawn = triton_dropout.draw(shapes, probability, seed, device)
        return [Masks(bits, factor) for bits in drawn]
    generator = torch.Generator(device)
    found = []
    for shape in shapes:
        kept = torch.empty(shape, dtype=torch.bool, device=device)
        for mask in kept:
            generator.manual_seed(seed)
            mask.bernoulli_(1.0 - probability, generator=generator)
            seed += 1
        found.append(Masks(kept, factor))
    return found


def products(
    x: torch.Tensor, down: torch.Tensor, masks: Masks, beside: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns h, drop_i(x) A_i^T of all adapters side by side, [T, R].

    Args:
        x: [T, K].
        down: The adapters' A, with any factor, one below the other, [R, K].
        masks: Of the adapters.
        beside: Gets the same, [T, R].
    """
    if masks.packed:
        return triton_dropout.products(x, down, masks.kept, masks.factor, beside)
    pairs = zip(masks.kept, down.chunk(len(masks.kept)), strict=True)
    inner = torch.cat([(x * kept) @ part.t() for kept, part in pairs], dim=1) * masks.factor
    if beside is not None:
        beside.copy_(inner)
    return inner


def add_products(
    gradient: torch.Tensor, d_inner: torch.Tensor, down: torch.Tensor, masks: Masks
) -> None:
    """Adds what reaches an input through the adapters, sum_i drop_i(dh_i A_i).

    Args:
        gradient: Of the input, [T, K]; added to in place.
        d_inner: Of h, [T, R].
        down: As in `products`.
        masks: As in `products`.
    """
    if masks.packed:
        triton_dropout.add_products(gradient, d_inner, down, masks.kept, masks.factor)
        return
    count = len(masks.kept)
    parts = zip(masks.kept, d_inner.chunk(count, dim=1), down.chunk(count), strict=True)
    gradient += sum((inner @ part) * kept for kept, inner, part in parts) * masks.factor


def gradients(
    d_inner: torch.Tensor, x: torch.Tensor, masks: Masks, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the gradients of the adapters' A, s dh_i^T drop_i(x), one below the other, [R, K].

    Args:
        d_inner: Of h, [T, R].
        x: [T, K].
        masks: As in `products`.
        scale: s.
        dtype: Of the gradients.
    """
    factor = scale * masks.factor
    if masks.packed:
        return triton_dropout.gradients(d_inner, x, masks.kept, factor).to(dtype)
    pairs = zip(masks.kept, d_inner.chunk(len(masks.kept), dim=1), strict=True)
    return (torch.cat([part.t() @ (x * kept) for kept, part in pairs]) * factor).to(dtype)

"""Dropout on the inputs of LoRA: masks of groups of adapters, and the products that they enter.

Each adapter of a group has a mask of its own on the one input, as PEFT has a module for each. The
masks of a layer are drawn at once from a seed, and anew in the backward pass. In Triton
(`triton_dropout`) they are bits, and no input without its dropped elements is written down: each
product reads the input and the bits. Elsewhere a few lines of torch do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_harness.fused.launch import usable


@dataclass(frozen=True)
class Masks:
    """Which elements of one input each adapter of a group sees."""

    keep: Tensor  # [adapters, T, K] bool; or packed into bits, from `triton_dropout.draw`
    factor: float  # 1 / (1 - p), of the elements that stay

    @property
    def packed(self) -> bool:
        """Whether the kernels can take them."""
        return self.keep.dtype == torch.uint8


def can_pack(rank: int, like: Tensor) -> bool:
    """Whether the kernels take masks of adapters of a rank, on inputs such as `like`."""
    if not usable(like):
        return False
    from qlora_harness.fused import triton_dropout

    return triton_dropout.tilings(rank, like) is not None


def draw(
    shapes: Sequence[tuple[int, int, int]],
    probability: float,
    seed: int,
    device: torch.device,
    *,
    packed: bool,
) -> list[Masks]:
    """Draws the masks of each (adapters, T, K); the same arguments give the same.

    An element is dropped with the probability; the seed is below 2**62. `packed` is right where
    `can_pack` says so for all of them.
    """
    factor = 1.0 / (1.0 - probability)
    if packed:
        from qlora_harness.fused import triton_dropout

        drawn = triton_dropout.draw(shapes, probability, seed, device)
        return [Masks(bits, factor) for bits in drawn]
    generator = torch.Generator(device)
    masks = []
    for shape in shapes:
        keep = torch.empty(shape, dtype=torch.bool, device=device)
        for mask in keep:
            generator.manual_seed(seed)
            mask.bernoulli_(1.0 - probability, generator=generator)
            seed += 1
        masks.append(Masks(keep, factor))
    return masks


def products(x: Tensor, down: Tensor, masks: Masks, beside: Tensor | None = None) -> Tensor:
    """Returns h, drop_i(x) A_i^T of all adapters side by side, [T, R]; writes it to `beside` too.

    x is [T, K]; `down` is the adapters' A with any factor, one below the other, [R, K].
    """
    if masks.packed:
        from qlora_harness.fused import triton_dropout

        return triton_dropout.products(x, down, masks.keep, masks.factor, beside)
    pairs = zip(masks.keep, down.chunk(len(masks.keep)), strict=True)
    inner = torch.cat([(x * keep) @ part.t() for keep, part in pairs], dim=1) * masks.factor
    if beside is not None:
        beside.copy_(inner)
    return inner


def add_products(gradient: Tensor, d_inner: Tensor, down: Tensor, masks: Masks) -> None:
    """Adds sum_i drop_i(dh_i A_i), what reaches an input through the adapters, to its gradient.

    `gradient` is [T, K] and `d_inner`, that of h, [T, R]; `down` is as in `products`.
    """
    if masks.packed:
        from qlora_harness.fused import triton_dropout

        triton_dropout.add_products(gradient, d_inner, down, masks.keep, masks.factor)
        return
    count = len(masks.keep)
    parts = zip(masks.keep, d_inner.chunk(count, dim=1), down.chunk(count), strict=True)
    gradient += sum((inner @ part) * keep for keep, inner, part in parts) * masks.factor


def gradients(d_inner: Tensor, x: Tensor, masks: Masks, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns the gradients of the adapters' A, s dh_i^T drop_i(x), one below the other, [R, K]."""
    factor = scale * masks.factor
    if masks.packed:
        from qlora_harness.fused import triton_dropout

        return triton_dropout.gradients(d_inner, x, masks.keep, factor).to(dtype)
    pairs = zip(masks.keep, d_inner.chunk(len(masks.keep), dim=1), strict=True)
    return (torch.cat([part.t() @ (x * keep) for keep, part in pairs]) * factor).to(dtype)

"""Dropout on the inputs of LoRA: the masks, and the products with masked inputs.

Each adapter of a group has its own mask on the shared input, as in PEFT. A layer draws all its
masks at once from a seed, and draws them again in the backward pass. In Triton (`triton_dropout`)
masks are packed into bits, and products read input and bits, so that no masked input is stored.
Elsewhere plain torch does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_harness.fused.launch import usable


@dataclass(frozen=True)
class Masks:
    """The elements of one input that each adapter of a group sees."""

    keep: Tensor  # [adapters, T, K] bool; or packed into bits, from `triton_dropout.draw`
    factor: float  # 1 / (1 - p), applied to the elements that stay

    @property
    def packed(self) -> bool:
        """Whether the masks are bits for the kernels."""
        return self.keep.dtype == torch.uint8


def can_pack(rank: int, like: Tensor) -> bool:
    """Whether the kernels support adapters of a rank on inputs such as `like`."""
    if not usable(like):
        return False
    from qlora_harness.fused import triton_dropout

    return triton_dropout.tilings(rank, like) is not None


def draw(
    shapes: Sequence[tuple[int, int, int]],
    probability: float,
    seed: Tensor,
    device: torch.device,
    *,
    packed: bool,
) -> list[Masks]:
    """Draws masks for each (adapters, T, K), at most four; equal arguments give equal masks.

    `probability` is that of dropping an element. The seed is the first element of a tensor, int64
    and below 2**62. `packed` requires that `can_pack` holds for all inputs, and the seed on the
    device. Packed masks of a longer row begin with those of a shorter one.
    """
    factor = 1.0 / (1.0 - probability)
    if packed:
        from qlora_harness.fused import triton_dropout

        drawn = triton_dropout.draw(shapes, probability, seed, device)
        return [Masks(bits, factor) for bits in drawn]
    generator, number = torch.Generator(device), int(seed[0])
    masks = []
    for shape in shapes:
        keep = torch.empty(shape, dtype=torch.bool, device=device)
        for mask in keep:
            generator.manual_seed(number)
            mask.bernoulli_(1.0 - probability, generator=generator)
            number += 1
        masks.append(Masks(keep, factor))
    return masks


def products(x: Tensor, down: Tensor, masks: Masks, beside: Tensor | None = None) -> Tensor:
    """Returns h, drop_i(x) A_i^T of all adapters side by side, [T, R]; also writes it to `beside`.

    x is [T, K]; `down` stacks the adapters' A, scaled or not, [R, K].
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
    """Adds the adapters' part, sum_i drop_i(dh_i A_i), to the gradient of their input, [T, K].

    `d_inner` is the gradient of h, [T, R]; `down` is as in `products`.
    """
    if masks.packed:
        from qlora_harness.fused import triton_dropout

        triton_dropout.add_products(gradient, d_inner, down, masks.keep, masks.factor)
        return
    count = len(masks.keep)
    parts = zip(masks.keep, d_inner.chunk(count, dim=1), down.chunk(count), strict=True)
    gradient += sum((inner @ part) * keep for keep, inner, part in parts) * masks.factor


def gradients(d_inner: Tensor, x: Tensor, masks: Masks, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns the stacked gradients of the adapters' A, s dh_i^T drop_i(x), [R, K]."""
    factor = scale * masks.factor
    if masks.packed:
        from qlora_harness.fused import triton_dropout

        return triton_dropout.gradients(d_inner, x, masks.keep, factor).to(dtype)
    pairs = zip(masks.keep, d_inner.chunk(len(masks.keep), dim=1), strict=True)
    return (torch.cat([part.t() @ (x * keep) for keep, part in pairs]) * factor).to(dtype)

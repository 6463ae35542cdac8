"""Launches the Triton kernels of `dropout`; importable where there is no Triton.

Each function does what its namesake in `dropout` does in plain torch, on packed masks. Long sums
are divided into shares, so that narrow results occupy the device; the shares are summed in a fixed
order, and reruns agree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from qlora_harness.fused.triton_ops import launch, power_of_two

_BYTES = 512  # of a mask, drawn by a program
_COLUMNS = 64  # of a tile; 8 tiles share their bytes
_SUM_ROWS = 8
_PROGRAMS = 528  # four for each multiprocessor of an H100
_LEAST = 8  # steps of a share; to sum more shares takes longer than it saves


class Tiling(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        rows: Of a tile.
        warps: Of a program.
        stages: Loads of the loop under way at once.
    """

    rows: int
    warps: int
    stages: int


# From the fastest on an H100, for 4,617 tokens, widths of 4,096 and 11,008 and a rank of 64, to
# those for other ranks, dtypes and devices, which have less shared memory for a tile.
PRODUCT = Tiling(64, 4, 3), Tiling(64, 4, 2), Tiling(32, 4, 2), Tiling(32, 4, 1)
ADD = Tiling(64, 4, 1), Tiling(32, 4, 1)
GRADIENT = Tiling(128, 4, 3), Tiling(64, 4, 3), Tiling(64, 4, 2), Tiling(32, 4, 2), Tiling(32, 4, 1)
_LARGEST_RANK = 256


class _Tilings(NamedTuple):
    """One for each kernel."""

    product: Tiling
    add: Tiling
    gradient: Tiling


def fits(rank: int, like: torch.Tensor) -> bool:
    """Whether a device has the shared memory that the kernels take.

    Args:
        rank: Of the adapters.
        like: Gives dtype and device.
    """
    return _tilings(_block(rank), like.element_size(), like.get_device()) is not None


def _chosen(rank: int, like: torch.Tensor) -> _Tilings:
    """The tilings where `fits` holds."""
    tilings = _tilings(_block(rank), like.element_size(), like.get_device())
    assert tilings is not None
    return tilings


@lru_cache(maxsize=64)
def _tilings(rank: int, size: int, device: int) -> _Tilings | None:
    """The first tilings that fit a device, -1 for none; None where a kernel has none."""
    if rank > _LARGEST_RANK:
        return None
    room = sys.maxsize
    if device >= 0:
        properties = torch.cuda.get_device_properties(device)
        room = getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
        )
    kernels = (PRODUCT, _product_bytes), (ADD, _add_bytes), (GRADIENT, _gradient_bytes)
    found = [
        next((tiling for tiling in tilings if needed(tiling, rank, size) <= room), None)
        for tilings, needed in kernels
    ]
    product, add, gradient = found
    if product is None or add is None or gradient is None:
        return None
    return _Tilings(product, add, gradient)


# The most shared memory that a kernel takes, bytes; `size` is that of an element.


def _product_bytes(tiling: Tiling, rank: int, size: int) -> int:
    rows, stages = tiling.rows, tiling.stages
    return (stages * (rows + rank) + rows) * _COLUMNS * size + rows * _COLUMNS


def _add_bytes(tiling: Tiling, rank: int, size: int) -> int:
    return (tiling.rows + _COLUMNS) * rank * size + tiling.rows * _COLUMNS


def _gradient_bytes(tiling: Tiling, rank: int, size: int) -> int:
    rows, stages = tiling.rows, tiling.stages
    return (stages * (rank + _COLUMNS) + _COLUMNS) * rows * size + rows * _COLUMNS


def draw(
    shapes: Sequence[tuple[int, int, int]], probability: float, seed: int, device: torch.device
) -> list[torch.Tensor]:
    """Draws packed masks, of each shape one [adapters, T, 64 ceil(K / 512)] uint8.

    The 8 bits of byte 64 g + c of a row, from the lowest, are those of columns 512 g + 64 j + c.

    Philox-4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) gives 16 bits to an element, so
    the probability is rounded to a multiple of 2**-16.

    Args:
        shapes: Adapters, T and K of each.
        probability: Of dropping an element.
        seed: 0 to 2**63 - 1.
        device: Of the masks.
    """
    from qlora_harness.fused.dropout_kernels import draw_kernel

    sizes = [(n, rows, -(-k // (8 * _COLUMNS)) * _COLUMNS) for n, rows, k in shapes]
    counts = [prod(size) for size in sizes]
    bits = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    assert len(bits) < 2**31  # the kernel counts in 32 bits
    arguments = bits, seed, round(probability * 2**16), len(bits)
    launch(draw_kernel, (-(-len(bits) // _BYTES), 1, 1), arguments, _BYTES)
    parts = zip(torch.split(bits, counts), sizes, strict=True)
    return [part.view(size) for part, size in parts]


def products(
    x: torch.Tensor,
    down: torch.Tensor,
    bits: torch.Tensor,
    factor: float,
    beside: torch.Tensor | None,
) -> torch.Tensor:
    """Namesake of `dropout.products`."""
    from qlora_harness.fused.dropout_kernels import product_kernel, sum_kernel

    adapters, rows, bytes_in_row = bits.shape
    columns, border = x.shape[1], len(down)
    rank = border // adapters
    assert x.stride(1) == down.stride(1) == 1
    m, warps, stages = _chosen(rank, x).product
    tiles = -(-rows // m)
    share, splits = _shares(-(-columns // _COLUMNS), 1, tiles * adapters)
    parts = x.new_empty(splits, rows, border, dtype=torch.float32)
    launch(
        *(product_kernel, (adapters, tiles, splits)),
        (
            *(x, x.stride(0), down, down.stride(0), bits, parts, rows, columns, bytes_in_row),
            *(share, rank, factor),
        ),
        *(m, _block(rank), _precision(x)),
        num_warps=warps,
        num_stages=stages,
    )
    out = x.new_empty(rows, border)
    other = out if beside is None else beside
    arguments = parts, out, other, other.stride(0), rows, border, splits
    launch(sum_kernel, (-(-rows // _SUM_ROWS), 1, 1), arguments, _SUM_ROWS, _block(border))
    return out


def add_products(
    gradient: torch.Tensor,
    d_inner: torch.Tensor,
    down: torch.Tensor,
    bits: torch.Tensor,
    factor: float,
) -> None:
    """Namesake of `dropout.add_products`."""
    from qlora_harness.fused.dropout_kernels import add_kernel

    adapters, rows, bytes_in_row = bits.shape
    columns, rank = gradient.shape[1], len(down) // adapters
    assert gradient.stride(1) == d_inner.stride(1) == down.stride(1) == 1
    m, warps, stages = _chosen(rank, gradient).add
    launch(
        *(add_kernel, (-(-columns // _COLUMNS), -(-rows // m), 1)),
        (
            *(gradient, gradient.stride(0), d_inner, d_inner.stride(0), down, down.stride(0), bits),
            *(rows, columns, bytes_in_row, rank, factor),
        ),
        *(adapters, m, _block(rank), _precision(gradient)),
        num_warps=warps,
        num_stages=stages,
    )


def gradients(
    d_inner: torch.Tensor, x: torch.Tensor, bits: torch.Tensor, factor: float
) -> torch.Tensor:
    """Namesake of `dropout.gradients`, in float32."""
    from qlora_harness.fused.dropout_kernels import gradient_kernel

    adapters, rows, bytes_in_row = bits.shape
    columns, border = x.shape[1], d_inner.shape[1]
    rank = border // adapters
    assert x.stride(1) == d_inner.stride(1) == 1
    m, warps, stages = _chosen(rank, x).gradient
    tiles = -(-columns // _COLUMNS)
    share, splits = _shares(rows, m, tiles * adapters)
    parts = x.new_empty(splits, border, columns, dtype=torch.float32)
    launch(
        *(gradient_kernel, (adapters, tiles, splits)),
        (
            *(d_inner, d_inner.stride(0), x, x.stride(0), bits, parts, rows, columns, bytes_in_row),
            *(share, rank, factor),
        ),
        *(m, _block(rank), _precision(x)),
        num_warps=warps,
        num_stages=stages,
    )
    return parts.sum(0) if splits > 1 else parts[0]


def _shares(length: int, step: int, programs: int) -> tuple[int, int]:
    """How long each share of a sum is, a multiple of `step`, and how many there are."""
    steps = -(-length // step)
    share = max(_LEAST, -(-steps // max(1, _PROGRAMS // max(1, programs)))) * step
    return share, -(-length // share)


def _block(number: int) -> int:
    """The next power of two that a product of tiles can take."""
    return max(16, power_of_two(number))


def _precision(x: torch.Tensor) -> str:
    """Of products: float32 stays float32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"

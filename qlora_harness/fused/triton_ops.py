"""Launches the Triton kernels of fused layers; importable where there is no Triton.

Each function does what its namesake in `ops` or `bordered` does in plain torch; the tests compare
both in Triton's interpreter, and on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

_BLOCK = 64  # weights that share a scale, as base models are quantised here
_NESTED_BLOCK = 256  # scales that share a scale
_CHUNK = 2048  # weights of a row that one program of `load_kernel` expands
_LOAD_WARPS = 2  # of a program; the fastest of 2, 4 and 8 on an H100
_SWIGLU_BLOCK = 1024
_LOGITS_BLOCK = 8192  # of a row, read at once


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def usable(x: torch.Tensor) -> bool:
    """Whether the kernels can work on a tensor.

    Args:
        x: Any.
    """
    return x.is_cuda and _has_triton()


_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    *constants: Any,
    **options: Any,
) -> None:
    """Launches a kernel, looking only once at how it must be compiled.

    Triton compiles for dtypes, for numbers, and for addresses that are multiples of 16 or not, and
    looks at all of that at every launch; here one look-up finds what it compiled before.

    Args:
        kernel: Of a module, so that its `id` stays its own.
        grid: Programs.
        arguments: Tensors and numbers, in the kernel's order.
        constants: What is fixed when compiling, in the kernel's order behind the arguments.
        options: Of the compiler.
    """
    # The kernel's own hash takes longer than all else here.
    key: list[Any] = [id(kernel), *constants, *options.values()]
    values: list[Any] = []
    addresses = 0  # the bits that any has
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            address = argument.data_ptr()
            addresses |= address
            values.append(address)
            key.append(argument.dtype)
        else:
            values.append(argument)
            key.append(_kind(argument) if isinstance(argument, int) else type(argument))
    key.append(next(a for a in arguments if isinstance(a, torch.Tensor)).get_device())
    place, aligned = tuple(key), addresses % 16 == 0
    compiled = _compiled.get(place)
    if compiled is not None and aligned:
        compiled[grid](*values, *constants)
        return
    compiled = kernel[grid](*arguments, *constants, **options)
    if compiled is not None and aligned:  # None in the interpreter
        _compiled[place] = compiled


def _kind(number: int) -> tuple[bool, bool, bool]:
    """What Triton compiles an integer for."""
    return number == 1, number % 16 == 0, number < 2**31


class Loader:
    """Fills a bordered matrix: expands 4-bit weights, copies adapters.

    Args:
        group: `bordered.Bordered`.
        states: bitsandbytes' QuantState of each weight, None where it is not 4-bit.

    Attributes:
        fits: Whether the kernel can expand such weights.
    """

    def __init__(self, group: Any, states: Sequence[Any]) -> None:
        self.fits = _expandable([p.layer.weight for p in group.projections], states)
        if not self.fits:
            return
        first = states[0]
        expand = first is not None
        nested = expand and first.nested
        missing = 3 - len(states)
        # Whatever is not there is given another tensor of the same dtype, and is never read.
        self._weights: list[Any] = []
        for projection, state in zip(group.projections, states, strict=True):
            if expand:
                outer = [state.state2.absmax, state.offset] if nested else [state.code] * 2
                self._weights += [projection.layer.weight, state.absmax, *outer]
        self._weights += self._weights[:4] * missing
        if expand:
            self._weights += [first.code, first.state2.code if nested else first.code]
        some = [(p.down, p.up) for p in group.projections if p.down is not None]
        pairs = [
            (p.down, p.up) if p.down is not None else some[0] if some else None
            for p in group.projections
        ]
        pairs += pairs[:1] * missing
        self._adapters = [part for pair in pairs if pair is not None for part in pair]
        rows = group.height + group.border
        self._grid = (rows, -(-group.width // _CHUNK) if expand else 1, 1)
        self._numbers = (
            group.stride,
            group.width,
            group.border,
            group.heights[0],
            sum(group.heights[:2]),
            group.height,
            float(group.scale),
        )
        places = [-1 if place is None else place for place in group.places] + [-1] * missing
        border = power_of_two(max(group.border, 1))
        self._constants = (*places, group.rank, border, expand, nested, _CHUNK // _BLOCK)

    def __call__(self, matrix: torch.Tensor) -> None:
        """Fills a matrix.

        Args:
            matrix: M with its unused columns, [N + R, stride], contiguous.
        """
        from qlora_harness.fused.triton_kernels import load_kernel

        weights, adapters = self._weights or [matrix] * 14, self._adapters or [matrix] * 6
        arguments = [*weights, *adapters, matrix, *self._numbers]
        # Scale times scale plus offset in two roundings, as bitsandbytes computes it.
        launch(
            *(load_kernel, self._grid, arguments, *self._constants),
            enable_fp_fusion=False,
            num_warps=_LOAD_WARPS,
        )


def _expandable(weights: Sequence[torch.Tensor], states: Sequence[Any]) -> bool:
    if len(states) > 3:
        return False
    if all(state is None for state in states):
        return True
    first = states[0]
    return all(
        state is not None
        and weight.dtype == torch.uint8
        and state.blocksize == _BLOCK
        and state.shape[1] % _BLOCK == 0
        and state.quant_type == first.quant_type
        and state.nested == first.nested
        and (not state.nested or state.state2.blocksize == _NESTED_BLOCK)
        for weight, state in zip(weights, states, strict=True)
    )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, add: torch.Tensor | None
) -> torch.Tensor:
    """Namesake of `ops.rms_norm`."""
    from qlora_harness.fused.triton_kernels import rms_norm_kernel

    assert x.is_contiguous() and (add is None or add.is_contiguous())
    rows, columns = x.shape
    total = x if add is None else torch.empty_like(x)
    block = power_of_two(columns)
    added = x if add is None else add
    arguments = (x, added, weight, total, out, out.stride(0), columns, eps)
    launch(
        *(rms_norm_kernel, (rows, 1, 1), arguments, add is not None, block),
        num_warps=_warps(block),
    )
    return total


def rms_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    add: torch.Tensor | None,
) -> None:
    """Namesake of `ops.rms_norm_backward`."""
    from qlora_harness.fused.triton_kernels import rms_norm_backward_kernel

    assert x.is_contiguous()
    rows, columns = x.shape
    block = power_of_two(columns)
    added = x if add is None else add
    arguments = (
        *(gradient, gradient.stride(0), x, weight, added, added.stride(0)),
        *(out, out.stride(0), columns, eps),
    )
    launch(
        *(rms_norm_backward_kernel, (rows, 1, 1), arguments, add is not None, block),
        num_warps=_warps(block),
    )


def copy(source: torch.Tensor, out: torch.Tensor) -> None:
    """Namesake of `ops.copy`."""
    from qlora_harness.fused.triton_kernels import copy_kernel

    rows, columns = source.shape
    block = power_of_two(columns)
    at_once = max(1, 4096 // block)
    arguments = source, out, out.stride(0), rows, columns
    launch(copy_kernel, (-(-rows // at_once), 1, 1), arguments, at_once, block)


def swiglu(gates: torch.Tensor, out: torch.Tensor) -> None:
    """Namesake of `ops.swiglu`."""
    from qlora_harness.fused.triton_kernels import swiglu_kernel

    rows, columns = out.shape
    grid = rows, -(-columns // _SWIGLU_BLOCK), 1
    launch(swiglu_kernel, grid, (gates, out, out.stride(0), columns), _SWIGLU_BLOCK)


def swiglu_backward(gates: torch.Tensor, gradient: torch.Tensor) -> None:
    """Namesake of `ops.swiglu_backward`."""
    from qlora_harness.fused.triton_kernels import swiglu_backward_kernel

    rows, columns = gradient.shape
    grid = rows, -(-columns // _SWIGLU_BLOCK), 1
    arguments = gates, gradient, gradient.stride(0), columns
    launch(swiglu_backward_kernel, grid, arguments, _SWIGLU_BLOCK)


def rotate(projected: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Namesake of `ops.rotate`."""
    from qlora_harness.fused.triton_kernels import rotate_kernel

    size = cos.shape[1]
    arguments = projected, projected.stride(0), cos, sin, heads
    constants = size, power_of_two(size // 2), power_of_two(heads)
    launch(rotate_kernel, (len(projected), 1, 1), arguments, *constants)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
    """Turns logits into the gradients of their cross-entropies, softmax less one-hot.

    Args:
        logits: [R, V], contiguous; overwritten.
        targets: [R] int64, each from 0 to V - 1.
        losses: [R] float32, written: the cross-entropies, nats.
    """
    from qlora_harness.fused.triton_kernels import cross_entropy_kernel

    rows, columns = logits.shape
    block = min(_LOGITS_BLOCK, power_of_two(columns))
    arguments = logits, targets, losses, columns
    launch(cross_entropy_kernel, (rows, 1, 1), arguments, block, num_warps=_warps(block))


def power_of_two(number: int) -> int:
    """Returns the next power of two, as tiles have.

    Args:
        number: At least 1.
    """
    return 1 << (number - 1).bit_length()


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))

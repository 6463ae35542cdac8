"""How a Triton kernel is launched, and where one can be. Importable where there is no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None
_compiled: dict[Any, Any] = {}


def usable(x: Tensor) -> bool:
    """Whether Triton kernels can work on a tensor."""
    return x.is_cuda and _HAS_TRITON


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    *constants: Any,
    **options: Any,
) -> None:
    """Launches a kernel of a module; `constants` are its constexpr parameters, behind the others.

    Triton compiles for dtypes, for numbers, and for addresses that are multiples of 16 or not, and
    looks at all of that at every launch. Here one look-up returns what it compiled before.
    """
    # By id, since the kernel's own hash takes longer than all else here.
    key: list[Any] = [id(kernel), *constants, *options.values()]
    values: list[Any] = []
    addresses = 0  # all bits that are set in any address
    for argument in arguments:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            addresses |= address
            values.append(address)
            key.append(argument.dtype)
        else:
            values.append(argument)
            key.append(_kind(argument) if isinstance(argument, int) else type(argument))
    key.append(next(a for a in arguments if isinstance(a, Tensor)).get_device())
    entry, aligned = tuple(key), addresses % 16 == 0
    compiled = _compiled.get(entry)
    if compiled is not None and aligned:
        compiled[grid](*values, *constants)
        return
    compiled = kernel[grid](*arguments, *constants, **options)
    if compiled is not None and aligned:  # None in the interpreter
        _compiled[entry] = compiled


def _kind(number: int) -> tuple[bool, bool, bool]:
    """What Triton compiles an integer for."""
    return number == 1, number % 16 == 0, number < 2**31


def power_of_two(number: int) -> int:
    """Returns the next power of two, which tiles take."""
    return 1 << (number - 1).bit_length()

"""Launches Triton kernels. Importable without Triton."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None
_compiled: dict[Any, Any] = {}


def usable(x: Tensor) -> bool:
    """Whether Triton kernels can run on a tensor."""
    return x.is_cuda and _HAS_TRITON


@cache
def hash_triton_ahead() -> None:
    """Starts to hash Triton's files in a thread.

    Triton's cache needs the hash for the first kernel, and it takes seconds on a slow disk.
    """
    if _HAS_TRITON:
        threading.Thread(target=_hash_triton, name="qlora_harness hash", daemon=True).start()


def _hash_triton() -> None:
    with suppress(ImportError, OSError):  # which the first kernel raises again
        for module in ("triton.runtime.cache", "triton.compiler.compiler"):  # the latter up to 3.4
            compute = getattr(import_module(module), "triton_key", None)
            if compute is not None:
                compute()  # remembers its result
                return


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    *constants: Any,
    **options: Any,
) -> None:
    """Launches a kernel; `constants` are its constexpr parameters, which come last.

    Triton specialises a kernel on dtypes, integers and the alignment of addresses, and analyses
    them at every launch. This finds the compiled kernel with one look-up. The first argument is a
    tensor; the others are tensors, their descriptors, integers and floating-point numbers.
    """
    # The kernel's id, since its hash takes longer than everything else here.
    key: list[Any] = [id(kernel), arguments[0].get_device(), *constants, *options.values()]
    values: list[Any] = []
    addresses = 0  # bitwise or
    for argument in arguments:
        kind = type(argument)  # faster than isinstance, which asks the metaclass of tensors
        if kind is int:
            values.append(argument)
            key.append(_kind(argument))
        elif kind is float:
            values.append(argument)
            key.append(kind)
        elif hasattr(argument, "block_shape"):  # Triton's TensorDescriptor
            values.append(argument)
            key += (argument.base.dtype, *argument.block_shape)
        else:
            address = argument.data_ptr()
            addresses |= address
            values.append(address)
            key.append(argument.dtype)
    entry, aligned = tuple(key), addresses % 16 == 0
    compiled = _compiled.get(entry)
    if compiled is not None and aligned:
        compiled[grid](*values, *constants)
        return
    compiled = kernel[grid](*arguments, *constants, **options)
    if compiled is not None and aligned:  # None in the interpreter
        _compiled[entry] = compiled


@lru_cache(maxsize=4096)
def _kind(number: int) -> tuple[bool, bool, bool]:
    """Returns what Triton specialises on in an integer."""
    return number == 1, number % 16 == 0, number < 2**31


def power_of_two(number: int) -> int:
    """Rounds up to a power of two, as the sizes of tiles must be."""
    return 1 << (number - 1).bit_length()

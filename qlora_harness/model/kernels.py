"""Whether Liger's kernels are at hand."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec


@lru_cache(maxsize=1)
def has_liger() -> bool:
    """Whether liger-kernel is installed."""
    return find_spec("liger_kernel") is not None

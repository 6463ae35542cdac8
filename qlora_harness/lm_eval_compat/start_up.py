"""Shortens what bitsandbytes and transformers do on import, in commands that score with our model.

bitsandbytes loads torch's compiler, which takes a second, for decorators of functions that scoring
doesn't call. transformers reads the source of all its models, which takes a quarter of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILES = "bitsandbytes.backends.default.ops"
SCANS = "transformers.utils.import_utils"


@contextmanager
def compiling_later() -> Iterator[None]:
    """Lets torch.compile, as a decorator, import torch's compiler at the function's first call."""
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return partial(compile_later, **options)
        compiled: list[Any] = []

        @wraps(function)
        def called(*args: Any, **more: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*args, **more)

        return called

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def scan_once(import_utils: ModuleType) -> None:
    """Makes transformers take the index of its models from a cache."""
    name = "create_import_structure_from_path"
    scan = getattr(import_utils, name, None)
    if scan is None:  # another release
        return
    models = Path(str(import_utils.__file__)).parents[1] / "models"

    def from_cache(path: Any) -> Any:
        if Path(path) not in (models, models / "__init__.py"):
            return scan(path)
        from qlora_harness.lm_eval_compat.index_cache import cached_structure

        return cached_structure(models, lambda: scan(path))

    setattr(import_utils, name, from_cache)

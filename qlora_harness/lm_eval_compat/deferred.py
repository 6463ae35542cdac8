"""Defers what lm_eval, transformers and bitsandbytes do on import, but our tasks don't need.

On import, bitsandbytes loads torch's compiler, which takes a second. transformers scans its models,
and lm_eval imports datasets and pandas, which takes a quarter of a second each. While a module in
`DEFERRED` is executed, a stand-in takes the place of a library, which is imported on first use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any


class _Later:
    """A name in a library, which is imported when this is called or an attribute is read."""

    def __init__(self, library: str, name: str) -> None:
        self._library, self._name = library, name

    def _itself(self) -> Any:
        library = import_module(self._library)
        if isinstance(library, _StandIn):
            raise ImportError(f"{self._library} is needed at once")
        return getattr(library, self._name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._itself()(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._itself(), name)


class _StandIn(ModuleType):
    """A library for modules that import it while it is deferred."""

    deferred = True

    def __getattr__(self, name: str) -> Any:
        if self.deferred:
            return _Later(self.__name__, name)
        return getattr(import_module(self.__name__), name)


@contextmanager
def _without(library: str) -> Iterator[None]:
    """Puts stand-ins in the place of a library that is installed and not imported yet."""
    parts = library.split(".")
    spec = None if parts[0] in sys.modules else find_spec(parts[0])
    names = [] if spec is None else accumulate(parts, "{}.{}".format)
    stand_ins = [_StandIn(name) for name in names]
    for module in stand_ins:
        module.__path__, module.__spec__ = [], spec
        sys.modules[module.__name__] = module
    try:
        yield
    finally:
        for module in stand_ins:
            del sys.modules[module.__name__]
            module.deferred = False


@contextmanager
def _compiling_later() -> Iterator[None]:
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


@contextmanager
def _scanned_once() -> Iterator[None]:
    """Takes transformers' index of its models from a cache."""
    yield
    utils: Any = sys.modules["transformers.utils.import_utils"]
    scan = utils.create_import_structure_from_path

    def from_cache(path: Any) -> Any:
        folder = Path(path)
        folder = folder.parent if folder.name == "__init__.py" else folder
        if folder != Path(utils.__file__).parents[1] / "models":
            return scan(path)
        from qlora_harness.lm_eval_compat.index_cache import cached_structure

        return cached_structure(folder, lambda: scan(path))

    utils.create_import_structure_from_path = from_cache


# By module. None of them inherits from a class of its library, or checks whether a value is one of
# a class that it imports by name. An entry saves at least 0.2 s, alone or with others.
DEFERRED: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "lm_eval.api.task": partial(_without, "datasets"),
    "lm_eval.loggers.evaluation_tracker": partial(_without, "datasets.utils.metadata"),
    "lm_eval.loggers.wandb_logger": partial(_without, "pandas"),
    "transformers.utils.import_utils": _scanned_once,
    "bitsandbytes.backends.default.ops": _compiling_later,
}

"""Makes a subpackage callable: `qlora_harness.compare(...)` beside `qlora_harness.compare.page`."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package that calls its `_FUNCTION`, "module:name", when it is called."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Imports the function and calls it."""
        module, _, name = self._FUNCTION.partition(":")
        return getattr(import_module(module), name)(*args, **options)


def make_callable(package: str) -> None:
    """Makes the package that is being imported callable.

    A function of the same name would hide the package's modules.
    """
    sys.modules[package].__class__ = CallablePackage

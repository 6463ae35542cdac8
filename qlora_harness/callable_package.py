"""Lets a subpackage be called: `qlora_harness.compare(...)` beside `qlora_harness.compare.page`."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package whose `_FUNCTION`, "module:name", does what calling the package does."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Imports the function and calls it."""
        module, _, name = self._FUNCTION.partition(":")
        return getattr(import_module(module), name)(*args, **options)


def make_callable(package: str) -> None:
    """Makes the package callable that is being imported; a function of its name would hide it."""
    sys.modules[package].__class__ = CallablePackage

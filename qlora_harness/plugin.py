"""Makes `lm_eval` find our model and tasks.

lm-eval 0.4.13 has no plugin discovery; its main branch reads the entry-point group
`lm_eval.models`, which this distribution declares. For releases without discovery it ships a
start-up hook, `qlora_harness_hook.pth`: at interpreter start that adds one finder to sys.meta_path
and imports nothing; when `lm_eval` is imported, it calls `install`. That adds the model to
lm-eval's registry (unless the release discovers plugins itself) and our tasks to its index, and
lets the command read our MMLU files before it loads a model. QLORA_HARNESS_NO_HOOK=1 switches it
off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_NAME = "qlora_adapter"
MODEL_TARGET = "qlora_harness.score.adapter_lm:QloraAdapterLM"
OFF_VARIABLE = "QLORA_HARNESS_NO_HOOK"


def install() -> None:
    """Adds the finder, once, unless QLORA_HARNESS_NO_HOOK is set."""
    if os.environ.get(OFF_VARIABLE, "") not in ("", "0"):
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register_model(models: ModuleType) -> None:
    """Adds the model to lm-eval's registry, lazily and beside the built-in ones.

    Args:
        models: The module lm_eval.models, already executed: registering before it would make the
            registry non-empty, and the built-in models would never be added.
    """
    from lm_eval.api import registry

    discovers_plugins = any("plugin" in name.lower() for name in vars(registry))
    if not discovers_plugins and MODEL_NAME not in registry.model_registry:
        registry.model_registry.register(MODEL_NAME, target=MODEL_TARGET)


def extend_task_index(index_module: ModuleType) -> None:
    """Lets lm-eval's task index hold our tasks as well.

    Args:
        index_module: The module lm_eval.tasks._index, already executed.
    """
    index_class = index_module.TaskIndex
    build = index_class.build

    def build_with_ours(paths: Any, **options: Any) -> Any:
        from qlora_harness.score.task_index import build_index

        return build_index(build, list(paths), options)

    index_class.build = staticmethod(build_with_ours)


def read_files_first(config_module: ModuleType) -> None:
    """Lets the command lm_eval read the MMLU files of asked tasks as soon as it knows the tasks.

    It loads the model in between, and builds the tasks, which need the files, only then. A release
    whose command goes another way reads them with the tasks, as does `simple_evaluate` from Python.

    Args:
        config_module: The module lm_eval.config.evaluate_config, already executed.
    """
    config_class = getattr(config_module, "EvaluatorConfig", None)
    process = getattr(config_class, "process_tasks", None)
    if config_class is None or process is None:
        return

    @wraps(process)
    def process_and_read(config: Any, *args: Any, **options: Any) -> Any:
        from qlora_harness.score.asked_files import read_asked_files

        manager = process(config, *args, **options)
        read_asked_files(config, manager)
        return manager

    config_class.process_tasks = process_and_read


_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "lm_eval.config.evaluate_config": read_files_first,
    "lm_eval.models": register_model,
    "lm_eval.tasks._index": extend_task_index,
}


class _Finder:
    """Finds the modules in `_AFTER` the usual way and acts after they were executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = _AFTER.get(name)
        if action is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, action)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """A loader that calls an action after the module was executed; otherwise the original one."""

    def __init__(self, loader: Any, action: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            self._action(module)
        except Exception as error:  # a harness we don't know must still work without us
            print(
                f"qlora-harness: this lm_eval could not be extended ({error!r}); its own models "
                "and tasks work, ours are missing",
                file=sys.stderr,
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

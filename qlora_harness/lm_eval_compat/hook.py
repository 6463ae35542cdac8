"""Makes `lm_eval` find our model and tasks.

lm-eval 0.4.13 has no plugin discovery; its main branch reads the entry-point group
`lm_eval.models`, which this distribution declares. For releases without it there is a start-up
hook, `qlora_harness_hook.pth`: at interpreter start it adds one finder to sys.meta_path and imports
nothing. When `lm_eval` is imported, it calls `install`. QLORA_HARNESS_NO_HOOK=1 switches it off.
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
    """Adds our model to the registry, unless this release discovers plugins itself.

    Before lm_eval.models is executed this would leave the registry non-empty, and lm_eval would
    never add its own models.
    """
    from lm_eval.api import registry

    discovers_plugins = any("plugin" in name.lower() for name in vars(registry))
    if not discovers_plugins and MODEL_NAME not in registry.model_registry:
        registry.model_registry.register(MODEL_NAME, target=MODEL_TARGET)


def extend_task_index(index_module: ModuleType) -> None:
    """Lets the index that lm_eval builds hold our tasks as well."""
    index_class = index_module.TaskIndex
    build = index_class.build

    def build_with_ours(paths: Any, **options: Any) -> Any:
        from qlora_harness.lm_eval_compat.tasks import build_index

        return build_index(build, list(paths), options)

    index_class.build = staticmethod(build_with_ours)


def read_files_first(config_module: ModuleType) -> None:
    """Lets the command read the MMLU files of its tasks as soon as it knows the tasks.

    lm_eval loads the model in between: a wrong folder would show minutes later.
    """
    config_class = config_module.EvaluatorConfig
    process = config_class.process_tasks

    @wraps(process)
    def process_and_read(config: Any, *args: Any, **options: Any) -> Any:
        from qlora_harness.lm_eval_compat.tasks import read_mmlu_files

        manager = process(config, *args, **options)
        read_mmlu_files(config.tasks, config.metadata or {})
        return manager

    config_class.process_tasks = process_and_read


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "lm_eval.config.evaluate_config": read_files_first,
    "lm_eval.models": register_model,
    "lm_eval.tasks._index": extend_task_index,
}


class _Finder:
    """Finds the modules in `_PATCHES` the usual way, and patches each once it was executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch = _PATCHES.get(name)
        if patch is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, patch)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Another loader, followed by a patch of the module that it executed."""

    def __init__(self, loader: Any, patch: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            self._patch(module)
        except Exception as error:  # noqa: BLE001  # an unknown lm_eval must work without us
            print(
                f"qlora-harness: this lm_eval could not be extended ({error!r}); its own models "
                "and tasks work, ours are missing",
                file=sys.stderr,
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

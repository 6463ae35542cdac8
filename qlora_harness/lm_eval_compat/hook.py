"""Makes `lm_eval` find our model and tasks.

lm-eval's main branch finds models by the entry-point group `lm_eval.models`, which we declare;
0.4.13 does not. So `qlora_harness_hook.pth` calls `install` at interpreter start, which adds a
finder to sys.meta_path that patches modules of lm_eval after import. QLORA_HARNESS_NO_HOOK=1
switches it off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from qlora_harness.lm_eval_compat.start_up import COMPILES, SCANS, compiling_later, scan_once

MODEL_NAME = "qlora_adapter"
MODEL_TARGET = "qlora_harness.score.adapter_lm:QloraAdapterLM"
OFF_VARIABLE = "QLORA_HARNESS_NO_HOOK"


def install() -> None:
    """Adds the finder, once, unless QLORA_HARNESS_NO_HOOK is set.

    Imports are shortened only in commands that name our model.
    """
    if os.environ.get(OFF_VARIABLE, "") in ("", "0"):
        add_finder(fast=any(MODEL_NAME in word for word in sys.argv))


def add_finder(*, fast: bool = True) -> None:
    """Adds the finder, once, for modules that have not been imported yet."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(fast))


def register_model(models: ModuleType) -> None:
    """Adds our model to the registry, unless this release discovers plugins.

    It must run after lm_eval.models, which adds its own models to an empty registry only.
    """
    from lm_eval.api import registry

    discovers_plugins = any("plugin" in name.lower() for name in vars(registry))
    if not discovers_plugins and MODEL_NAME not in registry.model_registry:
        registry.model_registry.register(MODEL_NAME, target=MODEL_TARGET)


def is_registered() -> bool:
    """Whether lm_eval, imported in this process, finds our model."""
    import lm_eval.models
    from lm_eval.api import registry

    del lm_eval
    return MODEL_NAME in registry.model_registry


def extend_task_index(index_module: ModuleType) -> None:
    """Adds our tasks to the index that lm_eval builds."""
    index_class = index_module.TaskIndex
    build = index_class.build

    def build_with_ours(paths: Any, **options: Any) -> Any:
        from qlora_harness.lm_eval_compat.tasks import build_index

        return build_index(build, list(paths), options)

    index_class.build = staticmethod(build_with_ours)


def read_files_first(config_module: ModuleType) -> None:
    """Reads files of questions before lm_eval loads the model: a wrong folder shows at once."""
    config_class = config_module.EvaluatorConfig
    process = config_class.process_tasks

    @wraps(process)
    def process_and_read(config: Any, *args: Any, **options: Any) -> Any:
        from qlora_harness.lm_eval_compat.tasks import read_mmlu_files, use_local_data

        manager = process(config, *args, **options)
        metadata = config.metadata or {}
        use_local_data(manager.task_index, config.tasks, metadata)
        read_mmlu_files(config.tasks, metadata)
        return manager

    config_class.process_tasks = process_and_read


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "lm_eval.config.evaluate_config": read_files_first,
    "lm_eval.models": register_model,
    "lm_eval.tasks._index": extend_task_index,
}


class _Finder:
    """Finds modules with the other finders, to patch those in `_PATCHES` after their import.

    If it is `fast`, it also shortens the imports of `start_up`.
    """

    def __init__(self, fast: bool) -> None:
        self._fast = fast

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch = scan_once if self._fast and name == SCANS else _PATCHES.get(name)
        compiles = self._fast and name == COMPILES
        if patch is None and not compiles:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, patch, compiles)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Executes a module with another loader, without torch's compiler if it `compiles`."""

    def __init__(
        self, loader: Any, patch: Callable[[ModuleType], None] | None, compiles: bool
    ) -> None:
        self._loader, self._patch, self._compiles = loader, patch, compiles

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        with compiling_later() if self._compiles else nullcontext():
            self._loader.exec_module(module)
        if self._patch is None:
            return
        try:
            self._patch(module)
        except Exception as error:  # noqa: BLE001  # lm_eval must work even if we can't patch it
            print(
                f"qlora-harness: can't extend this lm_eval ({error!r}); its own models and tasks "
                "work, ours are missing",
                file=sys.stderr,
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

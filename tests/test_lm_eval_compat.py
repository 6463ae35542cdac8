"""What we need of lm_eval is still there; and the start-up hook, in interpreters of its own."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
import time
from functools import reduce
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qlora_harness.lm_eval_compat import NEEDS, Need, hook
from qlora_harness.lm_eval_compat.start_up import compiling_later

HOOK_FILE = Path(__file__).resolve().parent.parent / "qlora_harness_hook.pth"

REGISTERED = (
    "import lm_eval.models, lm_eval.api.registry as r; from lm_eval.models import MODEL_MAPPING\n"
    "result = {'extra': sorted(set(r.model_registry) - set(MODEL_MAPPING)),\n"
    "          'missing': sorted(set(MODEL_MAPPING) - set(r.model_registry))}"
)
# And how many of the tasks in the index are ours.
WITH_TASKS = f"""{REGISTERED}
from pathlib import Path
import lm_eval.tasks
from lm_eval.tasks._index import TaskIndex
own = Path(lm_eval.tasks.__file__).parent
TaskIndex._iter_yaml_files = staticmethod(lambda root: [])  # reading them all takes long
ours = [name for name in TaskIndex().build([own]) if name.startswith('mmlu_qlora')]
result = [result, len(ours)]
"""
DISCOVERS = "import lm_eval.api.registry as future; future.load_plugins = print\n"


# Canaries


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: f"{need.module}.{need.name}")
def test_lm_eval_still_has_what_we_need(need: Need) -> None:
    module = import_module(need.module)
    value = reduce(getattr, need.name.split("."), module)
    if need.parameters:
        parameters = inspect.signature(value).parameters  # type: ignore[arg-type]
        assert set(need.parameters) <= set(parameters), need.reason


def test_hflm_asks_only_its_properties_for_processes_and_model() -> None:
    """Otherwise what LoadedHFLM overrides would be passed by."""
    from lm_eval.models.huggingface import HFLM

    source = inspect.getsource(HFLM)
    for private, public in (("_rank", "rank"), ("_world_size", "world_size")):
        assert isinstance(inspect.getattr_static(HFLM, public), property)
        reads = [line.strip() for line in source.splitlines() if f"self.{private}" in line]
        assert {line for line in reads if " = " not in line} == {f"return self.{private}"}


def test_lm_eval_still_hints_at_custom_datasets_in_these_words() -> None:
    import lm_eval.api.task

    source = inspect.getsource(lm_eval.api.task)
    assert "{self.config.task}: Custom kwargs can be passed" in source


def test_lm_eval_gets_the_environment_that_was_described_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.loggers.utils import add_env_info
    from torch.utils import collect_env

    from qlora_harness.lm_eval_compat.environment import describe_environment_ahead

    threads: list[str] = []

    def describe() -> str:
        threads.append(threading.current_thread().name)
        return "PyTorch version: 2"

    monkeypatch.setattr(collect_env, "get_pretty_env_info", describe)
    describe_environment_ahead.cache_clear()
    results: list[dict[str, Any]] = [{}, {}]
    for result in results:
        describe_environment_ahead()
        add_env_info(result)
    describe_environment_ahead.cache_clear()
    assert [r["pretty_env_info"] for r in results] == ["PyTorch version: 2"] * 2
    assert len(threads) == 1
    assert threads[0] != threading.main_thread().name


def test_entry_point_is_the_model_class() -> None:
    from lm_eval.models.huggingface import HFLM

    from qlora_harness.score.adapter_lm import QloraAdapterLM

    (entry,) = [p for p in entry_points(group="lm_eval.models") if p.name == hook.MODEL_NAME]
    assert entry.value == hook.MODEL_TARGET
    assert entry.load() is QloraAdapterLM
    assert issubclass(QloraAdapterLM, HFLM)


# The start-up hook


def run(
    code: str, *, switches: tuple[str, ...] = (), errors: int = 0, **environment: str
) -> tuple[Any, str]:
    """Runs code in a fresh interpreter far from the repository.

    Returns its variable `result` and its standard error, which has so many lines.
    """
    process = subprocess.run(
        [sys.executable, *switches, "-c", f"{code}\nimport json; print(json.dumps(result))"],
        cwd="/", env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("\n") == errors, process.stderr
    return json.loads(process.stdout), process.stderr


def test_interpreter_starts_without_importing_anything_of_ours() -> None:
    (modules, finders), _ = run(
        "import sys; finders = [type(f).__name__ for f in sys.meta_path]\n"
        "result = [sorted({m.split('.')[0] for m in sys.modules}), finders]"
    )
    # A virtual environment reads its .pth files twice.
    assert finders.count("QloraHarnessHook") == 1
    assert not {"qlora_harness", "lm_eval", "torch", "transformers"} & set(modules)


def test_hook_is_one_line_that_costs_less_than_a_millisecond() -> None:
    (line,) = HOOK_FILE.read_text(encoding="utf-8").splitlines()
    assert line.startswith("import ")  # else site.py doesn't execute it
    before = list(sys.meta_path)
    seconds = []
    try:
        for _ in range(20):
            sys.meta_path[:] = [f for f in before if type(f).__name__ != "QloraHarnessHook"]
            start = time.perf_counter()
            exec(line, {})  # as site.py does
            seconds.append(time.perf_counter() - start)
            assert type(sys.meta_path[0]).__name__ == "QloraHarnessHook"
    finally:
        sys.meta_path[:] = before
    assert sorted(seconds)[10] < 0.001


@pytest.mark.parametrize(
    "first", ["lm_eval", "lm_eval.api.registry", "lm_eval.tasks", "lm_eval.models.dummy"]
)
def test_models_are_there_whatever_is_imported_first(first: str) -> None:
    code = (
        f"import {first}\nfrom lm_eval.api.registry import get_model\n"
        f"name = get_model('dummy').__name__\n{REGISTERED}\nresult['dummy'] = name"
    )
    assert run(code)[0] == {"extra": ["qlora_adapter"], "missing": [], "dummy": "DummyLM"}


def test_importing_lm_eval_imports_neither_torch_nor_our_model() -> None:
    code = (
        "import sys, lm_eval, lm_eval.models\n"
        "finders = [type(f).__module__ + '.' + type(f).__name__ for f in sys.meta_path]\n"
        "result = [sorted(sys.modules), finders]"
    )
    modules, finders = run(code)[0]
    assert "qlora_harness.lm_eval_compat.hook" in modules
    assert not {"torch", "qlora_harness.score"} & set(modules)
    assert finders.count("qlora_harness.lm_eval_compat.hook._Finder") == 1
    assert not any("QloraHarnessHook" in name for name in finders)


@pytest.mark.parametrize(("value", "is_on"), [("1", False), ("", True), ("0", True)])
def test_variable_switches_the_hook_off(value: str, is_on: bool) -> None:
    registered, ours = run(WITH_TASKS, QLORA_HARNESS_NO_HOOK=value)[0]
    assert registered == {"extra": ["qlora_adapter"] if is_on else [], "missing": []}
    assert ours == (261 if is_on else 0)


COMPAT = "lm_eval_compat/__init__.py"
HOOK = "lm_eval_compat/hook.py"


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"__init__.py": "raise RuntimeError('broken')"}, "RuntimeError('broken')"),
        ({"__init__.py": "this is no Python"}, "SyntaxError("),
        ({"__init__.py": ""}, "'qlora_harness.lm_eval_compat'"),
        ({"__init__.py": "", COMPAT: "", HOOK: "import no_such_package"}, "'no_such_package'"),
        (
            {"__init__.py": "", COMPAT: "", HOOK: "def install(): raise OSError('broken')"},
            "OSError('broken')",
        ),
        ({"__init__.py": "", COMPAT: "", HOOK: "pass"}, "'install'"),
    ],
)
def test_broken_package_is_named_in_one_line_and_lm_eval_works(
    tmp_path: Path, files: dict[str, str], named: str
) -> None:
    for name, text in files.items():
        path = tmp_path / "qlora_harness" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    result, error = run(REGISTERED, errors=1, PYTHONPATH=str(tmp_path))
    assert result == {"extra": [], "missing": []}
    assert error.startswith("qlora-harness: ")
    assert named in error


def test_package_that_is_gone_is_silent(tmp_path: Path) -> None:
    """As after an uninstallation that left the .pth file: here without any site-packages."""
    (tmp_path / "lm_eval.py").write_text("__version__ = '0.4.13'\n")
    line = HOOK_FILE.read_text(encoding="utf-8").strip()
    code = (
        f"import sys; before = len(sys.meta_path); sys.path.insert(0, {str(tmp_path)!r})\n{line}\n"
        "import lm_eval\nresult = [lm_eval.__version__, len(sys.meta_path) - before]"
    )
    assert run(code, switches=("-I", "-S"))[0] == ["0.4.13", 0]


def test_release_that_discovers_plugins_gets_tasks_and_no_registration() -> None:
    assert run(DISCOVERS + WITH_TASKS)[0] == [{"extra": [], "missing": []}, 261]


def test_unknown_release_keeps_working_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    executed: list[ModuleType] = []

    class Loader:
        def create_module(self, spec: ModuleSpec) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            executed.append(module)

    for name, patch in hook._PATCHES.items():
        if name == "lm_eval.models":
            continue  # what is needed is in another module
        module = ModuleType(name)  # without anything to patch
        hook._Loader(Loader(), patch, False).exec_module(module)
        assert executed.pop() is module
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("qlora-harness: ")
        assert "AttributeError(" in error


IMPORTED = (
    "import logging, sys; logging.disable()\n"
    "import lm_eval.evaluator, transformers.modeling_utils, bitsandbytes\n"
    "result = ['torch._inductor.compile_fx' in sys.modules]\n"
)
USED = """
import torch
from bitsandbytes.backends.default import ops
from transformers.utils import import_utils
result += [
    import_utils.create_import_structure_from_path.__name__,
    torch.compile(lambda x: x + 1, backend="eager")(1),
]
"""


def test_torch_compiles_when_a_function_is_called() -> None:
    result = run(f"import sys; sys.argv[1:] = ['--model', 'qlora_adapter']\n{IMPORTED}{USED}")[0]
    assert result == [False, "from_cache", 2]


def test_imports_of_other_models_are_as_ever() -> None:
    assert run(IMPORTED)[0] == [True]


def test_a_function_compiled_later_keeps_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []

    def compile_now(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiling_later():
        first = torch.compile(abs)
        second = torch.compile(dynamic=True)(abs)
    assert torch.compile is compile_now
    assert not compiled
    assert [first(-1), first(-2), second(-3)] == [1, 2, 3]
    assert compiled == [{}, {"dynamic": True}]


def test_installing_twice_adds_one_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLORA_HARNESS_NO_HOOK", raising=False)
    monkeypatch.setattr(sys, "meta_path", [])
    hook.install()
    hook.install()
    (finder,) = sys.meta_path
    assert type(finder) is hook._Finder
    assert [finder.find_spec(name) for name in ("lm_eval", "lm_eval.models.dummy", "json")] == (
        [None] * 3
    )
    assert finder.find_spec("lm_eval.models") is None  # no other finder knows it

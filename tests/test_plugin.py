"""The start-up hook and the registration, in interpreters of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora_harness import plugin

HOOK_FILE = Path(__file__).resolve().parent.parent / "qlora_harness_hook.pth"

REGISTERED = (
    "import lm_eval.models, lm_eval.api.registry as r; from lm_eval.models import MODEL_MAPPING\n"
    "result = {'extra': sorted(set(r.model_registry) - set(MODEL_MAPPING)),\n"
    "          'missing': sorted(set(MODEL_MAPPING) - set(r.model_registry))}"
)
OURS_IN_INDEX = """
from pathlib import Path
import lm_eval.tasks
from lm_eval.tasks._index import TaskIndex
own = Path(lm_eval.tasks.__file__).parent
TaskIndex._iter_yaml_files = staticmethod(lambda root: [])  # reading them all takes long
result = sorted(name for name in TaskIndex().build([own]) if name.startswith('mmlu_qlora'))
"""


def run(code: str, *, switches: tuple[str, ...] = (), **environment: str) -> Any:
    """Runs code in a fresh interpreter far from the repository; returns its variable `result`."""
    process = subprocess.run(
        [sys.executable, *switches, "-c", f"{code}\nimport json; print(json.dumps(result))"],
        cwd="/",
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return json.loads(process.stdout)


def test_interpreter_starts_without_importing_anything_of_ours() -> None:
    found = run(
        "import sys; finders = [type(f).__name__ for f in sys.meta_path]\n"
        "result = [sorted({m.split('.')[0] for m in sys.modules}), finders]"
    )
    modules, finders = found
    assert "QloraHarnessHook" in finders
    assert not {"qlora_harness", "lm_eval", "torch", "transformers"} & set(modules)


def test_hook_costs_less_than_a_millisecond() -> None:
    line = HOOK_FILE.read_text(encoding="utf-8")
    before = list(sys.meta_path)
    seconds = []
    try:
        for _ in range(20):
            start = time.perf_counter()
            exec(line, {})  # as site.py does with a line that starts with "import"
            seconds.append(time.perf_counter() - start)
            assert type(sys.meta_path[0]).__name__ == "QloraHarnessHook"
            sys.meta_path[:] = before
    finally:
        sys.meta_path[:] = before
    assert sorted(seconds)[10] < 0.001


def test_hook_is_one_line_that_site_py_executes() -> None:
    lines = HOOK_FILE.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("import ")


def test_model_is_registered_beside_all_built_in_ones() -> None:
    assert run(REGISTERED) == {"extra": ["qlora_adapter"], "missing": []}


def test_model_is_found_by_name_whatever_is_imported_first() -> None:
    for first in ("lm_eval", "lm_eval.api.registry", "lm_eval.tasks", "lm_eval.models.dummy"):
        code = (
            f"import {first}\nfrom lm_eval.api.registry import get_model\n"
            "result = [get_model('dummy').__name__]\n"
            "from lm_eval.api.registry import model_registry as r\n"
            "result += ['hf' in r, 'dummy' in r, 'qlora_adapter' in r]"
        )
        assert run(code) == ["DummyLM", True, True, True]


def test_importing_lm_eval_imports_neither_torch_nor_our_model() -> None:
    code = "import sys, lm_eval, lm_eval.models\nresult = sorted(sys.modules)"
    modules = run(code)
    assert "qlora_harness.plugin" in modules
    assert "torch" not in modules
    assert "qlora_harness.score" not in modules


def test_hook_leaves_once_it_has_acted() -> None:
    code = (
        "import sys, lm_eval.models\n"
        "result = [type(f).__module__ + '.' + type(f).__name__ for f in sys.meta_path]"
    )
    finders = run(code)
    assert finders.count("qlora_harness.plugin._Finder") == 1
    # A virtual environment reads its .pth files twice; what is left over of two does nothing.
    assert sum("QloraHarnessHook" in name for name in finders) <= 1


def test_tasks_are_in_the_index() -> None:
    names = run(OURS_IN_INDEX)
    assert len(names) == 261
    assert "mmlu_qlora_5shot_anatomy" in names


@pytest.mark.parametrize("value", ["1", "yes"])
def test_variable_switches_the_hook_off(value: str) -> None:
    off = {"QLORA_HARNESS_NO_HOOK": value}
    assert run(REGISTERED, **off) == {"extra": [], "missing": []}
    assert run(OURS_IN_INDEX, **off) == []


@pytest.mark.parametrize("value", ["", "0"])
def test_empty_variable_or_zero_leaves_it_on(value: str) -> None:
    assert run(REGISTERED, QLORA_HARNESS_NO_HOOK=value)["extra"] == ["qlora_adapter"]


@pytest.mark.parametrize(
    "files",
    [
        {"__init__.py": "raise RuntimeError('broken')"},
        {"__init__.py": "this is no Python"},
        {"__init__.py": ""},  # without plugin.py
        {"__init__.py": "", "plugin.py": "import no_such_package"},
        {"__init__.py": "", "plugin.py": "def install(): raise OSError('broken')"},
        {"__init__.py": "", "plugin.py": "pass"},  # another version's, without install()
    ],
)
def test_broken_package_harms_nobody(tmp_path: Path, files: dict[str, str]) -> None:
    package = tmp_path / "qlora_harness"
    package.mkdir()
    for name, text in files.items():
        (package / name).write_text(text)
    assert run(REGISTERED, PYTHONPATH=str(tmp_path)) == {"extra": [], "missing": []}


def test_package_that_is_gone_harms_nobody(tmp_path: Path) -> None:
    """As after an uninstallation that left the .pth file: here without any site-packages."""
    (tmp_path / "lm_eval.py").write_text("__version__ = '0.4.13'\n")
    line = HOOK_FILE.read_text(encoding="utf-8").strip()
    code = (
        f"import sys; before = len(sys.meta_path); sys.path.insert(0, {str(tmp_path)!r})\n{line}\n"
        "import lm_eval\nresult = [lm_eval.__version__, len(sys.meta_path) - before]"
    )
    assert run(code, switches=("-I", "-S")) == ["0.4.13", 0]


def test_release_that_discovers_plugins_gets_no_registration() -> None:
    code = "import lm_eval.api.registry as future; future.load_plugins = print\n" + REGISTERED
    assert run(code) == {"extra": [], "missing": []}


def test_release_that_discovers_plugins_still_finds_our_tasks() -> None:
    code = "import lm_eval.api.registry as future; future.load_plugins = print\n" + OURS_IN_INDEX
    assert len(run(code)) == 261


def test_entry_point_is_the_model_class() -> None:
    from lm_eval.models.huggingface import HFLM

    from qlora_harness.score.adapter_lm import QloraAdapterLM

    (found,) = [p for p in entry_points(group="lm_eval.models") if p.name == plugin.MODEL_NAME]
    assert found.value == plugin.MODEL_TARGET == "qlora_harness.score.adapter_lm:QloraAdapterLM"
    assert found.load() is QloraAdapterLM
    assert issubclass(QloraAdapterLM, HFLM)


def test_unknown_release_keeps_working_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    class Loader:
        executed: list[ModuleType] = []

        def create_module(self, spec: ModuleSpec) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            self.executed.append(module)

    def action(module: ModuleType) -> None:
        plugin.extend_task_index(module)  # it has no TaskIndex

    module = ModuleType("lm_eval.tasks._index")
    plugin._Loader(Loader(), action).exec_module(module)
    assert Loader.executed == [module]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("qlora-harness: this lm_eval could not be extended (AttributeError(")
    assert error.endswith("); its own models and tasks work, ours are missing\n")


def test_installing_twice_adds_one_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLORA_HARNESS_NO_HOOK", raising=False)
    monkeypatch.setattr(sys, "meta_path", [])
    plugin.install()
    plugin.install()
    assert [type(finder) for finder in sys.meta_path] == [plugin._Finder]


def test_other_modules_are_none_of_the_finders_business() -> None:
    finder = plugin._Finder()
    assert finder.find_spec("lm_eval") is None
    assert finder.find_spec("lm_eval.models.dummy") is None
    assert finder.find_spec("json") is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", [finder])
        assert finder.find_spec("lm_eval.models") is None

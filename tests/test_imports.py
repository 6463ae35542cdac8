"""Which part may import what. Each rule keeps a program quick, or a stage from reaching back."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_harness

PACKAGE = Path(qlora_harness.__file__).parent
HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "lm_eval", "datasets", "numpy"]


def modules(*parts: str) -> list[str]:
    """Names of the modules in parts of the package (a folder, or one file)."""
    found = []
    for part in parts:
        path = PACKAGE / part
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
            found.append(name.removesuffix(".__init__"))
    assert found
    return found


def loaded_after(names: list[str], watched: list[str]) -> dict[str, list[str]]:
    """Which of the watched modules each module brings in, asked of one fresh interpreter each."""
    code = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1].split(): importlib.import_module(name)\n"
        "print(json.dumps([m for m in sys.argv[2].split() if m in sys.modules]))"
    )
    outcome = {}
    for name in names:
        done = subprocess.run(
            [sys.executable, "-c", code, name, " ".join(watched)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        outcome[name] = json.loads(done.stdout)
    return outcome


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every import statement of a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module or ""


def reaching(folder: str, *forbidden: str) -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for line, name in imported(path)
        if any(name == item or name.startswith(f"{item}.") for item in forbidden)
    ]


@pytest.mark.parametrize("part", ["settings", "errors", "record", "locations", "cli"])
def test_light_modules_import_nothing_heavy(part: str) -> None:
    (name,) = modules(part)
    assert loaded_after([name], HEAVY) == {name: []}


def test_data_imports_neither_torch_nor_lm_eval() -> None:
    # All at once: a rule broken by one of them shows as well.
    name = " ".join(modules("data"))
    assert loaded_after([name], HEAVY) == {name: []}


def test_compare_imports_neither_torch_nor_lm_eval() -> None:
    name = " ".join(modules("compare", "results", "schema"))
    assert loaded_after([name], ["torch", "transformers", "peft", "lm_eval"]) == {name: []}
    for part in ("compare", "results", "schema"):
        assert reaching(part, "torch", "lm_eval") == []


def test_the_training_command_imports_nothing_heavy_until_it_runs() -> None:
    name = "qlora_harness.train.command"
    assert loaded_after([name], HEAVY) == {name: []}


def test_train_and_model_never_import_lm_eval() -> None:
    assert reaching("train", "lm_eval", "qlora_harness.score", "qlora_harness.lm_eval_compat") == []
    assert reaching("model", "lm_eval", "qlora_harness.score", "qlora_harness.lm_eval_compat") == []


def test_only_one_place_imports_lm_eval() -> None:
    parts = [path.name for path in PACKAGE.iterdir() if path.is_dir()]
    importing = {part for part in parts if reaching(part, "lm_eval")}
    assert importing == {"lm_eval_compat"}


def test_no_stage_reaches_back() -> None:
    package = "qlora_harness"
    assert reaching("data", f"{package}.model", f"{package}.train", f"{package}.score") == []
    assert reaching("model", f"{package}.train", f"{package}.compare") == []
    assert reaching("train", f"{package}.compare") == []
    assert reaching("schema", f"{package}.results", f"{package}.train") == []
    assert reaching("results", f"{package}.compare", f"{package}.train") == []
    assert reaching("compare", f"{package}.train", f"{package}.model", f"{package}.score") == []


def test_only_base_names_bitsandbytes() -> None:
    naming = [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        for _, name in imported(path)
        if name.split(".")[0] == "bitsandbytes"
    ]
    assert set(naming) <= {"model/base.py"}


def test_the_launcher_holds_no_algorithm() -> None:
    launcher = PACKAGE.parent / "launch" / "train.py"
    tree = ast.parse(launcher.read_text(encoding="utf-8"))
    kinds = [type(node).__name__ for node in tree.body]
    assert kinds == ["Expr", "Import", "ImportFrom", "If"]

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
    names = []
    for part in parts:
        path = PACKAGE / part
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
            names.append(name.removesuffix(".__init__"))
    assert names
    return names


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


@pytest.mark.parametrize(
    ("parts", "watched"),
    [
        *(
            ([part], HEAVY)
            for part in (
                "settings",
                "settings_checks",
                "recipes",
                "errors",
                "record",
                "locations",
                "cli",
            )
        ),
        (["data"], HEAVY),
        (["train/command"], HEAVY),
        (["survey"], HEAVY),
        (["study/definition", "study/command"], HEAVY),
        (["compare", "results", "schema"], ["torch", "transformers", "peft", "lm_eval"]),
    ],
)
def test_importing_brings_in_nothing_heavy(parts: list[str], watched: list[str]) -> None:
    code = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1].split(): importlib.import_module(name)\n"
        "print(json.dumps([m for m in sys.argv[2].split() if m in sys.modules]))"
    )
    words = [" ".join(modules(*parts)), " ".join(watched)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, timeout=120, check=True
    )
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("data", ["model", "train", "score"]),
        ("model", ["lm_eval", "score", "lm_eval_compat", "train", "compare"]),
        ("train", ["lm_eval", "score", "lm_eval_compat", "compare"]),
        ("schema", ["torch", "lm_eval", "results", "train"]),
        ("results", ["torch", "lm_eval", "compare", "train"]),
        ("compare", ["torch", "lm_eval", "train", "model", "score"]),
        ("inference", ["lm_eval", "results", "compare", "study", "benchmark"]),
        ("study", ["benchmark", "inference"]),
    ],
)
def test_no_stage_reaches_back(folder: str, forbidden: list[str]) -> None:
    names = [name if name in HEAVY else f"qlora_harness.{name}" for name in forbidden]
    assert reaching(folder, *names) == []


@pytest.mark.parametrize("package", ["study", "inference"])
def test_only_the_command_line_imports(package: str) -> None:
    lines = reaching("", f"qlora_harness.{package}")
    outside = [line for line in lines if not line.startswith(f"{package}/")]
    assert {line.split(":")[0] for line in outside} <= {"cli.py"}


def test_only_one_place_imports_lm_eval() -> None:
    assert {line.split("/")[0] for line in reaching("", "lm_eval")} == {"lm_eval_compat"}


def test_only_base_names_bitsandbytes() -> None:
    assert {line.split(":")[0] for line in reaching("", "bitsandbytes")} <= {"model/base.py"}


def test_the_launcher_holds_no_algorithm() -> None:
    launcher = PACKAGE.parent / "launch" / "train.py"
    tree = ast.parse(launcher.read_text(encoding="utf-8"))
    kinds = [type(node).__name__ for node in tree.body]
    assert kinds == ["Expr", "Import", "ImportFrom", "If"]


def test_no_test_imports_another() -> None:
    folder = Path(__file__).parent
    for path in folder.glob("*.py"):
        assert not [name for _, name in imported(path) if name.startswith("test_")], path.name

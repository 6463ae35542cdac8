"""What is in the wheel, and that a wheel's layout works far from the repository."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_harness import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
HOOK = "qlora_harness_hook.pth"
INFO = f"qlora_harness-{__version__}.dist-info"


def build(kind: str, folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(folder)],
        cwd=REPOSITORY, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed; the packages it needs are this environment's."""
    target = tmp_path_factory.mktemp("installed") / "site"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", *install, str(wheel)], check=True, timeout=120)
    return target


@pytest.fixture
def run_installed(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs Python with the installed wheel from another folder; returns what it prints."""

    def run(*words: str, silent: bool = False) -> str:
        process = subprocess.run(
            [sys.executable, *words], cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        assert not (silent and process.stderr)
        return process.stdout

    return run


def tracked_files(*folders: str) -> set[str]:
    """The files of folders as they must be packaged, by their path in the repository."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_package_tasks_recipes_and_hook(wheel: Path) -> None:
    assert wheel.name == f"qlora_harness-{__version__}-py3-none-any.whl"
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    info = f"{INFO}/METADATA {INFO}/RECORD {INFO}/WHEEL {INFO}/entry_points.txt".split()
    inside = {f"qlora_harness/{name}" for name in tracked_files("tasks", "launch")}
    assert sorted(names) == sorted(
        {HOOK, *info, f"{INFO}/licenses/LICENSE"} | tracked_files("qlora_harness") | inside
    )
    assert {
        "qlora_harness/py.typed", "qlora_harness/tasks/mmlu_qlora/families.yaml",
        "qlora_harness/tasks/mmlu_qlora/_subject_yaml",
        "qlora_harness/tasks/mmlu_qlora/_group_yaml", "qlora_harness/launch/train.py",
        "qlora_harness/launch/recipes/qlora-llama2-7b.yaml",
        "qlora_harness/launch/recipes/lora-llama2-7b.yaml",
        "qlora_harness/launch/recipes/demo.yaml", "qlora_harness/data/demo/oasst_demo.jsonl",
        "qlora_harness/data/demo/five_shot_mmlu_demo.json",
    } <= set(names)  # fmt: skip
    assert archive.read(HOOK) == (REPOSITORY / HOOK).read_bytes()
    assert max(item.file_size for item in archive.infolist()) < 1_000_000


def test_entry_points(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    entries = configparser.ConfigParser()
    entries.read_string(archive.read(f"{INFO}/entry_points.txt").decode())
    assert {name: dict(entries[name]) for name in entries.sections()} == {
        "console_scripts": {"qlora-harness": "qlora_harness.cli:main"},
        "lm_eval.models": {"qlora_adapter": "qlora_harness.score.adapter_lm:QloraAdapterLM"},
    }


def test_source_distribution_can_build_the_wheel(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = build("sdist", tmp_path_factory.mktemp("sdist"))
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    single = {HOOK, "pyproject.toml", "README.md", "LICENSE", "setup.cfg", "Makefile", ".ci/run"}
    assert single | tracked_files("qlora_harness", "tasks", "launch", "docs", "tests") <= names
    # The published runs are too large.
    results = {name for name in names if name.startswith("results")}
    assert results == tracked_files("results/benchmarks") | {"results/README.md"}


def test_installed_wheel_finds_its_tasks_recipes_and_demo_data(
    installed: Path, run_installed: Callable[..., str]
) -> None:
    code = """
import json, qlora_harness
from qlora_harness import locations
from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions
from qlora_harness.schema.mmlu import families
from qlora_harness.recipes import find_recipe, read_recipe
recipe = find_recipe("qlora-llama2-7b", locations.recipes_dir())
result = {
    "package": qlora_harness.__file__,
    "tasks": locations.tasks_dir(),
    "recipes": locations.recipes_dir(),
    "families": list(families()),
    "learning_rate": float(read_recipe(recipe)[0]["learning_rate"]),
    "questions": len(load_questions(DEMO_FILE)),
    "conversations": (locations.demo_dir() / "oasst_demo.jsonl").is_file(),
}
print(json.dumps(result, default=str))
"""
    package = installed / "qlora_harness"
    assert json.loads(run_installed("-c", code)) == {
        "package": str(package / "__init__.py"),
        "tasks": str(package / "tasks"),
        "recipes": str(package / "launch" / "recipes"),
        "families": [
            "mmlu_qlora_5shot", "mmlu_qlora_5shot_val", "mmlu_qlora_0shot",
            "mmlu_qlora_0shot_val", "mmlu_qlora_demo",
        ],
        "learning_rate": 2e-4,
        "questions": 96,
        "conversations": True,
    }  # fmt: skip


def test_installed_wheel_extends_lm_eval_by_its_own_hook(
    installed: Path, tmp_path: Path, run_installed: Callable[..., str]
) -> None:
    code = f"""
import json, os, site, sys
os.environ["XDG_CACHE_HOME"] = {str(tmp_path)!r}  # the index is not one that was kept before
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "QloraHarnessHook"]
site.addsitedir({str(installed)!r})
import qlora_harness, lm_eval.tasks
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
import lm_eval.models
TaskIndex._iter_yaml_files = staticmethod(lambda root: [])  # reading them all takes long
manager = TaskManager()
loaded = manager.load("mmlu_qlora_demo")["tasks"]
print(json.dumps([
    os.path.dirname(os.path.dirname(qlora_harness.__file__)),
    "qlora_adapter" in model_registry, "hf" in model_registry,
    len(manager.all_tasks), sum(len(task.test_docs()) for task in loaded.values()),
]))
"""
    assert json.loads(run_installed("-c", code)) == [str(installed), True, True, 261, 96]


def test_installed_commands_run(installed: Path, run_installed: Callable[..., str]) -> None:
    command = str(installed / "bin" / "qlora-harness")
    assert run_installed(command, "--version", silent=True) == f"qlora-harness {__version__}\n"
    launcher = str(installed / "qlora_harness" / "launch" / "train.py")
    assert "--quant" in run_installed(launcher, "--help")

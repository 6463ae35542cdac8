"""What is in the wheel, and that a wheel's layout works far from the repository."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest

from qlora_harness import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
HOOK = "qlora_harness_hook.pth"


def build(kind: str, folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(folder)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        timeout=120,
    )
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


def run_installed(installed: Path, code: str, folder: Path) -> Any:
    """Runs code with the installed wheel from another folder; returns its variable `result`."""
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json; print(json.dumps(result, default=str))"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def tracked_files(folder: str) -> set[str]:
    """The files of a folder as they must be packaged, by their path in the repository."""
    found = (path for path in (REPOSITORY / folder).rglob("*") if path.is_file())
    return {
        path.relative_to(REPOSITORY).as_posix() for path in found if "__pycache__" not in path.parts
    }


def test_wheel_holds_package_tasks_recipes_and_hook(wheel: Path) -> None:
    assert wheel.name == f"qlora_harness-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    info = f"qlora_harness-{__version__}.dist-info"
    expected = tracked_files("qlora_harness")
    expected |= {
        f"qlora_harness/{name}" for name in tracked_files("tasks") | tracked_files("launch")
    }
    expected |= {HOOK}
    expected |= {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
    expected |= {f"{info}/licenses/LICENSE"}
    assert set(names) == expected
    assert {
        "qlora_harness/py.typed",
        "qlora_harness/tasks/mmlu_qlora/families.yaml",
        "qlora_harness/tasks/mmlu_qlora/_subject_yaml",
        "qlora_harness/tasks/mmlu_qlora/_group_yaml",
        "qlora_harness/launch/train.py",
        "qlora_harness/launch/recipes/qlora-llama2-7b.yaml",
        "qlora_harness/launch/recipes/lora-llama2-7b.yaml",
        "qlora_harness/launch/recipes/demo.yaml",
        "qlora_harness/data/demo/oasst_demo.jsonl",
        "qlora_harness/data/demo/five_shot_mmlu_demo.json",
    } <= set(names)


def test_wheel_carries_the_hook_as_it_is_in_the_repository(wheel: Path) -> None:
    assert zipfile.ZipFile(wheel).read(HOOK) == (REPOSITORY / HOOK).read_bytes()


def test_wheel_holds_nothing_large(wheel: Path) -> None:
    assert max(item.file_size for item in zipfile.ZipFile(wheel).infolist()) < 1_000_000


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"qlora_harness-{__version__}.dist-info"
    entries = configparser.ConfigParser()
    entries.read_string(archive.read(f"{info}/entry_points.txt").decode())
    assert {name: dict(entries[name]) for name in entries.sections()} == {
        "console_scripts": {"qlora-harness": "qlora_harness.cli:main"},
        "lm_eval.models": {"qlora_adapter": "qlora_harness.score.adapter_lm:QloraAdapterLM"},
    }
    metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Name"] == "qlora-harness"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    needed = [text.split(";")[0].strip() for text in metadata.get_all("Requires-Dist", [])]
    assert "torch>=2.11" in needed
    assert any(text.startswith("transformers") and ">=5.17" in text for text in needed)
    assert any(text.startswith("lm-eval[hf]") and ">=0.4.13" in text for text in needed)
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == {"reports", "demo", "nvml", "tensorboard", "wandb", "dev"}


def test_source_distribution_can_build_the_wheel(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = build("sdist", tmp_path_factory.mktemp("sdist"))
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    needed = tracked_files("qlora_harness") | tracked_files("tasks") | tracked_files("launch")
    assert needed | {HOOK, "pyproject.toml", "README.md", "LICENSE", "setup.cfg"} <= names
    assert tracked_files("docs") | tracked_files("tests") | {"Makefile", ".ci/run"} <= names
    # The published runs are too large.
    results = {name for name in names if name.startswith("results")}
    assert results == tracked_files("results/benchmarks") | {"results/README.md"}


def test_installed_wheel_finds_its_tasks_recipes_and_demo_data(
    installed: Path, tmp_path: Path
) -> None:
    code = """
import qlora_harness
from qlora_harness import locations
from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions
from qlora_harness.families import families
from qlora_harness.settings import find_recipe, read_recipe
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
"""
    package = installed / "qlora_harness"
    assert run_installed(installed, code, tmp_path) == {
        "package": str(package / "__init__.py"),
        "tasks": str(package / "tasks"),
        "recipes": str(package / "launch" / "recipes"),
        "families": [
            "mmlu_qlora_5shot",
            "mmlu_qlora_5shot_val",
            "mmlu_qlora_0shot",
            "mmlu_qlora_0shot_val",
            "mmlu_qlora_demo",
        ],
        "learning_rate": 2e-4,
        "questions": 96,
        "conversations": True,
    }


def test_installed_wheel_extends_lm_eval_by_its_own_hook(installed: Path, tmp_path: Path) -> None:
    code = f"""
import os, site, sys
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
result = [
    os.path.dirname(os.path.dirname(qlora_harness.__file__)),
    "qlora_adapter" in model_registry, "hf" in model_registry,
    len(manager.all_tasks), sum(len(task.test_docs()) for task in loaded.values()),
]
"""
    assert run_installed(installed, code, tmp_path) == [str(installed), True, True, 261, 96]


def test_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, str(installed / "bin" / "qlora-harness"), "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stdout, process.stderr) == (
        0,
        f"qlora-harness {__version__}\n",
        "",
    )


def test_training_command_runs_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, str(installed / "qlora_harness" / "launch" / "train.py"), "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    assert "--quant" in process.stdout

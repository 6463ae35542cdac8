"""The pages: their commands run, their tables match the records, and the notebook runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple

import nbformat
import pytest
from nbclient import NotebookClient

from qlora_harness.cli import build_parser
from qlora_harness.study.command import _parser as study_parser
from qlora_harness.survey.command import parser as survey_parser
from qlora_harness.train.command import parse_settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "results" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# The commands that take flags of launch/train.py.
OWN_PARSERS: dict[str, Callable[[list[str]], object]] = {
    "plan": parse_settings,
    "study": lambda words: study_parser().parse_args(words),
    "data": lambda words: survey_parser().parse_args(words),
}
TRAINING = ("launch/train.py", "qlora_harness.train")
STUDY = ROOT / "results" / "published" / "smollm2"


class Block(NamedTuple):
    page: str
    line: int
    language: str
    needs: str | None
    text: str


def blocks() -> list[Block]:
    fence = re.compile(r'^```(bash|python)(?: needs="([^"\n]+)")?\n(.*?)^```$', re.S | re.M)
    result = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in fence.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            result.append(Block(page.name, line, match[1], match[2], match[3]))
    return result


def named(block: Block) -> str:
    return f"{block.page}:{block.line}"


RUN = [block for block in blocks() if block.needs is None and block.page != "tutorial.md"]
TUTORIAL = [block for block in blocks() if block.needs is None and block.page == "tutorial.md"]
MARKED = [block for block in blocks() if block.needs is not None]


@pytest.fixture
def copy_of_the_repository(tmp_path: Path) -> Path:
    """A folder of links to the repository, where commands may write beside the published runs."""
    for name in ("qlora_harness", "tasks", "launch", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in (ROOT / "results").rglob("*.json*"):
        if not path.name.startswith("comparison"):
            link = tmp_path / path.relative_to(ROOT)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("block", RUN, ids=named)
def test_commands_run(block: Block, copy_of_the_repository: Path) -> None:
    if "results/" in block.text and not STUDY.is_dir():
        pytest.skip("results/ is not part of this copy")
    run_block(block, copy_of_the_repository)


def test_the_tutorial_runs(copy_of_the_repository: Path) -> None:
    for block in TUTORIAL:  # each continues where the one before ended
        run_block(block, copy_of_the_repository)
    page = copy_of_the_repository / "results" / "library" / "comparison.html"
    assert "NF4" in page.read_text(encoding="utf-8")


def run_block(block: Block, folder: Path) -> None:
    process = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text]
        if block.language == "bash"
        else [sys.executable, "-c", block.text],
        cwd=folder,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, f"{named(block)}: {process.stderr}"


def without_launcher(words: list[str]) -> list[str]:
    """Drops srun, variables, `accelerate launch` and torchrun with their flags."""
    if words[:3] == ["srun", "bash", "-c"]:
        words = shlex.split(words[3])
    while words and re.match("[A-Z_]+=", words[0]):
        words.pop(0)
    if words[:1] in (["accelerate"], ["torchrun"]):
        while words[0] not in (*TRAINING, "qlora-harness", "lm_eval"):
            words.pop(0)
    return words


@pytest.mark.parametrize("block", MARKED, ids=named)
def test_commands_that_need_more_are_well_formed(block: Block) -> None:
    if block.language == "python":
        compile(block.text, block.page, "exec")
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        words = without_launcher(shlex.split(line, comments=True))
        if words and words[0] in TRAINING:
            parse_settings(words[1:])
        elif words[:1] == ["qlora-harness"]:
            parse = OWN_PARSERS.get(words[1])
            parse(words[2:]) if parse else build_parser().parse_args(words[1:])
        elif words[:1] == ["make"]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif words[:1] == ["lm_eval"]:
            flags = dict(zip(words[1::2], words[2::2], strict=False))
            assert flags["--model"] == "qlora_adapter"
            assert all(task.startswith("mmlu_qlora") for task in flags["--tasks"].split(","))
        else:
            assert not words or words[0] in {
                "cd", "pip", "export", "hf", "pytest", "alpaca_eval",
            }, line  # fmt: skip


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                if "published" in target and not STUDY.is_dir():
                    continue  # not part of this copy
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = {path for path in (ROOT / "qlora_harness").rglob("[!_]*.py")}
    groups = ("triton_", "mmlu")  # one line for all of them, and one for schema/
    single = {
        path.name
        for path in modules
        if path.parent.name != "schema" and not path.name.startswith(groups)
    }
    named = set(re.findall(r"\b[a-z]\w*\.py\b", text))
    assert single - named == set()
    others = {"train.py", "test_imports.py", "plugin.py"}
    assert named - {path.name for path in modules} == others


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_tables_answer_and_picture_are_those_of_the_records(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not STUDY.is_dir():
        pytest.skip("results/ is not part of this copy")
    monkeypatch.setattr("sys.argv", ["docs/from_records", "--check"])
    status = run_path(str(ROOT / "docs" / "from_records"))["main"]()
    assert (status, capsys.readouterr().out) == (0, "")


def test_notebook_runs(tiny_llama: Path, tmp_path: Path) -> None:
    notebook: Any = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    skipped = {"needs-gpu", "setup"}
    notebook.cells = [c for c in notebook.cells if not skipped & set(c.metadata.get("tags", ()))]
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = f"MODEL = {str(tiny_llama)!r}\nSTEPS = 2\nQUESTIONS = 1"
    NotebookClient(
        notebook,
        timeout=200,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    shown = [
        output["data"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "execute_result"
    ]
    answer, frame, credit = shown
    assert "NF4" in answer["text/html"]
    assert "eval_loss" in frame["text/html"]
    assert "4bit" in credit["text/plain"]
    assert (tmp_path / "results" / "16bit" / "evaluation_results.json").is_file()

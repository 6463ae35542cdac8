"""A study on a tiny model: its records, its interruptions, and the cells that fail."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import REPOSITORY
from training_runs import read

from qlora_harness.errors import RunError
from qlora_harness.model.shared_base import sharing_base
from qlora_harness.score.in_process import InProcessScorer
from qlora_harness.study.command import run
from qlora_harness.study.definition import Study, build_study
from qlora_harness.study.folder import StudyFolder
from qlora_harness.study.progress import is_complete
from qlora_harness.study.worker import CellRunner, Report
from qlora_harness.train.run import run_training

BIN = Path(sys.executable).parent
TASK = "mmlu_qlora_demo"
FIVE_FILES = [
    "evaluation_results.json",
    "trainer_state.json",
    "training_logs.json",
    "training_summary.json",
]


@pytest.fixture
def content(tiny_llama: Path, rows: Path) -> dict[str, Any]:
    return {
        "name": "s",
        "settings": {
            "model": str(tiny_llama),
            "dataset": str(rows),
            "compute_dtype": "float32",
            "max_steps": 3,
            "batch_size": 2,
            "grad_accum": 2,
            "optimizer": "adamw_torch",
            "checkpointing": "none",
            "max_length": 96,
            "lora_r": 4,
            "eval_fraction": 0.25,
            "learning_rate": 0.01,
            "save_steps": 1,
            "eval_steps": 2,
        },
        "arms": {"nf4": {"quant": "nf4"}, "bf16": {"quant": "bf16"}},
        "tasks": TASK,
    }


@pytest.fixture
def file(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """study.yaml in the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run_cells(study: Study, names: list[str]) -> list[Report]:
    """Runs cells in this process, on one base as far as they share it."""
    reports: list[Report] = []
    StudyFolder(study).begin()
    with sharing_base():
        runner = CellRunner(study, reports.append)
        for name in names:
            assert runner.run(study.cell(name))
    return reports


def numbers_of(run_dir: Path) -> dict[str, Any]:
    """Everything that a run computed, without times and places."""
    log = read(run_dir / "training_logs.json")
    progress = next(run_dir.glob("mmlu_progress_*.json"))
    return {
        "losses": [row["loss"] for row in log["steps"]],
        "evaluation": log["evaluation"],
        "adapter": (run_dir / "adapter" / "adapter_model.safetensors").read_bytes(),
        "answers": json.loads(progress.read_text())["tasks"],
        "file": progress.name,
    }


def words(*arguments: str | Path) -> list[str]:
    return [str(BIN / "qlora-harness"), "study", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_cells_on_one_base_equal_separate_commands(file: Path, content: dict[str, Any]) -> None:
    content["seeds"] = 2
    study = build_study(content, {}, file)
    names = ["nf4/0", "nf4/1", "bf16/0", "bf16/1"]
    reports = run_cells(study, names)
    assert [r.cell for r in reports if r.state == "completed"] == names
    alone = build_study({**content, "name": "alone"}, {}, file)
    bf16, nf4 = alone.cell("bf16/1"), alone.cell("nf4/1")
    run_training(bf16.settings)
    InProcessScorer([TASK], 16).score(bf16.model_args(), bf16.folder / "lm_eval")
    (file.parent / "launch").symlink_to(REPOSITORY / "launch")
    for command in alone.commands(nf4):
        program, *rest = shlex.split(command)
        options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
                   "--dynamo_backend", "no"] if program == "accelerate" else []  # fmt: skip
        line = [str(BIN / program), rest[0], *options, *rest[1:]]
        subprocess.run(line, check=True, capture_output=True, env=environment())
    for cell in (bf16, nf4):
        together, expected = numbers_of(study.cell(cell.name).folder), numbers_of(cell.folder)
        for key, value in expected.items():
            assert together[key] == value, f"{cell.name}: {key}"
    folders = [study.cell("nf4/1").folder, nf4.folder]
    mine, theirs = (read(next(f.glob("lm_eval/*/results_*.json"))) for f in folders)
    assert mine["results"] == theirs["results"]
    different = {k for k, v in theirs["config"].items() if mine["config"].get(k) != v}
    assert different <= {"model_args", "peft_sha"}


def test_the_command_runs_every_cell_and_answers(file: Path) -> None:
    done = subprocess.run(words(file), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    record = read("results/s/study.json")
    assert [cell["name"] for cell in record["cells"]] == ["nf4/0", "bf16/0"]
    assert {cell["state"] for cell in record["cells"]} == {"completed"}
    for cell in record["cells"]:
        files = sorted(path.name for path in (Path("results/s") / cell["folder"]).glob("*.json"))
        progress = [name for name in files if name.startswith("mmlu_progress_")]
        assert len(progress) == 1
        assert [name for name in files if name not in progress] == FIVE_FILES
    assert "NF4 vs bf16" in done.stdout
    comparison = read("results/s/comparison.json")
    assert [contrast["seeds"] for contrast in comparison["contrasts"]][:1] == [[1, 1]]
    # Nothing is left to do: it answers again, and computes nothing.
    before = {path: path.stat().st_mtime_ns for path in Path("results/s").rglob("seed_*/*.json")}
    again = subprocess.run(words(file), capture_output=True, text=True, env=environment())
    assert again.returncode == 0
    assert "NF4 vs bf16" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_failing_cell_stops_no_other(file: Path, content: dict[str, Any]) -> None:
    content["arms"]["hot"] = {"quant": "bf16", "learning_rate": 1e30, "max_grad_norm": 1e30}
    file.write_text(yaml.safe_dump({**content, "tasks": None}, sort_keys=False))
    done = subprocess.run(
        words(file, "--arms", "hot,bf16"), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 3, done.stderr
    states = {cell["name"]: cell["state"] for cell in read("results/s/study.json")["cells"]}
    assert states == {"hot/0": "failed", "bf16/0": "completed"}
    failed = [line for line in done.stdout.splitlines() if line.startswith("hot/0 failed")]
    assert len(failed) == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_one_cell_and_dry_run(file: Path) -> None:
    done = subprocess.run(
        words(file, "--score-bases", "--cell", "base_bf16"),
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    states = {cell["name"]: cell["state"] for cell in read("results/s/study.json")["cells"]}
    completed = [name for name, state in states.items() if state == "completed"]
    assert completed == ["base_bf16"]
    files = sorted(path.name for path in Path("results/s/base_bf16").glob("*.json"))
    assert files == ["evaluation_results.json", "mmlu_progress_tiny_llama_16bit_base.json"]
    dry = subprocess.run(
        words(file, "--score-bases", "--arms", "bf16", "--dry-run", "--measure-steps", "7"),
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr
    rows = [line.split() for line in dry.stdout.splitlines()]
    projected = [row for row in rows if row and row[0] in states]
    assert [row[0] for row in projected] == ["base_bf16", "bf16/0"]
    assert projected[1][3:4] == ["3"]  # steps
    assert sum(line.startswith("accelerate launch") for line in dry.stdout.splitlines()) == 1


def test_changed_settings_are_refused_once_cells_have_begun(
    file: Path, content: dict[str, Any]
) -> None:
    study = build_study({**content, "tasks": None}, {}, file)
    run_cells(study, ["nf4/0"])
    changed = {**content, "settings": {**content["settings"], "lora_r": 8}}
    file.write_text(yaml.safe_dump(changed, sort_keys=False))
    with pytest.raises(RunError) as caught:
        run([str(file)])
    assert all(part in str(caught.value) for part in ("lora_r", "4", "8", "'nf4'", "1 cell"))
    # An arm that has not begun may change, and arms and seeds may be added.
    arms = {**content["arms"], "bf16": {"quant": "bf16", "lora_r": 2}, "fp4": {"quant": "fp4"}}
    more = build_study({**content, "arms": arms, "seeds": 2}, {}, file)
    StudyFolder(more).check()
    StudyFolder(more).begin()
    states = {cell["name"]: cell["state"] for cell in read("results/s/study.json")["cells"]}
    assert states["nf4/0"] == "completed"
    assert states["nf4/1"] == states["fp4/0"] == "planned"


@pytest.fixture
def uninterrupted(file: Path, content: dict[str, Any], tmp_path: Path) -> Callable[[], None]:
    """Compares results/s with the same study run in one go."""
    whole = {**content, "name": "whole"}

    def compare() -> None:
        study, expected = build_study(content, {}, file), build_study(whole, {}, file)
        run_cells(expected, [cell.name for cell in expected.cells if cell.seed is not None])
        for cell in study.cells:
            assert is_complete(cell, study.tasks)
            if cell.seed is not None:
                assert numbers_of(cell.folder) == numbers_of(expected.cell(cell.name).folder)

    return compare


@pytest.mark.parametrize(
    "kills", [pytest.param(1, id="1"), pytest.param(20, id="20", marks=pytest.mark.slow)]
)
def test_killed_at_any_point_it_goes_on(
    file: Path, uninterrupted: Callable[[], None], kills: int
) -> None:
    chance, number = random.Random(0), 0
    while True:
        process = subprocess.Popen(
            words(file), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
        )
        if number == kills:
            break
        # Three quarters hit a worker that computes, the others the command's own start and end.
        time.sleep(chance.uniform(5, 25) if chance.random() < 0.75 else chance.uniform(0, 5))
        number += 1
        workers = psutil.Process(process.pid).children(recursive=True)
        if number % 3 == 0:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            assert process.returncode in (0, 130, -signal.SIGTERM)
        elif number % 3 == 1 or not workers:
            process.kill()
        else:  # the machine loses everything at once
            for victim in (process, *workers):
                victim.kill()
        process.wait(timeout=60)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    uninterrupted()

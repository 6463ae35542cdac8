"""A study on a tiny model: its records, its interruptions, and the cells that fail."""

from __future__ import annotations

import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from lm_eval.__main__ import cli_evaluate
from lm_eval.loggers import EvaluationTracker
from rich.console import Console
from training_runs import read

from qlora_harness.errors import RunError, SettingsError
from qlora_harness.lm_eval_compat.in_process import InProcessScorer
from qlora_harness.model.shared_base import sharing_base
from qlora_harness.schema.study_record import StudyRecord
from qlora_harness.settings import Settings
from qlora_harness.study.checks import check_study_runs
from qlora_harness.study.command import run
from qlora_harness.study.definition import Study, build_study
from qlora_harness.study.devices import Device
from qlora_harness.study.display import Display
from qlora_harness.study.folder import StudyFolder, lock_cell
from qlora_harness.study.progress import is_complete
from qlora_harness.study.projection import Probe
from qlora_harness.study.worker import CellRunner, Report
from qlora_harness.train.command import main as train
from qlora_harness.train.memory_plan import CONTEXT
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
            "model": str(tiny_llama), "dataset": str(rows), "compute_dtype": "float32",
            "max_steps": 3, "batch_size": 2, "grad_accum": 2, "optimizer": "adamw_torch",
            "checkpointing": "none", "max_length": 96, "lora_r": 4, "eval_fraction": 0.25,
            "learning_rate": 0.01, "save_steps": 1, "eval_steps": 2,
        },
        "arms": {"nf4": {"quant": "nf4"}, "bf16": {"quant": "bf16"}},
        "tasks": TASK,
    }  # fmt: skip


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


def test_cells_on_one_base_equal_separate_commands(
    file: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, unchanged_tracker: None
) -> None:
    content |= {"seeds": 2, "arms": {**content["arms"], "int8": {"quant": "int8"}}}
    study = build_study(content, {}, file)
    names = ["nf4/0", "nf4/1", "bf16/0", "bf16/1", "int8/1"]
    reports = run_cells(study, names)
    assert [r.cell for r in reports if r.state == "completed"] == names
    alone = build_study({**content, "name": "alone"}, {}, file)
    bf16, nf4, int8 = (alone.cell(f"{arm}/1") for arm in ("bf16", "nf4", "int8"))
    for cell in (bf16, int8):
        run_training(cell.settings)
        InProcessScorer([[TASK]], 16).score(cell.model_args(), cell.folder / "lm_eval")
    training, scoring = map(shlex.split, alone.commands(nf4))
    assert training[:3] == ["accelerate", "launch", "launch/train.py"]
    assert train(training[3:]) == 0
    monkeypatch.setattr("sys.argv", scoring)
    cli_evaluate()
    for cell in (bf16, nf4, int8):
        together, expected = numbers_of(study.cell(cell.name).folder), numbers_of(cell.folder)
        for key, value in expected.items():
            assert together[key] == value, f"{cell.name}: {key}"
    folders = [study.cell("nf4/1").folder, nf4.folder]
    mine, theirs = (read(next(f.glob("lm_eval/*/results_*.json"))) for f in folders)
    assert mine["results"] == theirs["results"]
    different = {k for k, v in theirs["config"].items() if mine["config"].get(k) != v}
    assert different <= {"model_args", "peft_sha"}


def states() -> dict[str, str]:
    return {cell["name"]: cell["state"] for cell in read("results/s/study.json")["cells"]}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_in_training_it_goes_on_and_answers(
    file: Path,
    content: dict[str, Any],
    uninterrupted: Callable[[], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    process = subprocess.Popen(words(file), env=environment())
    record = Path("results/s/study.json")
    wait_for(lambda: record.exists() and states()["nf4/0"] == "training")
    for victim in (process, *psutil.Process(process.pid).children(recursive=True)):
        victim.kill()
    process.wait(timeout=60)
    assert states() == {"nf4/0": "training", "bf16/0": "planned"}
    assert run([str(file), "--cell", "nf4/0", "--cell", "nf4/0"]) == 0
    assert states() == {"nf4/0": "completed", "bf16/0": "planned"}
    run_cells(build_study(content, {}, file), ["bf16/0"])
    assert states() == {"nf4/0": "completed", "bf16/0": "completed"}
    jsonschema.validate(read(record), StudyRecord.model_json_schema())
    for cell in read(record)["cells"]:
        files = sorted(path.name for path in (Path("results/s") / cell["folder"]).glob("*.json"))
        progress = [name for name in files if name.startswith("mmlu_progress_")]
        assert len(progress) == 1
        assert [name for name in files if name not in progress] == FIVE_FILES
    # Nothing is left to do: it answers, and computes nothing.
    before = {path: path.stat().st_mtime_ns for path in Path("results/s").rglob("seed_*/*.json")}
    assert "NF4 vs bf16" not in capfd.readouterr().out
    assert run([str(file)]) == 0
    assert "NF4 vs bf16" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    comparison = read("results/s/comparison.json")
    assert [contrast["seeds"] for contrast in comparison["contrasts"]][:1] == [[1, 1]]
    uninterrupted()


def test_a_failing_cell_stops_no_other(file: Path, content: dict[str, Any]) -> None:
    content["arms"] = {
        "hot": {"quant": "bf16", "learning_rate": 1e30, "max_grad_norm": 1e30},
        "bf16": {"quant": "bf16"},
    }
    study = build_study({**content, "tasks": None}, {}, file)
    reports = run_cells(study, ["hot/0", "bf16/0"])
    assert states() == {"hot/0": "failed", "bf16/0": "completed"}
    assert [r.cell for r in reports if r.state == "failed"] == ["hot/0"]


def test_a_worker_that_dies_fails_its_cell_only_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora_harness.study.pool.work", print)  # ends without a report
    assert run([str(file)]) == 3
    assert states() == {"nf4/0": "failed", "bf16/0": "failed"}
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if " failed: " in line] == ["nf4/0", "bf16/0"]


def test_a_base_has_scores_only(file: Path, content: dict[str, Any]) -> None:
    study = build_study({**content, "score_bases": True}, {}, file)
    run_cells(study, ["base_bf16"])
    assert [name for name, state in states().items() if state == "completed"] == ["base_bf16"]
    files = sorted(path.name for path in Path("results/s/base_bf16").glob("*.json"))
    assert files == ["evaluation_results.json", "mmlu_progress_tiny_llama_16bit_base.json"]
    # Its scores are those of this base, whatever becomes of the adapters.
    wide = {**content["settings"], "lora_r": 8}
    StudyFolder(build_study({**content, "score_bases": True, "settings": wide}, {}, file)).check()
    other = {**content["settings"], "compute_dtype": "bfloat16"}
    changed = build_study({**content, "score_bases": True, "settings": other}, {}, file)
    with pytest.raises(RunError) as caught:
        StudyFolder(changed).check()
    assert all(part in str(caught.value) for part in ("compute_dtype", "base_bf16", "'bf16'"))


def test_a_dry_run_leaves_nothing(
    file: Path,
    content: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--score-bases", "--arms", "bf16", "--dry-run", "--measure-steps", "0"]
    assert run([str(file), *flags]) == 0
    lines = capfd.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("base_bf16 ", "bf16/0 "))]
    assert [row[0] for row in rows] == ["base_bf16", "bf16/0"]
    assert rows[1][3:4] == ["3"]  # steps
    assert sum(line.startswith("accelerate launch") for line in lines) == 1
    study = build_study(content, {}, file)
    cell = study.cell("bf16/0")
    plan = check_study_runs(study, [Device(None, None)])["bf16"]
    reports: list[Report] = []
    trained: list[Settings] = []

    def train(settings: Settings) -> dict[str, Any]:
        trained.append(settings)
        return run_training(settings)

    monkeypatch.setattr("qlora_harness.train.run.run_training", train)
    with sharing_base():
        assert CellRunner(study, reports.append).measure(Probe(cell, plan, 5))
    assert cell.settings.run.eval_steps == 2
    assert [(one.optimization.max_steps, one.run.eval_steps) for one in trained] == [(5, None)]
    measured = reports[0].values["measurement"]
    assert min(measured.start, measured.train, measured.evaluate, measured.score) > 0
    assert not Path("results").exists()


def test_an_arm_that_does_not_fit_a_gpu_is_refused(file: Path, content: dict[str, Any]) -> None:
    study = build_study({**content, "tasks": None}, {}, file)
    plans = check_study_runs(study, [Device("0", None), Device("1", 2**40)])
    needed = int(max(plan.peak for plan in plans.values()) + CONTEXT) + 1
    check_study_runs(study, [Device("0", needed)])
    with pytest.raises(SettingsError) as caught:
        check_study_runs(study, [Device("0", 2**40), Device("1", needed - 2**20)])
    assert str(caught.value).startswith("arm '")
    settings = {**content["settings"], "compute": "fp8", "compute_dtype": "bfloat16"}
    rounded = build_study({**content, "settings": settings}, {}, file)
    with pytest.raises(SettingsError, match="--compute fp8: there is no CUDA device"):
        check_study_runs(rounded, [Device(None, None)])
    assert Device("1", None).environment(10**6) | {"OMP_NUM_THREADS": "1"} == {
        "CUDA_VISIBLE_DEVICES": "1",
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
    }


def test_states_follow_the_records(file: Path, content: dict[str, Any]) -> None:
    study = build_study({**content, "seeds": 2, "tasks": None}, {}, file)
    folder = StudyFolder(study)
    run_cells(study, ["nf4/0", "nf4/1"])
    shutil.rmtree(study.cell("nf4/1").folder)
    folder.update("nf4/0", state="scoring")  # killed before it could say that it is complete
    folder.update("bf16/0", state="training")
    folder.update("bf16/1", state="training")
    lock = lock_cell(study.cell("bf16/1"), 0.0)
    assert lock is not None  # as if another process ran it
    folder.begin()
    lock.release()
    assert states() == {
        "nf4/0": "completed", "nf4/1": "planned", "bf16/0": "interrupted", "bf16/1": "training",
    }  # fmt: skip


def test_other_data_are_refused(file: Path, content: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "own.jsonl"
    lines = Path(content["settings"]["dataset"]).read_text().splitlines(keepends=True)
    rows.write_text("".join(lines))
    content["settings"]["dataset"] = str(rows)
    study = build_study({**content, "tasks": None}, {}, file)
    run_cells(study, ["nf4/0"])
    check_study_runs(study, [Device(None, None)])
    rows.write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(RunError) as caught:
        check_study_runs(study, [Device(None, None)])
    assert all(part in str(caught.value) for part in ("nf4/0", str(rows)))


def test_records_without_the_home_folder(
    file: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(content["settings"]["model"]).parent))
    study = build_study({**content, "tasks": None}, {}, file)
    run_cells(study, ["nf4/0"])
    assert read("results/s/study.json")["arms"]["nf4"]["model"] == "~/tiny-llama"
    StudyFolder(study).check()


def test_a_folder_that_is_no_study_is_refused(
    file: Path, content: dict[str, Any], tmp_path: Path
) -> None:
    StudyFolder(build_study(content, {}, file)).begin()
    (tmp_path / "foreign/nf4/seed_0/adapter").mkdir(parents=True)
    for folder in (str(file), "results/s/nf4", "foreign"):
        study = build_study(content, {"output_dir": folder}, file)
        with pytest.raises(RunError) as caught:
            StudyFolder(study).check()
        assert folder in str(caught.value)


def test_results_of_lm_eval_are_whole_or_absent(
    file: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = build_study({**content, "score_bases": True}, {}, file)
    cell = study.cell("base_bf16")
    scorer = InProcessScorer([[TASK]], 16)

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    output = cell.folder / "lm_eval"
    monkeypatch.setattr(EvaluationTracker, "save_results_samples", killed)
    with pytest.raises(KeyboardInterrupt):
        scorer.score(cell.model_args(), output)
    monkeypatch.undo()
    monkeypatch.chdir(file.parent)
    assert not list(cell.folder.parent.rglob("results_*.json"))
    scorer.score(cell.model_args(), output)
    assert len(list(cell.folder.parent.rglob("results_*.json"))) == 1
    assert len(list(output.rglob("samples_*.jsonl"))) == 8


def test_the_table_shows_what_runs_and_fits() -> None:
    arms = {f"a{n}": {"quant": "nf4", "lora_r": n + 1} for n in range(40)}
    study = build_study({"arms": arms}, {})
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    display = Display(study.cells, {}, 1, console)
    with display.shown():
        for cell in study.cells[:30]:
            display.take(Report(cell.name, "training"))
            display.take(Report(cell.name, "failed" if cell.arm == "a3" else "completed"))
        display.take(Report("a30/0", "training"))
        console.file = io.StringIO()
        display.refresh()
        lines = console.file.getvalue().splitlines()
        console.file = io.StringIO()
    assert len(lines) <= 24
    assert [name for name in ("a3/0", "a30/0", "a31/0") if any(name in ln for ln in lines)] == [
        "a3/0", "a30/0", "a31/0",
    ]  # fmt: skip
    end = console.file.getvalue()
    assert all(f"{cell.name} " in end.replace("\x1b", " ") for cell in study.cells)


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
    # The records decide, not study.json.
    Path("results/s/study.json").unlink()
    with pytest.raises(RunError):
        run([str(file)])
    # An arm that has not begun may change, and arms and seeds may be added.
    arms = {**content["arms"], "bf16": {"quant": "bf16", "lora_r": 2}, "fp4": {"quant": "fp4"}}
    more = build_study({**content, "arms": arms, "seeds": 2, "tasks": None}, {}, file)
    StudyFolder(more).check()
    StudyFolder(more).begin()
    assert states()["nf4/0"] == "completed"
    assert states()["nf4/1"] == states()["fp4/0"] == "planned"


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


@pytest.mark.slow
def test_killed_at_20_points_it_goes_on(file: Path, uninterrupted: Callable[[], None]) -> None:
    chance, number = random.Random(0), 0
    while True:
        process = subprocess.Popen(
            words(file), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
        )
        if number == 20:
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

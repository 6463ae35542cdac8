"""May a run start in this folder, and from where? Nothing is touched to find out."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_harness.errors import ResultsError, RunError
from qlora_harness.settings import build_settings
from qlora_harness.train.run_folder import (
    StartingPoint,
    clear,
    inspect,
    missing_files,
    newest_checkpoint,
)

CHECKPOINT_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "rng_state.pth",
)
SETTINGS = build_settings({"max_steps": 8, "learning_rate": 1e-3})


def start(run_dir: Path, **options: Any) -> StartingPoint:
    before = listing(run_dir)
    chosen: dict[str, Any] = {
        "experiment": SETTINGS.experiment(),
        "resume": "auto",
        "resume_given": False,
        "overwrite": False,
    }
    try:
        return inspect(run_dir, **(chosen | options))
    finally:
        assert listing(run_dir) == before


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def refusal(run_dir: Path, **options: Any) -> str:
    with pytest.raises(RunError) as caught:
        start(run_dir, **options)
    return str(caught.value)


def write_summary(run_dir: Path, status: str, **settings: Any) -> dict[str, Any]:
    summary = {"status": status, "settings": json.loads(json.dumps(SETTINGS.flat())) | settings}
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "training_summary.json").write_text(json.dumps(summary))
    return summary


def write_checkpoint(run_dir: Path, step: int, without: str = "") -> Path:
    folder = run_dir / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in CHECKPOINT_FILES:
        if name != without:
            (folder / name).write_text("x")
    return folder


# --- fresh starts ---------------------------------------------------------------------------------


def test_missing_or_empty_folder_is_a_fresh_start(tmp_path: Path) -> None:
    assert start(tmp_path / "new") == StartingPoint()
    assert not (tmp_path / "new").exists()
    assert start(tmp_path) == StartingPoint()


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "training_logs.json"])
def test_leftovers_without_a_summary_are_not_replaced_unasked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert refusal(tmp_path) == (
        f"{tmp_path} holds {name} but no training_summary.json. "
        "Use --overwrite to replace it, or another --output-dir."
    )
    assert start(tmp_path, overwrite=True) == StartingPoint(replace=True)


def test_folder_with_other_things_in_it_is_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert start(tmp_path) == StartingPoint()


def test_output_dir_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "results"
    path.write_text("a file")
    for run_dir in (path, path / "4bit"):
        assert refusal(run_dir) == (
            f"--output-dir {run_dir}: {path} is a file. Name another folder."
        )


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_output_dir_where_nobody_can_write(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        inspect(Path("/proc/x"), experiment={}, resume="auto", resume_given=False, overwrite=True)
    assert str(caught.value).startswith("--output-dir /proc/x: /proc can't be written (")
    assert str(caught.value).endswith("). Name another folder.")


def test_output_dir_with_a_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"can't be written \(File name too long\)\. Name another"):
        inspect(
            tmp_path / ("x" * 300),
            experiment={},
            resume="auto",
            resume_given=False,
            overwrite=False,
        )


def test_damaged_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "training_summary.json").write_text('{"status": "comp')
    with pytest.raises(ResultsError, match="training_summary.json, line 1: not valid JSON"):
        start(tmp_path)


# --- completed runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"resume": "never"}, {"resume": "never", "resume_given": True}]
)
def test_completed_run_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    write_summary(tmp_path, "completed")
    write_checkpoint(tmp_path, 8)
    assert refusal(tmp_path, **options) == (
        f"{tmp_path} holds a completed run. Use --overwrite to replace it, or another --output-dir."
    )


def test_completed_run_is_replaced_with_overwrite(tmp_path: Path) -> None:
    write_summary(tmp_path, "completed")
    assert start(tmp_path, overwrite=True) == StartingPoint(replace=True)


def test_resuming_a_completed_run_has_nothing_to_do(tmp_path: Path) -> None:
    summary = write_summary(tmp_path, "completed")
    assert start(tmp_path, resume_given=True) == StartingPoint(previous=summary, nothing_to_do=True)


def test_resuming_a_completed_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    write_summary(tmp_path, "completed", learning_rate=5e-4)
    assert refusal(tmp_path, resume_given=True) == (
        f"{tmp_path} holds a run with --learning-rate 0.0005, not 0.001. Give the same value to "
        "go on, --overwrite to replace it, or another --output-dir."
    )


# --- unfinished runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_unfinished_run_goes_on_from_its_newest_checkpoint(tmp_path: Path, status: str) -> None:
    summary = write_summary(tmp_path, status)
    write_checkpoint(tmp_path, 4)
    newest = write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 9)
    assert start(tmp_path) == StartingPoint(newest, summary)


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_half_written_checkpoint_is_passed_over(tmp_path: Path, name: str) -> None:
    write_summary(tmp_path, "running")
    whole = write_checkpoint(tmp_path, 4)
    half = write_checkpoint(tmp_path, 8, without=name)
    assert missing_files(half) == [name]
    assert start(tmp_path).checkpoint == whole


def test_empty_files_do_not_make_a_whole_checkpoint(tmp_path: Path) -> None:
    write_summary(tmp_path, "running")
    whole = write_checkpoint(tmp_path, 4)
    (write_checkpoint(tmp_path, 8) / "optimizer.pt").write_text("")
    assert start(tmp_path).checkpoint == whole


def test_checkpoints_of_several_processes_have_a_state_each(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4, without="rng_state.pth")
    (folder / "rng_state_0.pth").write_text("x")
    assert missing_files(folder) == []


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-").mkdir()
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_unfinished_run_without_a_checkpoint_starts_again(tmp_path: Path, resume: str) -> None:
    write_summary(tmp_path, "interrupted")
    write_checkpoint(tmp_path, 4, without="optimizer.pt")
    assert start(tmp_path, resume=resume) == StartingPoint(replace=True)


def test_resume_never_does_not_lose_a_checkpoint(tmp_path: Path) -> None:
    write_summary(tmp_path, "interrupted")
    write_checkpoint(tmp_path, 4)
    assert refusal(tmp_path, resume="never", resume_given=True) == (
        f"{tmp_path} holds a run with status 'interrupted' and checkpoint-4. Use --resume auto to "
        "go on, --overwrite to replace it, or another --output-dir."
    )


@pytest.mark.parametrize(
    ("name", "before", "shown"),
    [
        ("learning_rate", 5e-4, "--learning-rate 0.0005, not 0.001"),
        ("quant", "bf16", "--quant bf16, not nf4"),
        ("seed", 1, "--seed 1, not 0"),
        ("max_steps", 100, "--max-steps 100, not 8"),
        ("dataset", "demo", "--dataset demo, not oasst1"),
    ],
)
def test_unfinished_run_of_another_experiment_is_refused(
    tmp_path: Path, name: str, before: object, shown: str
) -> None:
    write_summary(tmp_path, "interrupted", **{name: before})
    write_checkpoint(tmp_path, 4)
    assert refusal(tmp_path).startswith(f"{tmp_path} holds a run with {shown}. ")


@pytest.mark.parametrize(
    "change",
    [
        {"save_steps": 1},
        {"eval_batch_size": 1},
        {"report_to": "wandb"},
        {"output_dir": "elsewhere"},
        {"resume": "never"},
        {"overwrite": True},
    ],
)
def test_house_keeping_may_change(tmp_path: Path, change: dict[str, Any]) -> None:
    write_summary(tmp_path, "interrupted", **change)
    checkpoint = write_checkpoint(tmp_path, 4)
    assert start(tmp_path).checkpoint == checkpoint


# --- a checkpoint by its path ---------------------------------------------------------------------


def test_resume_from_a_path(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "elsewhere", 4)
    found = start(tmp_path / "new", resume=str(checkpoint), resume_given=True)
    assert found == StartingPoint(checkpoint, None)


def test_resume_from_an_older_checkpoint_of_the_same_run(tmp_path: Path) -> None:
    summary = write_summary(tmp_path, "interrupted")
    older = write_checkpoint(tmp_path, 4)
    write_checkpoint(tmp_path, 8)
    found = start(tmp_path, resume=str(older), resume_given=True)
    assert found == StartingPoint(older, summary)


def test_resume_from_a_path_that_is_no_whole_checkpoint(tmp_path: Path) -> None:
    half = write_checkpoint(tmp_path, 4, without="optimizer.pt")
    assert refusal(tmp_path, resume=str(half), resume_given=True) == (
        f"--resume: {half} is no whole checkpoint (missing: optimizer.pt). "
        "Name a checkpoint-N folder, or use --resume auto."
    )
    assert "is no whole checkpoint (missing: " in refusal(tmp_path, resume="nope")


def test_resume_from_a_path_needs_a_folder_named_checkpoint_n(tmp_path: Path) -> None:
    """Trainer, and our step log, read the step from the name."""
    renamed = write_checkpoint(tmp_path, 4).rename(tmp_path / "best")
    assert "Name a checkpoint-N folder" in refusal(tmp_path, resume=str(renamed), resume_given=True)


def test_resume_from_a_path_checks_the_settings_of_the_folder(tmp_path: Path) -> None:
    write_summary(tmp_path, "interrupted", seed=1)
    checkpoint = write_checkpoint(tmp_path, 4)
    assert "--seed 1, not 0" in refusal(tmp_path, resume=str(checkpoint), resume_given=True)


def test_overwrite_does_not_delete_the_checkpoint_to_resume_from(tmp_path: Path) -> None:
    write_summary(tmp_path, "interrupted")
    checkpoint = write_checkpoint(tmp_path, 4)
    line = refusal(tmp_path, resume=str(checkpoint), resume_given=True, overwrite=True)
    assert "--overwrite" in line and "--resume" in line


# --- clearing -------------------------------------------------------------------------------------


def test_clear_removes_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    write_summary(tmp_path, "completed")
    write_checkpoint(tmp_path, 4)
    (tmp_path / "adapter").mkdir()
    for name in (
        "training_logs.json",
        "trainer_state.json",
        "evaluation_results.json",
        "mmlu_progress_llama_4bit_qlora.json",
        "notes.txt",
    ):
        (tmp_path / name).write_text("x")
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    shutil.rmtree(tmp_path)
    clear(tmp_path)


def test_clear_removes_scores_of_the_adapter_that_goes(tmp_path: Path) -> None:
    output = tmp_path / "lm_eval" / "model"
    output.mkdir(parents=True)
    for name in ("results_2026.json", "samples_mmlu_2026.jsonl", "notes.txt"):
        (output / name).write_text("{}")
    clear(tmp_path)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_a_run_that_is_still_going_on_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        write_summary(tmp_path, "running")
        path = tmp_path / "training_summary.json"
        process = {"id": other.pid, "host": socket.gethostname()}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"process": process}))
        line = refusal(tmp_path)
        assert f"still going on (process {other.pid})" in line
        assert other.stdin is not None
        other.stdin.close()
        other.wait()
    assert start(tmp_path) == StartingPoint(replace=True)

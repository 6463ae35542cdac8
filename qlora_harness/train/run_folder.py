"""The run folder: may this run start here, and from which checkpoint?"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qlora_harness.errors import RunError
from qlora_harness.flag_checks import why_not_writable
from qlora_harness.model.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from qlora_harness.record import (
    ADAPTER_DIR,
    CHECKPOINT_DIR,
    EVALUATION_FILE,
    LOGS_FILE,
    SUMMARY_FILE,
    TRAINER_STATE_FILE,
    nested,
    read_json,
    scrub_all,
)

_STEP = re.compile(r"^checkpoint-\d+$")
_CHECKPOINT_FILES = (
    WEIGHTS_FILE,
    CONFIG_FILE,
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
)


@dataclass(frozen=True)
class StartingPoint:
    """What to do in a run folder.

    Attributes:
        checkpoint: Go on from here, or None for a fresh start.
        previous: The summary of the run that is gone on with, or None.
        replace: Whether the folder's files are removed before the first step.
        nothing_to_do: Whether the run is complete already.
    """

    checkpoint: Path | None = None
    previous: dict[str, Any] | None = None
    replace: bool = False
    nothing_to_do: bool = False


def inspect(
    run_dir: Path,
    *,
    experiment: Mapping[str, Any],
    resume: str,
    resume_given: bool,
    overwrite: bool,
) -> StartingPoint:
    """Decides how a run starts, without touching anything.

    Args:
        run_dir: The run folder; need not exist.
        experiment: The settings that a resumed run must share.
        resume: "auto", "never", or a checkpoint folder.
        resume_given: Whether the user asked for it (a completed run is only looked at then).
        overwrite: Whether the folder may be replaced.

    Raises:
        RunError: The folder holds a run that would be lost, or that can't be gone on with.
    """
    if reason := why_not_writable(run_dir):
        raise RunError(f"--output-dir {run_dir}: {reason}", "Name another folder")
    if overwrite and resume not in ("auto", "never"):
        raise RunError(
            f"--overwrite removes what --resume {resume} goes on from", "Give one of the two"
        )
    if overwrite:
        return StartingPoint(replace=True)
    summary_path = run_dir / SUMMARY_FILE
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        if checkpoint.is_dir() and not _STEP.search(checkpoint.name):
            raise RunError(
                f"--resume: {resume} does not say its step", "Name a checkpoint-N folder"
            )
        if missing := missing_files(checkpoint):
            raise RunError(
                f"--resume: {resume} is no whole checkpoint (missing: {', '.join(missing)})",
                "Name a checkpoint-N folder, or use --resume auto",
            )
        previous = read_json(summary_path) if summary_path.is_file() else None
        if previous is not None:
            _same_experiment(run_dir, previous, experiment)
        return StartingPoint(checkpoint, previous)
    if not summary_path.is_file():
        leftover = [n for n in (ADAPTER_DIR, CHECKPOINT_DIR, LOGS_FILE) if (run_dir / n).exists()]
        if leftover:
            raise RunError(
                f"{run_dir} holds {leftover[0]} but no {SUMMARY_FILE}",
                "Use --overwrite to replace it, or another --output-dir",
            )
        return StartingPoint()
    previous = read_json(summary_path)
    status = previous.get("status")
    if status == "running" and _is_alive(previous):
        raise RunError(
            f"{run_dir} belongs to a run that is still going on (process "
            f"{nested(previous, 'process', 'id')})",
            "Wait for it, stop it, or use another --output-dir",
        )
    if status == "completed" and not (resume_given and resume == "auto"):
        raise RunError(
            f"{run_dir} holds a completed run",
            "Use --overwrite to replace it, or another --output-dir",
        )
    if status == "completed":
        _same_experiment(run_dir, previous, experiment)
        return StartingPoint(previous=previous, nothing_to_do=True)
    newest = newest_checkpoint(run_dir / CHECKPOINT_DIR)
    if newest is None:
        return StartingPoint(replace=True)
    if resume == "never":
        raise RunError(
            f"{run_dir} holds a run with status {status!r} and {newest.name}",
            "Use --resume auto to go on, --overwrite to replace it, or another --output-dir",
        )
    _same_experiment(run_dir, previous, experiment)
    return StartingPoint(newest, previous)


def _is_alive(summary: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a summary still runs on this machine."""
    process = nested(summary, "process", "id")
    here = nested(summary, "process", "host") == socket.gethostname()
    if not here or not isinstance(process, int) or process == os.getpid():
        return False
    return bool(psutil.pid_exists(process))


def _same_experiment(
    run_dir: Path, previous: Mapping[str, Any], experiment: Mapping[str, Any]
) -> None:
    before = nested(previous, "settings") or {}
    for name, value in experiment.items():
        if name in before and before[name] != scrub_all(value):
            raise RunError(
                f"{run_dir} holds a run with --{name.replace('_', '-')} {before[name]}, "
                f"not {value}",
                "Give the same value to go on, --overwrite to replace it, or another --output-dir",
            )


def missing_files(checkpoint: Path) -> list[str]:
    """Returns the files that a checkpoint lacks to be resumed from.

    Args:
        checkpoint: A checkpoint-N folder.
    """
    missing = [
        name
        for name in _CHECKPOINT_FILES
        if not (checkpoint / name).is_file() or not (checkpoint / name).stat().st_size
    ]
    if not any(checkpoint.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    return missing


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the whole checkpoint of the highest step; half-written ones are passed over.

    Args:
        folder: The folder of checkpoint-N folders.
    """
    numbered = [
        (checkpoint_step(p), p) for p in folder.glob("checkpoint-*") if _STEP.search(p.name)
    ]
    for _, path in sorted(numbered, reverse=True):
        if not missing_files(path):
            return path
    return None


def checkpoint_step(checkpoint: Path) -> int:
    """Returns the step of a checkpoint-N folder.

    Args:
        checkpoint: The folder.
    """
    return int(checkpoint.name.rsplit("-", 1)[1])


def clear(run_dir: Path) -> None:
    """Removes what an earlier run left in the folder, and nothing else.

    Args:
        run_dir: The run folder.
    """
    for name in (ADAPTER_DIR, CHECKPOINT_DIR):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in (SUMMARY_FILE, LOGS_FILE, TRAINER_STATE_FILE, EVALUATION_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for pattern in ("mmlu_progress_*.json", ".mmlu_progress_*.jsonl*"):
        for path in run_dir.glob(pattern):
            path.unlink()
    # lm_eval's output below the folder is about the adapter that goes.
    for pattern in ("results_*.json", "samples_*.jsonl"):
        for path in run_dir.rglob(pattern):
            path.unlink()

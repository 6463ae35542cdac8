"""The run folder: may this run start here, and from which checkpoint?"""

from __future__ import annotations

import contextlib
import glob
import json
import reprlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_harness.errors import ResultsError, RunError
from qlora_harness.flag_checks import why_not_writable
from qlora_harness.model.adapter_folder import RECORD_FILE, adapter_digest
from qlora_harness.record import (
    ADAPTER_DIR,
    CHECKPOINT_DIR,
    EVALUATION_FILE,
    LOGS_FILE,
    SUMMARY_FILE,
    TRAINER_STATE_FILE,
    nested,
    remove_leftovers,
    scrub_all,
)
from qlora_harness.schema.section import read_record
from qlora_harness.schema.training import TrainingLog, TrainingSummary
from qlora_harness.settings import Settings, setting_fields
from qlora_harness.train.checkpoints import (
    all_checkpoints,
    fault,
    is_checkpoint_name,
    newest_whole,
)
from qlora_harness.train.process import is_running

LOCK_FILE = ".qlora_harness.lock"
STALE = "replaced_"  # before the names of lm_eval's files about an adapter that was replaced

_STATUSES = ("running", "completed", "interrupted", "failed")
_RECORD_TYPES: dict[tuple[str, ...], type | tuple[type, ...]] = {
    ("started",): str,
    ("process",): dict,
    ("process", "id"): int,
    ("process", "host"): str,
    ("process", "started"): (int, float),
    ("model", "weights_fingerprint"): str,
    ("quantization", "compute_dtype"): str,
    ("data", "train", "fingerprint"): str,
    ("computation",): dict,
    ("runtime", "train_seconds"): (int, float),
    ("results", "steps"): int,
    ("results", "final_train_loss"): (int, float),
    ("results", "eval_loss"): (int, float),
    ("results", "perplexity"): (int, float),
    ("throughput", "tokens_per_second"): (int, float),
    ("memory", "peak_allocated_bytes"): int,
    ("memory", "peak_managed_bytes"): int,
    ("memory", "cpu_peak_rss_bytes"): int,
}


@dataclass(frozen=True)
class StartingPoint:
    """What to do in a run folder.

    Attributes:
        checkpoint: Resume from here, or None for a fresh start.
        previous: The summary of the run that the checkpoint belongs to, or None.
        replace: Whether the folder's files are removed before the first step.
        nothing_to_do: Whether the run is complete already.
        notes: What to tell the user: newer checkpoints that can't be read, one line each.
    """

    checkpoint: Path | None = None
    previous: dict[str, Any] | None = None
    replace: bool = False
    nothing_to_do: bool = False
    notes: tuple[str, ...] = ()


def inspect(
    run_dir: Path, settings: Settings, *, resume_given: bool, has_lock: bool = False
) -> StartingPoint:
    """Decides how a run starts, without touching anything.

    Args:
        run_dir: The run folder; need not exist.
        settings: Of the new run.
        resume_given: Whether --resume was given (a completed run is only looked at then).
        has_lock: Whether this process has the folder's lock.

    Raises:
        RunError: The folder is in use, holds a run that would be lost, or one that can't be
            resumed.
    """
    if reason := why_not_writable(run_dir):
        raise RunError(f"--output-dir {run_dir}: {reason}", "Name another folder")
    if not has_lock and is_locked(run_dir):
        raise _in_use(run_dir)
    resume, overwrite = settings.run.resume, settings.run.overwrite
    named = None if resume in ("auto", "never") else Path(resume)
    if overwrite and named is not None and named.resolve().is_relative_to(run_dir.resolve()):
        raise RunError(
            f"--overwrite removes the checkpoint of --resume {named}", "Give one of the two"
        )
    previous = _read_run(run_dir)
    if previous is None:
        _refuse_leftovers(run_dir)
    elif previous["status"] == "running" and is_running(
        previous.get("process") or {}, previous.get("started")
    ):
        raise _in_use(run_dir, f"process {nested(previous, 'process', 'id')}")
    if (run_dir / ADAPTER_DIR).exists() and not (run_dir / ADAPTER_DIR / RECORD_FILE).is_file():
        raise RunError(
            f"{run_dir / ADAPTER_DIR} is in the way: qlora-harness did not make it",
            "Move it, or use another --output-dir",
        )
    if named is not None:
        return _from_checkpoint(run_dir, named, previous, settings)
    if previous is None:
        return StartingPoint()
    if overwrite:
        return StartingPoint(replace=True)
    if previous["status"] == "completed":
        if not (resume_given and resume == "auto"):
            raise _completed(run_dir)
        _check_same_experiment(run_dir, previous, settings)
        return StartingPoint(previous=previous, nothing_to_do=True)
    newest, passed_over = newest_whole(run_dir / CHECKPOINT_DIR)
    if newest is None:
        return StartingPoint(replace=True, notes=tuple(passed_over))
    if resume == "never":
        raise RunError(
            f"{run_dir} holds a run with status {previous['status']!r} and {newest.name}",
            "Use --resume auto to resume it, --overwrite to replace it, or another --output-dir",
        )
    _check_same_experiment(run_dir, previous, settings)
    return StartingPoint(newest, previous, notes=tuple(passed_over))


def _from_checkpoint(
    run_dir: Path, checkpoint: Path, previous: Mapping[str, Any] | None, settings: Settings
) -> StartingPoint:
    """Resumes from a checkpoint that was named, of this run or of another one."""
    if not is_checkpoint_name(checkpoint.name):
        raise RunError(
            f"--resume: {checkpoint} does not say its step", "Name a checkpoint-N folder"
        )
    if problem := fault(checkpoint):
        raise RunError(
            f"--resume: {checkpoint} is no whole checkpoint ({problem})",
            "Name another checkpoint-N folder, or use --resume auto",
        )
    owner = run_of(checkpoint)
    source = _read_run(owner)
    if source is None:
        raise RunError(
            f"--resume: {owner} holds no {SUMMARY_FILE}, which says how {checkpoint.name} was made",
            "Name a checkpoint in its own run folder",
        )
    _check_same_experiment(owner, source, settings)
    replace = False
    if previous is not None and owner.resolve() != run_dir.resolve():
        if not settings.run.overwrite:
            raise RunError(
                f"{run_dir} holds another run than {checkpoint} belongs to",
                "Use --overwrite to replace it, or another --output-dir",
            )
        replace = True
    elif previous is not None and previous["status"] == "completed":
        raise _completed(run_dir)
    return StartingPoint(checkpoint, source, replace)


def run_of(checkpoint: Path) -> Path:
    """Returns the run folder that a checkpoint belongs to.

    Args:
        checkpoint: A checkpoint-N folder.
    """
    return checkpoint.absolute().parent.parent


def _in_use(run_dir: Path, holder: str = "it is locked") -> RunError:
    return RunError(
        f"{run_dir} belongs to a run that is still training ({holder})",
        "Wait for it, stop it, or use another --output-dir",
    )


def _completed(run_dir: Path) -> RunError:
    return RunError(
        f"{run_dir} holds a completed run", "Use --overwrite to replace it, or another --output-dir"
    )


def _refuse_leftovers(run_dir: Path) -> None:
    """Without a summary nothing says whose files these are, so they are never replaced."""
    for name in (ADAPTER_DIR, CHECKPOINT_DIR, LOGS_FILE, TRAINER_STATE_FILE):
        if (run_dir / name).exists():
            raise RunError(
                f"{run_dir} holds {name} but no {SUMMARY_FILE}, so nothing says which run made it",
                "Move it, or use another --output-dir",
            )


def _read_run(run_dir: Path) -> dict[str, Any] | None:
    """The summary in a run folder, checked as far as training reads it; None without one."""
    path = run_dir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        summary = read_record(path, TrainingSummary)
    except ResultsError as error:
        raise RunError(error.problem, "Restore it, or use another --output-dir") from None
    return summary.model_dump(mode="json", exclude_unset=True)


def read_steps(run_dir: Path, last: int) -> list[dict[str, Any]]:
    """Returns the rows of a run's step log, up to a step.

    Args:
        run_dir: The run folder.
        last: The last step that is wanted.

    Raises:
        RunError: The log is damaged.
    """
    log = read_log(run_dir)
    if log is None:
        return []
    if any(not row.seconds for row in log.steps):
        raise RunError(
            f"{run_dir / LOGS_FILE}: a step has no seconds, so the log is damaged",
            "Restore it, or use another --output-dir",
        )
    return [row.model_dump(exclude_unset=True) for row in log.steps if row.step <= last]


def read_log(run_dir: Path) -> TrainingLog | None:
    """Reads a run's step log; None without one.

    Args:
        run_dir: The run folder.

    Raises:
        RunError: The log is damaged.
    """
    path = run_dir / LOGS_FILE
    if not path.is_file():
        return None
    try:
        return read_record(path, TrainingLog)
    except ResultsError as error:
        raise RunError(error.problem, "Restore it, or use another --output-dir") from None


def _check_same_experiment(run_dir: Path, previous: Mapping[str, Any], settings: Settings) -> None:
    before = dict(previous["settings"])
    recorded = nested(previous, "quantization", "compute_dtype")
    if recorded is not None:
        before["compute_dtype"] = recorded
    known = setting_fields()
    for name, value in settings.experiment().items():
        # "auto" takes what the run was begun with.
        if name == "compute_dtype" and value == "auto":
            continue
        old = before.get(name, known[name][1].default)
        if old != scrub_all(value):
            shown = reprlib.repr(old).strip("'")
            raise RunError(
                f"{run_dir} holds a run with --{name.replace('_', '-')} {shown}, not {value}",
                "Give the same value to resume it, or use another --output-dir",
            )


def is_locked(run_dir: Path) -> bool:
    """Returns whether a process trains in a run folder.

    Args:
        run_dir: The run folder; need not exist.
    """
    if not (run_dir / LOCK_FILE).is_file():
        return False
    lock = FileLock(run_dir / LOCK_FILE)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # this file system has no locks
        return False


def lock(run_dir: Path) -> FileLock:
    """Takes the lock of a run folder; the system frees it when the process ends, however it does.

    Args:
        run_dir: Made if missing.

    Returns:
        The lock, to be released.

    Raises:
        RunError: Another process has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    held = FileLock(run_dir / LOCK_FILE)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise _in_use(run_dir) from None
    except NotImplementedError:  # this file system has no locks
        pass
    return held


def remove_temporary_files(run_dir: Path) -> None:
    """Removes what a training run left half written when it was killed.

    Args:
        run_dir: The run folder, locked by this process.
    """
    for name in (SUMMARY_FILE, LOGS_FILE, TRAINER_STATE_FILE):
        remove_leftovers(run_dir / name)
        (run_dir / f".{name}.tmp").unlink(missing_ok=True)
    for path in run_dir.glob(f".{ADAPTER_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)


def clear(run_dir: Path) -> None:
    """Removes what an earlier run made in its folder, and nothing else.

    lm_eval's results about its adapter are renamed, as they would speak of the next one.

    Args:
        run_dir: A run folder that `inspect` has checked.
    """
    _set_stale_results_aside(run_dir)
    if (run_dir / ADAPTER_DIR / RECORD_FILE).is_file():
        shutil.rmtree(run_dir / ADAPTER_DIR)
    for checkpoint in all_checkpoints(run_dir / CHECKPOINT_DIR):
        shutil.rmtree(checkpoint)
    with contextlib.suppress(OSError):  # somebody else's files stay
        (run_dir / CHECKPOINT_DIR).rmdir()
    for name in (LOGS_FILE, TRAINER_STATE_FILE, EVALUATION_FILE, SUMMARY_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for pattern in ("mmlu_progress_*.json", ".mmlu_progress_*.jsonl*"):
        for path in run_dir.glob(pattern):
            path.unlink()


def _set_stale_results_aside(run_dir: Path) -> None:
    adapter = run_dir / ADAPTER_DIR
    try:
        digest = adapter_digest(adapter)
    except OSError:
        digest = None
    for path in sorted(run_dir.rglob("results_*.json")):
        if not _is_about(path, adapter, digest):
            continue
        written = path.stem.removeprefix("results_")
        samples = path.parent.glob(f"samples_*_{glob.escape(written)}.jsonl")
        for stale in (path, *samples):
            stale.rename(stale.with_name(STALE + stale.name))


def _is_about(path: Path, adapter: Path, digest: str | None) -> bool:
    """Whether lm_eval wrote a file about an adapter: it names its digest or its folder."""
    try:
        config = json.loads(path.read_bytes())["config"]
        arguments = config["model_args"]
        if isinstance(arguments, str):
            pairs = [pair.partition("=") for pair in arguments.split(",")]
            arguments = {key: value for key, _, value in pairs}
        named = arguments.get("peft")
        if digest is not None and config.get("peft_sha") == digest:
            return True
        return isinstance(named, str) and Path(named).resolve() == adapter.resolve()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False

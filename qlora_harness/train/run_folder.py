"""The run folder: whether a run may start there, and from which checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_harness.errors import ResultsError, RunError
from qlora_harness.flag_checks import why_not_writable
from qlora_harness.model.adapter_folder import RECORD_FILE, adapter_digest
from qlora_harness.model.adapter_starts import START_FILE
from qlora_harness.record import (
    ADAPTER_DIR,
    CHECKPOINT_DIR,
    EVALUATION_FILE,
    LOGS_FILE,
    PROGRESS_FILES,
    SUMMARY_FILE,
    TRAINER_STATE_FILE,
    nested,
    remove_leftovers,
    scrub_all,
)
from qlora_harness.schema.section import read_record
from qlora_harness.schema.training_records import EvaluationLosses, TrainingLog, TrainingSummary
from qlora_harness.settings import Settings, flag_of, setting_fields
from qlora_harness.train.checkpoints import (
    all_checkpoints,
    checkpoint_step,
    fault,
    is_checkpoint_name,
    newest_intact,
    run_of,
)
from qlora_harness.train.process import restarts

LOCK_FILE = ".qlora_harness.lock"
STALE = "replaced_"  # prefix for lm_eval's files about a replaced adapter


@dataclass(frozen=True)
class StartingPoint:
    """How a run starts."""

    checkpoint: Path | None = None  # None for a fresh start
    previous: dict[str, Any] | None = None  # summary of the checkpoint's run
    replace: bool = False  # remove the earlier run's files
    nothing_to_do: bool = False  # the run is complete
    notes: tuple[str, ...] = ()  # newer checkpoints with their faults

    def recorded(self, *keys: str) -> Any:
        """Returns what a resumed run recorded under nested keys, or None."""
        return None if self.checkpoint is None else nested(self.previous or {}, *keys)

    def check_same(self, run_dir: Path, now: object, *keys: str) -> None:
        """Raises RunError if a resumed run recorded another value than `now` under the keys."""
        before = self.recorded(*keys)
        if before not in (None, now):
            raise RunError(
                f"{run_dir} holds a run whose {'.'.join(keys)} was {before} and is now {now}",
                "Undo the change (perhaps of qlora-harness's version), use --overwrite to start "
                "again, or another --output-dir",
            )


def find_start(
    run_dir: Path,
    settings: Settings,
    processes: int = 1,
    *,
    resume_given: bool,
    has_lock: bool = False,
) -> StartingPoint:
    """Decides how a run starts in a number of processes, without touching anything.

    Raises RunError if the folder is locked, or holds a run that would be lost or can't go on.
    """
    resume, overwrite = settings.run.resume, settings.run.overwrite
    named = None if resume in ("auto", "never") else Path(resume)
    if reason := why_not_writable(run_dir):
        raise RunError(f"--output-dir {run_dir}: {reason}", "Name another folder")
    if not has_lock and (run_dir / LOCK_FILE).is_file():
        lock_run_folder(run_dir).release()
    if overwrite and named is not None and named.resolve().is_relative_to(run_dir.resolve()):
        raise RunError(
            f"--overwrite would remove the checkpoint of --resume {named}", "Give one of the two"
        )
    previous = _read_summary(run_dir)
    _refuse_unrecorded_files(run_dir, previous)
    if named is not None:
        return _from_checkpoint(run_dir, named, previous, settings, processes)
    # A run that torchrun restarts resumes: --overwrite would remove its own checkpoints.
    goes_on = restarts() > 0 and previous is not None and previous["status"] != "completed"
    if previous is None or (overwrite and not goes_on):
        return StartingPoint(replace=previous is not None)
    if previous["status"] != "completed":
        return _from_newest(run_dir, previous, settings, processes)
    if not (resume_given and resume == "auto"):
        raise _completed(run_dir)
    _check_same_experiment(run_dir, previous, settings, processes)
    return StartingPoint(previous=previous, nothing_to_do=True)


def _from_newest(
    run_dir: Path, previous: dict[str, Any], settings: Settings, processes: int
) -> StartingPoint:
    """Resumes an unfinished run, or starts it again if it has no checkpoint."""
    newest, faults = newest_intact(run_dir / CHECKPOINT_DIR)
    if newest is None:
        return StartingPoint(replace=True, notes=tuple(faults))
    if settings.run.resume == "never":
        raise RunError(
            f"{run_dir} holds a run with status {previous['status']!r} and {newest.name}",
            "Use --resume auto to resume it, --overwrite to replace it, or another --output-dir",
        )
    _check_same_experiment(run_dir, previous, settings, processes)
    return StartingPoint(newest, previous, notes=tuple(faults))


def _from_checkpoint(
    run_dir: Path,
    checkpoint: Path,
    previous: Mapping[str, Any] | None,
    settings: Settings,
    processes: int,
) -> StartingPoint:
    """Resumes from the checkpoint that --resume names, which may belong to another run."""
    if not is_checkpoint_name(checkpoint.name):
        raise RunError(
            f"--resume: {checkpoint} has no step in its name", "Name a checkpoint-N folder"
        )
    if problem := fault(checkpoint):
        raise RunError(
            f"--resume: {checkpoint} is not an intact checkpoint ({problem})",
            "Name another checkpoint-N folder, or use --resume auto",
        )
    owner = run_of(checkpoint)
    summary = _read_summary(owner)
    if summary is None:
        raise RunError(
            f"--resume: {owner} holds no {SUMMARY_FILE}, which says how {checkpoint.name} was made",
            "Name a checkpoint in its own run folder",
        )
    _check_same_experiment(owner, summary, settings, processes)
    replace = previous is not None and owner.resolve() != run_dir.resolve()
    if replace and not settings.run.overwrite:
        raise RunError(
            f"{run_dir} holds a different run from that of {checkpoint}",
            "Use --overwrite to replace it, or another --output-dir",
        )
    if previous is not None and not replace and previous["status"] == "completed":
        raise _completed(run_dir)
    return StartingPoint(checkpoint, summary, replace)


def _completed(run_dir: Path) -> RunError:
    return RunError(
        f"{run_dir} holds a completed run", "Use --overwrite to replace it, or another --output-dir"
    )


def _refuse_unrecorded_files(run_dir: Path, previous: Mapping[str, Any] | None) -> None:
    """Raises RunError for files that no record of ours accounts for; they are never replaced."""
    for name in (ADAPTER_DIR, CHECKPOINT_DIR, LOGS_FILE, TRAINER_STATE_FILE):
        if previous is None and (run_dir / name).exists():
            raise RunError(
                f"{run_dir} holds {name} but no {SUMMARY_FILE} that says which run made it",
                "Move it, or use another --output-dir",
            )
    adapter = run_dir / ADAPTER_DIR
    if adapter.exists() and not (adapter / RECORD_FILE).is_file():
        raise RunError(
            f"{adapter} was not made by qlora-harness",
            "Move it, or use another --output-dir",
        )


def _read_summary(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        summary = read_record(path, TrainingSummary)
    except ResultsError as error:
        raise RunError(error.problem, "Restore it, or use another --output-dir") from None
    return summary.model_dump(mode="json", exclude_unset=True)


def earlier_steps(checkpoint: Path) -> tuple[list[dict[str, Any]], EvaluationLosses]:
    """Returns the steps and evaluations up to a checkpoint; RunError if the step log is damaged."""
    path, losses = run_of(checkpoint) / LOGS_FILE, EvaluationLosses()
    if not path.is_file():
        return [], losses
    remedy = "Restore it, or use another --output-dir"
    try:
        log = read_record(path, TrainingLog)
    except ResultsError as error:
        raise RunError(error.problem, remedy) from None
    if any(not row.seconds for row in log.steps):
        raise RunError(f"{path} is damaged: a step has no seconds", remedy)
    last = checkpoint_step(checkpoint)
    rows = [row.model_dump(exclude_unset=True) for row in log.steps if row.step <= last]
    if log.evaluation.nll_before:
        losses.nll_before, losses.tokens = log.evaluation.nll_before, log.evaluation.tokens
    if during := [point for point in log.evaluation.during if point.step <= last]:
        losses.during, losses.tokens = during, log.evaluation.tokens
    return rows, losses


def _check_same_experiment(
    run_dir: Path, previous: Mapping[str, Any], settings: Settings, processes: int
) -> None:
    before = nested(previous, "environment", "world_size") or processes
    if before != processes:
        # The examples of a step stay the same if as many are computed at a time in all processes.
        accumulated = nested(previous, "settings", "grad_accum") * before
        settings = _same_step(run_dir, settings, before, processes, accumulated)
    for name, old, value in changed_settings(previous, settings):
        short = reprlib.repr(old).strip("'")
        raise RunError(
            f"{run_dir} holds a run with {flag_of(name)} {short}, not {value}",
            "Give the same value to resume it, or use another --output-dir",
        )


def _same_step(
    run_dir: Path, settings: Settings, before: int, processes: int, accumulated: int
) -> Settings:
    """Returns settings with the passes of a step as they were, or raises RunError."""
    optimization = settings.optimization
    if optimization.grad_accum * processes != accumulated:
        count = accumulated / processes
        raise RunError(
            f"{run_dir} holds a run of {before} processes, and this one has {processes} with "
            f"--grad-accum {optimization.grad_accum}: a step would have other examples",
            f"Use --grad-accum {count:g}, or {before} processes"
            if count.is_integer()
            else f"Use {before} processes",
        )
    optimization = dataclasses.replace(optimization, grad_accum=accumulated // before)
    return dataclasses.replace(settings, optimization=optimization)


def changed_settings(
    previous: Mapping[str, Any], settings: Settings
) -> Iterator[tuple[str, Any, Any]]:
    """Yields name, old (or default) and new value of settings that differ from the summary's."""
    before = dict(previous["settings"])
    if dtype := nested(previous, "quantization", "compute_dtype"):
        before["compute_dtype"] = dtype
    known = setting_fields()
    for name, value in settings.experiment().items():
        if name == "compute_dtype" and value == "auto":
            continue  # the resumed run's dtype will be used
        old = before.get(name, known[name][1].default)
        if old != scrub_all(value):
            yield name, old, value


def lock_run_folder(run_dir: Path) -> FileLock:
    """Creates and locks a run folder; raises RunError if another process has the lock.

    The lock ends with the process, however that ends.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK_FILE)
    try:
        with contextlib.suppress(NotImplementedError):  # this file system has no locks
            lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"a run is still training in {run_dir} (it is locked)",
            "Wait for it, stop it, or use another --output-dir",
        ) from None
    return lock


def remove_temporary_files(run_dir: Path) -> None:
    """Removes half-written files of a killed run; this process must hold the folder's lock."""
    for name in (SUMMARY_FILE, LOGS_FILE, TRAINER_STATE_FILE):
        remove_leftovers(run_dir / name)
        (run_dir / f".{name}.tmp").unlink(missing_ok=True)
    (run_dir / CHECKPOINT_DIR / f".{START_FILE}.tmp").unlink(missing_ok=True)
    for path in run_dir.glob(f".{ADAPTER_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)


def clear_run_folder(run_dir: Path) -> None:
    """Removes the files of an earlier run and no others.

    lm_eval's results about its adapter are renamed, so that they don't pass for the next one's.
    """
    _rename_stale_results(run_dir)
    if (run_dir / ADAPTER_DIR / RECORD_FILE).is_file():
        shutil.rmtree(run_dir / ADAPTER_DIR)
    for checkpoint in all_checkpoints(run_dir / CHECKPOINT_DIR):
        shutil.rmtree(checkpoint)
    (run_dir / CHECKPOINT_DIR / START_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: other files stay
        (run_dir / CHECKPOINT_DIR).rmdir()
    for name in (LOGS_FILE, TRAINER_STATE_FILE, EVALUATION_FILE, SUMMARY_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for pattern in (PROGRESS_FILES, ".mmlu_progress_*.jsonl*"):
        for path in run_dir.glob(pattern):
            path.unlink()


def _rename_stale_results(run_dir: Path) -> None:
    adapter = run_dir / ADAPTER_DIR
    try:
        digest = adapter_digest(adapter)
    except OSError:
        digest = None
    for path in sorted(run_dir.rglob("results_*.json")):
        if not _is_about(path, adapter, digest):
            continue
        date = path.stem.removeprefix("results_")
        samples = path.parent.glob(f"samples_*_{glob.escape(date)}.jsonl")
        for stale in (path, *samples):
            stale.rename(stale.with_name(STALE + stale.name))


def _is_about(path: Path, adapter: Path, digest: str | None) -> bool:
    """Whether lm_eval's results name an adapter, by its digest or its folder."""
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

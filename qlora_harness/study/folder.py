"""study.json and the logs of a study; several processes may write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_harness.errors import RunError
from qlora_harness.flag_checks import why_not_writable
from qlora_harness.record import now, remove_leftovers, scrub_all, write_json
from qlora_harness.schema.section import read_record
from qlora_harness.schema.study_record import CellRecord, StudyRecord
from qlora_harness.settings import Settings
from qlora_harness.study.definition import Cell, Study
from qlora_harness.study.progress import changes, is_complete, status_of
from qlora_harness.train.run_folder import find_start

STUDY_FILE = "study.json"
LOGS_DIR = "logs"
_LOCK = ".study.lock"


class StudyFolder:
    """The folder of a study; every change of study.json happens under a lock."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.path = study.folder / STUDY_FILE
        self._lock = FileLock(study.folder / _LOCK)

    def read(self) -> StudyRecord | None:
        """Reads study.json; None before the first start. Raises ResultsError."""
        return read_record(self.path, StudyRecord) if self.path.exists() else None

    def check(self) -> None:
        """Raises RunError if the study can't continue in its folder with these settings."""
        self._check_place()
        record = self.read()
        for arm in self.study.arms():
            begun = {
                cell.name: different
                for cell in self.study.cells
                if cell.arm == arm and (different := list(changes(cell, record)))
            }
            if begun:
                first, *others = next(iter(begun.values()))
                more = f" (and {len(others)} more)" if others else ""
                count = "1 cell" if len(begun) == 1 else f"{len(begun)} cells"
                raise RunError(
                    f"{self.study.folder}: {first} in arm {arm!r}{more}; {count} would have to "
                    f"run again: {', '.join(begun)}",
                    "Undo the change, rename the arm or the study, or remove the folders of these "
                    "cells",
                )
        for cell in self.study.cells:
            if cell.seed is not None and status_of(cell) != "completed":
                find_start(cell.folder, cell.settings, resume_given=False, has_lock=True)

    def _check_place(self) -> None:
        folder = self.study.folder
        if reason := why_not_writable(folder):
            raise RunError(f"{folder}: {reason}", "Name another folder with --output-dir")
        for parent in folder.resolve().parents:
            if (parent / STUDY_FILE).exists():
                raise RunError(
                    f"{folder} is inside another study, {parent}",
                    "Name another folder with --output-dir",
                )

    def begin(self) -> None:
        """Writes the plan, with the state of each cell as its records show it."""
        self.study.folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            remove_leftovers(self.path)
            before = self.read() or StudyRecord(
                name=self.study.name, created=now(), updated=now(), arms={}, cells=[]
            )
            known = {cell.name: cell for cell in before.cells}
            cells = [self._planned(cell, known.pop(cell.name, None)) for cell in self.study.cells]
            record = StudyRecord(
                name=self.study.name,
                created=before.created,
                updated=now(),
                tasks=list(self.study.tasks),
                batch_size=self.study.batch_size,
                arms=before.arms | {arm: _shared(s) for arm, s in self.study.arms().items()},
                cells=[*cells, *known.values()],
                seconds=before.seconds,
            )
            self._write(record)

    def _planned(self, cell: Cell, known: CellRecord | None) -> CellRecord:
        plan: dict[str, Any] = {
            "name": cell.name,
            "arm": cell.arm,
            "seed": cell.seed,
            "folder": str(cell.folder.relative_to(self.study.folder)),
            "commands": self.study.commands(cell),
        }
        if known is None:
            known = CellRecord(state="planned", **plan)
        if is_complete(cell, self.study.tasks):
            plan |= {"state": "completed", "failure": None}
        elif known.state == "completed":  # its records were removed, or tasks added
            plan["state"] = "planned"
        elif known.state in ("training", "scoring") and not _is_locked(cell):
            plan["state"] = "interrupted"  # killed before it could record its end
        return known.model_copy(update=plan)

    def update(self, name: str, **changes: Any) -> None:
        """Changes the record of one cell."""
        with self._lock:
            record = self.read()
            assert record is not None  # `begin` wrote it
            record.updated = now()
            for cell in record.cells:
                if cell.name == name:
                    for key, value in changes.items():
                        setattr(cell, key, value)
            self._write(record)

    def finish(self, seconds: float) -> None:
        """Records the duration of the command."""
        with self._lock:
            record = self.read()
            assert record is not None
            record.seconds, record.updated = seconds, now()
            self._write(record)

    def _write(self, record: StudyRecord) -> None:
        write_json(self.path, scrub_all(record.content()))

    @property
    def logs(self) -> Path:
        """The folder of the logs."""
        return self.study.folder / LOGS_DIR

    def log_path(self, cell: Cell) -> Path:
        """Returns the log file of a cell."""
        return self.logs / f"{cell.name.replace('/', '_seed_')}.log"


def lock_cell(cell: Cell, seconds: float) -> FileLock | None:
    """Locks a cell, waiting at most `seconds`; None if another process holds it."""
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cell.folder.parent / f".{cell.folder.name}.lock")
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return None
    return lock


def _is_locked(cell: Cell) -> bool:
    lock = lock_cell(cell, 0.0)
    if lock is not None:
        lock.release()
    return lock is None


def _shared(settings: Settings) -> dict[str, Any]:
    """The settings that all seeds of an arm share."""
    return {name: value for name, value in settings.experiment().items() if name != "seed"}

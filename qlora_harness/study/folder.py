"""study.json and the other files of a study's folder, which several processes may write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_harness.errors import RunError
from qlora_harness.record import SUMMARY_FILE, now, write_json
from qlora_harness.schema.section import read_record
from qlora_harness.schema.study_record import CellRecord, StudyRecord
from qlora_harness.settings import Settings, build_settings
from qlora_harness.study.definition import Cell, Study

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

    def check_unchanged(self) -> None:
        """Raises RunError if an arm that has begun has other settings now."""
        record = self.read()
        if record is None:
            return
        for arm, settings in self.study.arms().items():
            before = record.arms.get(arm)
            begun = [cell for cell in self.study.cells if cell.arm == arm and _has_begun(cell)]
            if before is None or not begun:
                continue
            different = _differences(before, settings)
            if different:
                more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
                raise RunError(
                    f"{self.path}: {different[0]} in arm {arm!r}{more}; its "
                    f"{len(begun)} cells that have begun would have to run again",
                    f"Undo the change, give the study another name, or remove "
                    f"{self.study.folder / arm}",
                )

    def begin(self) -> None:
        """Writes the plan, and keeps what study.json says about cells that it knows already."""
        self.study.folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            before = self.read()
            known = {} if before is None else {cell.name: cell for cell in before.cells}
            cells = [self._planned(cell, known.pop(cell.name, None)) for cell in self.study.cells]
            record = StudyRecord(
                name=self.study.name,
                created=now() if before is None else before.created,
                updated=now(),
                tasks=list(self.study.tasks),
                batch_size=self.study.batch_size,
                arms={
                    **({} if before is None else before.arms),
                    **{arm: _shared(settings) for arm, settings in self.study.arms().items()},
                },
                cells=[*cells, *known.values()],
                seconds=None if before is None else before.seconds,
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
            return CellRecord(state="planned", **plan)
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
        """Records the time of the command."""
        with self._lock:
            record = self.read()
            assert record is not None
            record.seconds, record.updated = seconds, now()
            self._write(record)

    def _write(self, record: StudyRecord) -> None:
        write_json(self.path, record.content(), rows_at=None)

    @property
    def logs(self) -> Path:
        """The folder of the logs."""
        return self.study.folder / LOGS_DIR

    def log_path(self, cell: Cell) -> Path:
        """Returns the file that gets what a cell prints."""
        return self.logs / f"{cell.name.replace('/', '_seed_')}.log"


def lock_cell(cell: Cell, seconds: float) -> FileLock | None:
    """Takes a cell for this process, after at most some seconds; None if another one has it."""
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cell.folder.parent / f".{cell.folder.name}.lock")
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return None
    return lock


def _shared(settings: Settings) -> dict[str, Any]:
    """What all seeds of an arm have in common."""
    return {name: value for name, value in settings.experiment().items() if name != "seed"}


def _differences(before: dict[str, Any], settings: Settings) -> list[str]:
    """The settings that differ from a record's; one that it lacks had its default then."""
    recorded = {**_shared(build_settings({})), **before}
    return [
        f"{name} was {recorded[name]} and is now {value}"
        for name, value in _shared(settings).items()
        if recorded[name] != value
    ]


def _has_begun(cell: Cell) -> bool:
    return (cell.folder / SUMMARY_FILE).exists()

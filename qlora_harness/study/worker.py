"""A process that runs cells on one device, and reports to the command that started it."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qlora_harness.errors import HarnessError, first_line
from qlora_harness.model.shared_base import free_memory, sharing_base
from qlora_harness.schema.study_record import State
from qlora_harness.study.definition import Cell, Study
from qlora_harness.study.folder import StudyFolder, lock_cell
from qlora_harness.study.progress import is_complete, missing_tasks, status_of, summary_of
from qlora_harness.study.projection import Probe, measure

_LOCK_SECONDS = 30.0  # a worker of a killed study may take that long to notice


@dataclass(frozen=True)
class Report:
    """A new state or step of a cell, as its worker reports it."""

    cell: str
    state: State
    values: Mapping[str, Any] = field(default_factory=dict)
    last: bool = False  # whether the worker ends now


def work(connection: Connection, study: Study) -> None:
    """Runs cells as they arrive, until None or a failure that may have damaged the device."""
    os.setpgrp()  # the terminal's Ctrl-C reaches only the command, which forwards it
    _end_with_parent()

    def report(what: Report) -> None:
        with contextlib.suppress(OSError):  # the command has ended; SIGTERM will follow
            connection.send(what)

    _freeze_libraries(study)
    with sharing_base():
        runner = CellRunner(study, report)
        while (job := _next(connection)) is not None:
            if not (runner.measure(job) if isinstance(job, Probe) else runner.run(job)):
                return


def _freeze_libraries(study: Study) -> None:
    """Imports what cells use, and leaves it out of the collections of garbage between cells."""
    names = ["qlora_harness.train.run"]
    names += ["qlora_harness.lm_eval_compat.in_process"] * bool(study.tasks)
    # A cell tells what fails, and has the log for what is printed.
    with printing_to(Path(os.devnull)), contextlib.suppress(Exception):
        for name in names:
            import_module(name)
    gc.collect()
    gc.freeze()


def _next(connection: Connection) -> Cell | Probe | None:
    try:
        job: Cell | Probe | None = connection.recv()
        return job
    except EOFError:  # the command has ended
        return None


def _end_with_parent() -> None:
    """Ends this process by SIGTERM, which saves a checkpoint, once its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="qlora_harness parent", daemon=True).start()


class CellRunner:
    """Trains and scores cells in turn; loads what they share once."""

    def __init__(self, study: Study, report: Callable[[Report], None]) -> None:
        self._study, self._folder = study, StudyFolder(study)
        self._report = report
        self._scorers: dict[tuple[str, ...], Any] = {}

    def run(self, cell: Cell) -> bool:
        """Runs what is missing from a cell; returns whether this process can run another."""
        lock = lock_cell(cell, _LOCK_SECONDS)
        if lock is None:
            self._report(Report(cell.name, "planned", {"failure": "another process is running it"}))
            return True
        began = time.perf_counter()
        free_memory()  # of the cell before, which may have failed
        try:
            if is_complete(cell, self._study.tasks):  # another process has just done it
                self._report(Report(cell.name, "completed", _numbers(cell)))
                return True
            with printing_to(self._folder.log_path(cell)):
                from qlora_harness.train.signals import sigterm_as_ctrl_c

                with sigterm_as_ctrl_c():
                    self._compute(cell)
            values = {**_numbers(cell), "seconds": time.perf_counter() - began, "failure": None}
            self._tell(cell, "completed", values)
            return True
        except KeyboardInterrupt:
            self._tell(cell, "interrupted", {"failure": "stopped by a signal"}, last=True)
            return False
        except Exception as error:  # noqa: BLE001  # a failed cell must not stop the others
            expected = isinstance(error, HarnessError)
            stopped = expected and status_of(cell) == "interrupted"
            last = stopped or not expected  # the device may not be usable any more
            state: State = "interrupted" if stopped else "failed"
            self._tell(cell, state, {"failure": _line(error)}, last=last)
            return not last
        finally:
            lock.release()

    def measure(self, probe: Probe) -> bool:
        """Measures a cell without writing records; returns whether this process can run another."""
        try:
            with printing_to(Path(os.devnull)):
                result = measure(probe, self._study)
            self._report(Report(probe.name, "completed", {"measurement": result}))
            return True
        except Exception as error:  # noqa: BLE001  # as above
            self._report(Report(probe.name, "failed", {"failure": _line(error)}, last=True))
            return False

    def _compute(self, cell: Cell) -> None:
        """Trains and scores; the traceback of an unexpected error goes to the cell's log."""
        try:
            self._train(cell)
            self._score(cell)
        except HarnessError:
            raise
        except Exception:
            traceback.print_exc()
            raise

    def _train(self, cell: Cell) -> None:
        if cell.seed is None or status_of(cell) == "completed":
            return
        from qlora_harness.train.run import run_training

        self._tell(cell, "training")

        def on_row(row: Mapping[str, Any]) -> None:
            self._report(Report(cell.name, "training", row))

        run_training(cell.settings, on_row=on_row)
        free_memory()

    def _score(self, cell: Cell) -> None:
        tasks = missing_tasks(cell, self._study.tasks)
        if not tasks:
            return
        from qlora_harness.lm_eval_compat.in_process import InProcessScorer

        self._tell(cell, "scoring")
        if tasks not in self._scorers:
            self._scorers[tasks] = InProcessScorer(
                [tasks], self._study.batch_size, self._study.data_dir
            )
        began = time.perf_counter()
        self._scorers[tasks].score(cell.model_args(), cell.folder / "lm_eval")
        self._folder.update(cell.name, score_seconds=time.perf_counter() - began)

    def _tell(
        self, cell: Cell, state: State, values: Mapping[str, Any] | None = None, last: bool = False
    ) -> None:
        """Writes the state to study.json, then reports it."""
        try:
            self._folder.update(cell.name, state=state, **(values or {}))
        except OSError:  # such as a full disk; a failure is still reported
            if state not in ("failed", "interrupted"):
                raise
        self._report(Report(cell.name, state, values or {}, last))


def _numbers(cell: Cell) -> dict[str, Any]:
    """The numbers of the training record that study.json repeats."""
    summary = summary_of(cell)
    if summary is None:
        return {}
    return {
        "steps": summary.results.steps,
        "train_seconds": summary.runtime.train_seconds,
        "eval_seconds": summary.runtime.eval_seconds,
    }


def _line(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, HarnessError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"[:500]


@contextlib.contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """Appends everything that the process prints inside the `with` block to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="replace") as file:
        before = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in before:
                os.dup2(file.fileno(), number)
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # a full disk
                    stream.flush()
            for number, copy in before:
                os.dup2(copy, number)
                os.close(copy)

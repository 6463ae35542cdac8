"""Gives cells to workers, one per device, and forwards their reports."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias

from qlora_harness.schema.study_record import State
from qlora_harness.study.definition import Cell, Study
from qlora_harness.study.devices import Device
from qlora_harness.study.folder import StudyFolder
from qlora_harness.study.projection import Probe
from qlora_harness.study.worker import Report, work

_POLL_SECONDS = 0.5
_STOP_SECONDS = 120.0  # for a step, a checkpoint and a few imports

Job: TypeAlias = Cell | Probe


@dataclass
class _Worker:
    """A process on a device, and the cell that it runs."""

    device: Device
    process: BaseProcess
    connection: Connection
    job: Job | None = None
    before: Job | None = None


class Pool:
    """Runs jobs on devices until all have ended; calls `report` at each change.

    On the CPU each job has its own process, whose peak memory is that of the cell.
    """

    def __init__(
        self, study: Study, devices: Sequence[Device], report: Callable[[Report], None]
    ) -> None:
        self._study, self._report = study, report
        self._number = len(devices)
        self._workers = [self._start(device) for device in devices]
        self._pending: list[Job] = []
        self._stopping = False

    def run(self, jobs: Sequence[Job], refresh: Callable[[], None]) -> None:
        """Runs the jobs; `refresh` is called several times a second."""
        self._pending = list(jobs)
        with self._signals():
            while self._pending or any(worker.job for worker in self._workers):
                self._hand_out()
                sources: list[Any] = [w.connection for w in self._workers]
                wait([*sources, *(w.process.sentinel for w in self._workers)], _POLL_SECONDS)
                for number, worker in enumerate(self._workers):
                    self._workers[number] = self._attend(worker)
                refresh()
        if self._stopping:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Ends idle workers and stops busy ones."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.connection.send(None)
            if worker.job is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_STOP_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()

    def _start(self, device: Device) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self._study))
        with _environment(device.environment(self._number)), _without_ctrl_c():
            process.start()
        theirs.close()
        return _Worker(device, process, ours)

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._pending and worker.job is None and not self._stopping:
                worker.job = self._choose(worker)
                self._pending.remove(worker.job)
                with contextlib.suppress(OSError):  # it has just died; `_attend` notices
                    worker.connection.send(worker.job)

    def _choose(self, worker: _Worker) -> Job:
        """A job for the worker's loaded base, else for a base that no other worker uses."""
        taken = [w.job.base for w in self._workers if w.job is not None]
        loaded = None if worker.before is None else worker.before.base
        return min(self._pending, key=lambda job: (job.base != loaded, job.base in taken))

    def _attend(self, worker: _Worker) -> _Worker:
        """Forwards a worker's reports; returns a new worker if this one has died."""
        try:
            while worker.connection.poll():
                self._take(worker, worker.connection.recv())
        except (EOFError, OSError):
            worker.process.join(_STOP_SECONDS)
        if worker.process.is_alive():
            return worker
        if worker.job is not None:
            self._record_death(worker, worker.job)
        if self._stopping or not self._pending:
            return worker
        return self._start(worker.device)

    def _record_death(self, worker: _Worker, job: Job) -> None:
        """Reports and records the job of a worker that died."""
        status = worker.process.exitcode or 0
        reason = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        if -status == signal.SIGKILL:
            reason += ", perhaps out of host memory"
        failure = f"its process ended: {reason}"
        state: State = "interrupted" if self._stopping else "failed"
        if isinstance(job, Cell):
            StudyFolder(self._study).update(job.name, state=state, failure=failure)
        self._report(Report(job.name, state, {"failure": failure}))
        worker.job = None

    def _take(self, worker: _Worker, report: Report) -> None:
        self._report(report)
        if report.state in ("training", "scoring") or worker.job is None:
            return
        worker.before, worker.job = worker.job, None
        if report.last or worker.device.gpu is None:
            with contextlib.suppress(OSError):
                worker.connection.send(None)
            worker.process.join(_STOP_SECONDS)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Forwards SIGTERM and Ctrl-C to the workers as SIGTERM; a second signal kills them."""

        def stop(number: int, frame: object) -> None:
            for worker in self._workers:
                if worker.process.is_alive():
                    (worker.process.kill if self._stopping else worker.process.terminate)()
            self._pending.clear()
            self._stopping = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for the processes that start inside the `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Blocks SIGINT, also in the processes that start inside the `with` block.

    A terminal sends it to workers, too, until they have left its process group.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

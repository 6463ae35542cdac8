"""Ends a run of several processes when one of them is stopped or vanishes with its machine.

A thread of each process writes a beat every few seconds into the store through which they met,
whatever the process is busy with. The timeout of collectives can't be as short: the others wait in
one while the first encodes or saves, and NCCL counts from when the host queues it, up to a step
before the GPU begins it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable, Sequence

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore

from qlora_harness.errors import TrainingError, print_error
from qlora_harness.train.process import launcher_has_ended

OnLoss = Callable[[TrainingError], None]
_EVERY = 5.0  # seconds
_MISSED = 10  # beats; not a time, as a job may be suspended as a whole
_LEFT = "left"


class Heartbeat(contextlib.AbstractContextManager["Heartbeat"]):
    """The thread of one process, until the end of the `with` block; all processes must make one.

    `on_loss` gets the error, in that thread, before it ends the process.
    """

    def __init__(self, store: PrefixStore, rank: int, processes: int, on_loss: OnLoss) -> None:
        self._store, self._rank, self._on_loss = store, rank, on_loss
        self._keys = [f"beat_{n}" for n in range(processes)]
        store.set(self._keys[rank], "begun")
        store.wait(self._keys)  # some may import their packages from a slow disk
        self._leaves, self._last = threading.Event(), ""
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Tells the others that this process is done, unless it failed: then they end, too."""
        self._last = _LEFT if kind is None else "failed"
        self._leaves.set()
        self._thread.join()

    def _watch(self) -> None:
        last, missed = [b""] * len(self._keys), [0] * len(self._keys)
        for beat in itertools.count():
            leaves = self._leaves.wait(_EVERY)
            # A store whose machine vanished never answers.
            alarm = threading.Timer(_EVERY * _MISSED, self._end, [[0]])
            alarm.start()
            try:
                self._store.set(self._keys[self._rank], self._last if leaves else str(beat))
                beats = self._store.multi_get(self._keys)
            except DistError:
                # It ended with its launcher. Unless that is also ours, the alarm goes off.
                leaves = self._leaves.wait()
            alarm.cancel()
            if leaves:
                return
            for rank, (now, before) in enumerate(zip(beats, last, strict=True)):
                missed[rank] = missed[rank] + 1 if now == before != _LEFT.encode() else 0
            last = beats
            if lost := [rank for rank, count in enumerate(missed) if count >= _MISSED]:
                self._end(lost)

    def _end(self, lost: Sequence[int]) -> None:
        """Ends this process, whose main thread may wait for the lost ones for good."""
        if launcher_has_ended():
            return  # the run stops by itself
        numbers = ", ".join(map(str, lost))
        error = TrainingError(
            f"rank {numbers} of the {len(self._keys)} processes gave no sign of life for "
            f"{_EVERY * _MISSED:g} s: it was stopped, or its machine is gone",
            "See that machine; the same command resumes from the last checkpoint",
        )
        with contextlib.suppress(Exception):  # the run folder may be on the lost machine
            self._on_loss(error)
        # Once on each machine.
        before = range(self._rank - int(os.environ.get("LOCAL_RANK", "0")), self._rank)
        if all(rank in lost for rank in before):
            print(file=sys.stderr)  # ends the line of the progress bar
            print_error(error)
        os._exit(error.exit_status)

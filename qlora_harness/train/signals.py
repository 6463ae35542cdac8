"""SIGTERM and Ctrl-C: a run ends with a record and, during training, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_harness.train.measured_step import Clock
from qlora_harness.train.process import launcher_has_ended


@contextlib.contextmanager
def _handled(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Handles signals inside the `with` block; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def sigterm_as_ctrl_c() -> contextlib.AbstractContextManager[None]:
    """Inside the `with` block SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    return _handled(signal.default_int_handler, signal.SIGTERM)


def sigterm_ignored() -> contextlib.AbstractContextManager[None]:
    """Inside the `with` block SIGTERM has no effect, as the launcher sends it after a failure."""
    return _handled(signal.SIG_IGN, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Ends a run after the current step, with a checkpoint, on SIGTERM or Ctrl-C.

    So does the end of `accelerate launch`, which forwards no SIGTERM. `received` names the cause.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._flags: deque[tuple[Clock, torch.Tensor]] = deque()  # of steps, on several processes

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Catches the signals inside the `with` block; a second one has its usual effect."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.getsignal(number) for number in numbers}

        def handle(number: int, frame: FrameType | None) -> None:
            self.received = signal.Signals(number).name
            for name in numbers:
                signal.signal(name, previous[name])

        with _handled(handle, *numbers):
            yield

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes Trainer save and stop, at the same step on all processes."""
        if not self.received and launcher_has_ended():
            self.received = "the end of the launcher"
        stop = self.received is not None
        if args.world_size > 1:
            stop = self._any_process(stop, args.device)
        if stop:
            self.received = self.received or "a signal to another process"
            control.should_save = True
            control.should_training_stop = True

    def _any_process(self, stop: bool, device: torch.device) -> bool:
        """Whether a process wanted to stop; on GPUs before this step, which nothing waits for."""
        flag = torch.full((1,), float(stop), device=device)
        torch.distributed.all_reduce(flag)
        on_host = torch.empty(1, pin_memory=device.type == "cuda")
        on_host.copy_(flag, non_blocking=True)
        self._flags.append((Clock(device), on_host))
        if device.type == "cuda" and len(self._flags) == 1:
            return False
        reduced, number = self._flags.popleft()
        reduced.wait()
        return bool(number)

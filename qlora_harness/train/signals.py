"""SIGTERM and Ctrl-C: a run ends with a record and, during training, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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


class StopOnSignal(TrainerCallback):
    """Ends a run after the current step, with a checkpoint, on SIGTERM or Ctrl-C.

    So does the end of the launcher: `accelerate launch` does not forward SIGTERM. `received` is
    then the signal's name, or whatever else stopped the run.
    """

    def __init__(self) -> None:
        self.received: str | None = None

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
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor([float(self.received is not None)], device=args.device)
            torch.distributed.all_reduce(flag)
            if flag.item() and not self.received:
                self.received = "a signal to another process"
        if self.received:
            control.should_save = True
            control.should_training_stop = True

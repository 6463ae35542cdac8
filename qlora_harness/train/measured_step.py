"""An optimizer step's numbers, fetched without waiting for the device.

Reading a loss right after its step was launched would stop the launching of work until the device
is done, and leave it idle afterwards. So the numbers travel to the host behind the step, and are
read one step later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


class Clock:
    """A point in time on a device: when it has done all that was launched so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._now = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Waits until the device is there."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Clock) -> float:
        """Returns the seconds between two points on one device, both of them reached."""
        if self._event is not None and earlier._event is not None:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._now - earlier._now


@dataclass
class MeasuredStep:
    """An optimizer step whose numbers may still be on their way.

    `numbers`, [4] float64 on the host, are the mean loss over the learned tokens in nats, the
    gradient norm before clipping, and the tokens and learned tokens of all processes, without
    padding. They are complete once `ended` is reached.
    """

    step: int
    epoch: float | None  # at its end
    learning_rate: float
    begun: Clock
    ended: Clock
    numbers: torch.Tensor


def to_host(numbers: torch.Tensor) -> torch.Tensor:
    """Starts a copy to the host, complete when the device has done all that was launched so far."""
    if not numbers.is_cuda:
        return numbers.clone()
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    return host.copy_(numbers, non_blocking=True)

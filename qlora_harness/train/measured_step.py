"""The numbers of an optimizer step, read without making the device idle.

Reading a loss right after launching its step blocks the host until the device is done, which then
has no work queued. So the numbers are copied to the host behind the step and read one step later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


class Clock:
    """The point in time at which a device has done all work launched so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._now = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Waits until the device has reached it."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Clock) -> float:
        """Returns the seconds since an earlier point on the same device; both must be reached."""
        if self._event is not None and earlier._event is not None:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._now - earlier._now


@dataclass
class MeasuredStep:
    """An optimizer step; its numbers are valid once `ended` is reached.

    `numbers`, [4] float64 on the host, are the mean loss over the learned tokens in nats, the
    gradient norm before clipping, and the tokens and learned tokens of all processes, without
    padding.
    """

    step: int
    epoch: float | None  # at its end
    learning_rate: float
    begun: Clock
    ended: Clock
    numbers: torch.Tensor

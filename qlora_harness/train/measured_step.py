"""What is known of an optimizer step only once the device has finished it, fetched without waiting.

Reading a loss when its step has just been launched would stop the launching of work until the
device is done, and leave it idle afterwards. So the numbers travel to the host behind the step, and
are read one step later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


class Clock:
    """A point in time on a device: when it has done all that was asked of it so far.

    Args:
        device: On the CPU, where nothing is asynchronous, it is now.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._now = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._now = time.perf_counter()

    def wait(self) -> None:
        """Waits until the device is there."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Clock) -> float:
        """Returns the seconds between two points that the device has reached.

        Args:
            earlier: On the same device.
        """
        if self._event is not None and earlier._event is not None:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._now - earlier._now


@dataclass
class MeasuredStep:
    """An optimizer step whose numbers may still be on their way.

    Attributes:
        step: Its number.
        epoch: At its end.
        learning_rate: That it used.
        begun: When it began.
        ended: When it ended.
        numbers: Loss, gradient norm (NaN where none was computed), tokens and learned tokens,
            [4] float64 on the host; complete once `ended` is reached.
        has_norm: Whether there is a gradient norm.
    """

    step: int
    epoch: float | None
    learning_rate: float
    begun: Clock
    ended: Clock
    numbers: torch.Tensor
    has_norm: bool

    @property
    def loss(self) -> float:
        """Mean over the learned tokens, nats."""
        return float(self.numbers[0])

    @property
    def grad_norm(self) -> float | None:
        """Before clipping."""
        return float(self.numbers[1]) if self.has_norm else None

    @property
    def tokens(self) -> int:
        """Real tokens of all processes."""
        return int(self.numbers[2])

    @property
    def supervised_tokens(self) -> int:
        """Learned tokens of all processes."""
        return int(self.numbers[3])

    @property
    def seconds(self) -> float:
        """From its beginning to its end on the device."""
        return self.ended.seconds_since(self.begun)


def to_host(numbers: torch.Tensor) -> torch.Tensor:
    """Starts a copy to the host; it is complete when the device has done all asked so far.

    Args:
        numbers: Any, on any device.
    """
    if not numbers.is_cuda:
        return numbers.clone()
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    return host.copy_(numbers, non_blocking=True)

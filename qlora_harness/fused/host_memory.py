"""Asynchronous copies of activations between device and pinned host memory.

Copies run on a separate stream: out while the layers above run forward, and back while the layer
above runs backward, since backward needs them in the opposite order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from qlora_harness.errors import TrainingError
from qlora_harness.model.free_memory import available_memory

logger = logging.getLogger("qlora_harness")

_BLOCK = 2**24  # bytes; torch would round each tensor up to a power of two
_LEAVING = 2  # tensors on their way out at once


class NoPinnedMemory(RuntimeError):
    """The system refuses to pin more memory."""


class Blocks:
    """A pool of pinned host memory, in blocks of equal size.

    Pinning memory takes longer than filling it, and rows differ in length from step to step, so the
    pool grows by an extra quarter of what is pinned. `pinned` counts all blocks, in use or not.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self.pinned = 0

    def new_bytes(self, size: int) -> int:
        """Returns the bytes that `take(size)` would pin."""
        missing = _blocks(size) - len(self._free)
        return (missing + self.pinned // 4) * _BLOCK if missing > 0 else 0

    def pin(self, size: int) -> None:
        """Pins more bytes; raises NoPinnedMemory if the system refuses."""
        for _ in range(_blocks(size)):
            try:
                block = torch.empty(_BLOCK, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                raise NoPinnedMemory(str(error).splitlines()[0]) from None
            self._free.append(block)
            self.pinned += 1

    def take(self, size: int) -> list[Tensor]:
        """Returns blocks for `size` bytes; raises NoPinnedMemory if the system pins no more."""
        self.pin(self.new_bytes(size))
        taken = self._free[: _blocks(size)]
        del self._free[: len(taken)]
        return taken

    def give(self, blocks: list[Tensor]) -> None:
        """Takes blocks back, even during a copy: later copies follow it on the same stream."""
        self._free += blocks


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def pinned_bytes(tensors: int, size: int) -> int:
    """Returns the most bytes that `Blocks` pins for a number of tensors of `size` bytes each."""
    return tensors * _blocks(size) * _BLOCK * 5 // 4


class Stored:
    """A contiguous tensor in host memory.

    `device_copy` is the tensor on the device, before it has left and once it comes back. `below`
    refers to the tensor stored before it.
    """

    def __init__(self, x: Tensor, blocks: Blocks, below: Stored | None) -> None:
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.host: list[Tensor] = []
        self.device_copy: Tensor | None = x
        self.copied: torch.cuda.Event | None = None
        self.below = None if below is None else weakref.ref(below)
        self._blocks = blocks
        self.host = blocks.take(x.nbytes)

    def release(self) -> None:
        """Frees its memory on both sides."""
        if self.device_copy is not None and self.copied is not None:
            # The copy may still be reading or writing it.
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        self.device_copy = None
        self._blocks.give(self.host)
        self.host = []

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # For graphs that are dropped without a backward pass.
        if not finalizing():
            self.release()


class HostMemory:
    """Host memory for the activations of all layers of a model."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._leaving: deque[weakref.ref[Stored]] = deque()
        self._blocks = Blocks()
        self._limit = memory_of_a_process() // 4
        self._full_logged = False

    def serves(self, x: Tensor) -> bool:
        """Whether a tensor can be stored."""
        return x.is_cuda

    def reserve(self, tensors: int, size: int) -> None:
        """Pins memory for a number of tensors of `size` bytes, as far as system and limit allow.

        Otherwise the first long rows would wait for it, in the middle of a run.
        """
        missing = min(tensors * _blocks(size) * _BLOCK, self._limit) - self._pinned
        with contextlib.suppress(NoPinnedMemory):
            self._blocks.pin(max(0, missing))

    def put_if_room(self, x: Tensor) -> Stored | None:
        """Does as `put`, but returns None if the system pins no more, or beyond the limit.

        The limit is a quarter of the host memory that was free at first.
        """
        more = self._blocks.new_bytes(x.nbytes)
        if not more or self._pinned + more <= self._limit:
            try:
                return self._put(x)
            except NoPinnedMemory:
                self._limit = self._pinned
        if not self._full_logged:
            self._full_logged = True
            logger.info(
                "%.1f GiB of host memory are pinned for activations, the limit; activations that "
                "don't fit are recomputed",
                self._pinned / 2**30,
            )
        return None

    @property
    def _pinned(self) -> int:
        return self._blocks.pinned * _BLOCK

    def put(self, x: Tensor) -> Stored:
        """Starts copying a contiguous tensor, which must no longer change, to the host.

        Raises TrainingError if the system pins no more memory.
        """
        try:
            return self._put(x)
        except NoPinnedMemory as error:
            raise TrainingError(
                f"--checkpointing offload: the system pins no more host memory than "
                f"{self._pinned / 2**30:.1f} GiB ({error})",
                "Lower --batch-size (and raise --grad-accum), or use --checkpointing full",
            ) from None

    def _put(self, x: Tensor) -> Stored:
        before = self._leaving[-1]() if self._leaving else None
        stored = Stored(x, self._blocks, before)
        self._copy(stored, x, back=False)
        self._leaving.append(weakref.ref(stored))
        if len(self._leaving) > _LEAVING:
            oldest = self._leaving.popleft()()
            if oldest is not None and oldest.host and oldest.copied is not None:
                # That copy had the time of a layer or two; reuse its memory once it is done.
                torch.cuda.current_stream(x.device).wait_event(oldest.copied)
                oldest.device_copy = None
        return stored

    def get(self, stored: Stored) -> Tensor:
        """Returns a tensor on the device, once, and starts fetching the one stored before it."""
        self._fetch(stored)
        x = stored.device_copy
        assert x is not None
        assert stored.copied is not None
        torch.cuda.current_stream(x.device).wait_event(stored.copied)
        stored.device_copy = None
        stored.release()
        below = None if stored.below is None else stored.below()
        if below is not None:
            # Without memory now, `get` fetches it later.
            with contextlib.suppress(torch.OutOfMemoryError):
                self._fetch(below)
        return x

    def _fetch(self, stored: Stored) -> None:
        if stored.device_copy is not None or not stored.host:
            return
        # Allocated on the computing stream, whose order then governs reuse of the memory.
        x = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
        stored.device_copy = x
        self._copy(stored, x, back=True)

    def _copy(self, stored: Stored, x: Tensor, *, back: bool) -> None:
        if self._stream is None or self._stream.device != stored.device:
            self._stream = torch.cuda.Stream(stored.device)
        self._stream.wait_stream(torch.cuda.current_stream(stored.device))
        try:
            with torch.cuda.stream(self._stream):
                parts = torch.split(x.view(-1).view(torch.uint8), _BLOCK)
                for part, block in zip(parts, stored.host, strict=True):
                    if back:
                        part.copy_(block[: len(part)], non_blocking=True)
                    else:
                        block[: len(part)].copy_(part, non_blocking=True)
        finally:
            stored.copied = self._stream.record_event()


def memory_of_a_process() -> int:
    """Returns the free host memory, in bytes, for each process of a launcher."""
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to a device without waiting."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)

"""Copies between host and device that nothing waits for, through pinned memory.

Activations of layers go to the host and come back beside the computation: a copy out runs on a
stream of its own while the layers above are computed. Backward asks for them in the opposite order,
so while a layer is at work what was stored before it comes back.
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

_BLOCK = 2**24  # bytes; torch would take a power of two for each tensor
_LEAVING = 2  # tensors that are on their way out at once


class NoPinnedMemory(RuntimeError):
    """The system pins no more memory."""


class Blocks:
    """Pinned memory of the host, in blocks of one size that are used again and again.

    To pin memory takes longer than to fill it, and rows differ in length from step to step: where
    blocks are missing, up to a quarter of what is pinned is pinned besides. `pinned` counts all
    blocks, in use or not.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self.pinned = 0

    def new_bytes(self, size: int) -> int:
        """Returns how much more memory would be pinned to hold so many bytes."""
        missing = _blocks(size) - len(self._free)
        return (missing + self.pinned // 4) * _BLOCK if missing > 0 else 0

    def take(self, size: int) -> list[Tensor]:
        """Returns blocks that hold so many bytes; raises NoPinnedMemory if the system has none."""
        for _ in range(_blocks(self.new_bytes(size))):
            try:
                block = torch.empty(_BLOCK, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                raise NoPinnedMemory(str(error).splitlines()[0]) from None
            self._free.append(block)
            self.pinned += 1
        taken = self._free[: _blocks(size)]
        del self._free[: len(taken)]
        return taken

    def give(self, blocks: list[Tensor]) -> None:
        """Takes blocks back. What is still copied to or from them comes before the next copy."""
        self._free += blocks


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def pinned_bytes(tensors: int, size: int) -> int:
    """Returns the most memory that `Blocks` pin for so many tensors of `size` bytes each."""
    return tensors * _blocks(size) * _BLOCK * 5 // 4


class Stored:
    """A contiguous tensor in the host's memory.

    `device_copy` is the tensor on the device: until its memory is given up, and again when it comes
    back. `below` is what was stored before it, if its graph is still there.
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
        """Gives its memory back, on both sides."""
        if self.device_copy is not None and self.copied is not None:
            # It may still be read or written.
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        self.device_copy = None
        self._blocks.give(self.host)
        self.host = []

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Where a graph goes without a backward pass.
        if not finalizing():
            self.release()


class HostMemory:
    """Where activations of all layers of a model go."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._leaving: deque[weakref.ref[Stored]] = deque()
        self._blocks = Blocks()
        self._limit = memory_of_a_process() // 4
        self._full_logged = False

    def serves(self, x: Tensor) -> bool:
        """Whether a tensor can be stored: one of a CUDA device, on which copies need no waiting."""
        return x.is_cuda

    def put_if_room(self, x: Tensor) -> Stored | None:
        """Begins to copy a tensor to the host, as `put` does, if there is room.

        Room is a quarter of what was available at first. Returns None without it, or where the
        system pins no more.
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
                "%.1f GiB of the host's memory are pinned for activations, and no more: what does "
                "not fit is computed again",
                self._pinned / 2**30,
            )
        return None

    @property
    def _pinned(self) -> int:
        """Bytes."""
        return self._blocks.pinned * _BLOCK

    def put(self, x: Tensor) -> Stored:
        """Begins to copy to the host a contiguous tensor that nothing writes to any more.

        Raises TrainingError if the system pins no more memory.
        """
        try:
            return self._put(x)
        except NoPinnedMemory as error:
            raise TrainingError(
                f"--checkpointing offload: the system pins no more of the host's memory than "
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
                # That copy has had the time of a layer or two; now the memory may be used again.
                torch.cuda.current_stream(x.device).wait_event(oldest.copied)
                oldest.device_copy = None
        return stored

    def get(self, stored: Stored) -> Tensor:
        """Returns a tensor to the device, once, and begins to fetch what was stored before it."""
        self._fetch(stored)
        x = stored.device_copy
        assert x is not None
        assert stored.copied is not None
        torch.cuda.current_stream(x.device).wait_event(stored.copied)
        stored.device_copy = None
        stored.release()
        below = None if stored.below is None else stored.below()
        if below is not None:
            # Where there is no memory for it now, there is when it is its turn.
            with contextlib.suppress(torch.OutOfMemoryError):
                self._fetch(below)
        return x

    def _fetch(self, stored: Stored) -> None:
        if stored.device_copy is not None or not stored.host:
            return
        # Taken on the stream that computes, as its allocator knows when it is free again.
        x = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
        stored.device_copy = x
        self._copy(stored, x, back=True)

    def _copy(self, stored: Stored, x: Tensor, *, back: bool) -> None:
        if self._stream is None or self._stream.device != stored.device:
            self._stream = torch.cuda.Stream(stored.device)  # type: ignore[no-untyped-call]
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
    """Returns the bytes of the host's memory that are free for each process of a launcher."""
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to a device, without waiting for it."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)

"""Copies between host and device that nothing waits for, through pinned memory.

Activations of layers go to the host and come back beside the computation: a copy out runs on a
stream of its own while the layers above are computed. Backward asks for them in the opposite order,
so while a layer is at work what was stored before it comes back.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import psutil
import torch


class Stored:
    """One tensor in the host's memory.

    Args:
        x: The tensor.
        below: The one that was stored before it, if its graph is still there.
    """

    def __init__(self, x: torch.Tensor, below: Stored | None) -> None:
        self.device = x.device
        self.host: torch.Tensor | None = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        # On the device: until its memory is given up, and again when it comes back.
        self.there: torch.Tensor | None = x
        self.copied: torch.cuda.Event | None = None
        self.below = None if below is None else weakref.ref(below)


class HostMemory:
    """Shared by all layers of a model."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: weakref.ref[Stored] | None = None
        self._stored: weakref.WeakSet[Stored] = weakref.WeakSet()
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._limit = available_memory() // (4 * processes)

    def has_room(self, x: torch.Tensor) -> bool:
        """Whether all that is stored would take no more than a quarter of what was available.

        Args:
            x: A tensor to be stored.
        """
        held = sum(s.host.nbytes for s in self._stored if s.host is not None)
        # torch takes pinned memory in powers of two.
        return 2 * (held + x.nbytes) <= self._limit

    def put(self, x: torch.Tensor) -> Stored:
        """Begins to copy a tensor to the host.

        Args:
            x: On a CUDA device; not to be written to.
        """
        before = None if self._last is None else self._last()
        stored = Stored(x, before)
        assert stored.host is not None
        self._copy(stored, x, stored.host)
        if before is not None and before.copied is not None and before.host is not None:
            # That copy has had a whole layer's time; now the memory may be used again.
            torch.cuda.current_stream(x.device).wait_event(before.copied)
            before.there = None
        self._last = weakref.ref(stored)
        self._stored.add(stored)
        return stored

    def get(self, stored: Stored) -> torch.Tensor:
        """Returns a tensor to the device, and begins to fetch the one that was stored before it.

        Args:
            stored: From `put`; of no use afterwards.
        """
        self._fetch(stored)
        x = stored.there
        assert x is not None and stored.copied is not None
        torch.cuda.current_stream(x.device).wait_event(stored.copied)
        stored.there = stored.host = None
        below = None if stored.below is None else stored.below()
        if below is not None:
            self._fetch(below)
        return x

    def _fetch(self, stored: Stored) -> None:
        if stored.there is not None or stored.host is None:
            return
        # Taken on the stream that computes, as its allocator knows when it is free again.
        host = stored.host
        stored.there = torch.empty(host.shape, dtype=host.dtype, device=stored.device)
        self._copy(stored, host, stored.there)

    def _copy(self, stored: Stored, source: torch.Tensor, target: torch.Tensor) -> None:
        if self._stream is None or self._stream.device != stored.device:
            self._stream = torch.cuda.Stream(stored.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(stored.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        stored.copied = self._stream.record_event()


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor of the host to a device, without waiting for it.

    Args:
        values: On the host.
        device: Where to.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes of the host's memory that this process may still take.

    Args:
        group: Folder of the process's Linux control group (version 2): a container's limit counts.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((group / "memory.max").read_text())  # "max" without a limit
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return max(0, min(free, limit - used))

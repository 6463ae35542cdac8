"""Measures the memory peak of each phase, as the allocator and the driver see it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# In each row of the step log.
_STEP_PEAKS = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_device_used_bytes",
    "cpu_peak_rss_bytes",
)


@dataclass
class PhasePeak:
    """The peaks of one phase in one process, in bytes; see `schema.training.PhaseMemory`."""

    phase: str
    rank: int
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_used_bytes: int | None = None  # sampled at the end of steps and of the phase
    cpu_peak_rss_bytes: int | None = None  # since the process began, if it can't be reset
    peak_managed_bytes: int | None = None
    peak_needed_bytes: int | None = None
    other_processes: int | None = None
    other_bytes: int | None = None


class MemoryMeter:
    """Measures phase by phase. Nothing else may reset torch's peak counters.

    `optimizer` returns the optimizer once there is one.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        self._device = device
        self._rank = rank
        self.optimizer: Callable[[], Any] = lambda: None
        self.phases: list[PhasePeak] = []
        self._open: list[PhasePeak] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a `with` block, even if it raises.

        A phase inside another is not part of it. Phases of one name are measured as one.
        """
        if self._open:
            self._read(self._open[-1])
        peak = next((peak for peak in self.phases if peak.phase == name), None)
        if peak is None:
            peak = PhasePeak(name, self._rank)
            self.phases.append(peak)
        self._open.append(peak)
        self._reset()
        try:
            yield
        finally:
            self._read(peak)
            self._open.pop()
            if self._open:
                self._reset()

    def sample(self) -> dict[str, int | None]:
        """Returns the current phase's peaks so far, for the step log."""
        peak = (self._open or self.phases)[-1]
        self._read(peak)
        return {name: v for name in _STEP_PEAKS if (v := getattr(peak, name)) is not None}

    def _reset(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # Linux only: "5" resets the resident-set peak (proc(5), clear_refs).
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def _read(self, peak: PhasePeak) -> None:
        if self._device.type != "cuda":
            peak.cpu_peak_rss_bytes = max(peak.cpu_peak_rss_bytes or 0, _peak_rss_bytes())
            return
        import torch

        free, total = torch.cuda.mem_get_info(self._device)
        allocated = torch.cuda.max_memory_allocated(self._device)
        reserved = torch.cuda.max_memory_reserved(self._device)
        peak.peak_allocated_bytes = max(peak.peak_allocated_bytes or 0, allocated)
        peak.peak_reserved_bytes = max(peak.peak_reserved_bytes or 0, reserved)
        peak.peak_device_used_bytes = max(peak.peak_device_used_bytes or 0, total - free)
        peak.peak_managed_bytes = max(peak.peak_managed_bytes or 0, managed_bytes(self.optimizer()))
        peak.peak_needed_bytes = peak.peak_allocated_bytes + peak.peak_managed_bytes
        count, size = other_processes(self._device)
        if count is not None:
            peak.other_processes = max(peak.other_processes or 0, count)
        if size is not None:
            peak.other_bytes = max(peak.other_bytes or 0, size)


def managed_bytes(optimizer: Any) -> int:
    """Returns the bytes that a paged optimizer of bitsandbytes holds in managed memory."""
    states = getattr(optimizer, "state", None) or {}
    return sum(
        tensor.nbytes
        for state in states.values()
        for tensor in state.values()
        if getattr(tensor, "is_paged", False)
    )


@functools.cache
def _nvml(device: torch.device) -> tuple[Any, Any]:
    """Returns NVML and its handle of a GPU, or None for both if nvidia-ml-py is not installed."""
    import torch

    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except Exception:  # noqa: BLE001  # NVML raises its own kinds
        return None, None


def other_processes(device: torch.device) -> tuple[int | None, int | None]:
    """Returns the number of other processes on a GPU and their bytes, None if unknown."""
    nvml, handle = _nvml(device)
    if nvml is None:
        return None, None
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except Exception:  # noqa: BLE001  # as above
        return None, None
    others = [process for process in running if process.pid != os.getpid()]
    if len(others) == len(running) and others:
        # In a container NVML sees another PID, so this process is one of these.
        return len(others) - 1, None if len(others) > 1 else 0
    sizes = [process.usedGpuMemory for process in others]
    return len(others), None if None in sizes else sum(sizes)


def _peak_rss_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def largest_peaks(phases: list[dict[str, Any]], device_type: str) -> dict[str, Any]:
    """Returns the largest peaks of the training phase over ranks, and all phases.

    `phases` are the `PhasePeak`s of every rank as dictionaries.
    """

    def largest(name: str) -> int | None:
        values = [p[name] for p in phases if p["phase"] == "train" and p[name] is not None]
        return max(values) if values else None

    names = [f for f in PhasePeak.__dataclass_fields__ if f not in ("phase", "rank")]
    return {"device_type": device_type, **{n: largest(n) for n in names}, "phases": phases}

"""What the memory peak really was: per phase, as the allocator and as the driver see it."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class PhasePeak:
    """The peaks of one phase of a run in one process, in bytes; None where it does not apply.

    Attributes:
        phase: "load", "train" or "evaluate".
        rank: The process.
        peak_allocated_bytes: Most memory in live tensors (torch.cuda.max_memory_allocated).
        peak_reserved_bytes: Most memory held by torch's allocator.
        peak_device_used_bytes: Most memory in use on the device as the driver counts it, with the
            CUDA context and other processes; sampled at the end of steps and of the phase.
        cpu_peak_rss_bytes: Most resident memory of the process; measured on CPU runs only. Where
            the system can't reset it, that of the process so far.
    """

    phase: str
    rank: int
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_used_bytes: int | None = None
    cpu_peak_rss_bytes: int | None = None


class MemoryMeter:
    """Measures phase by phase. Nothing else in the program may reset torch's peak counters.

    Args:
        device: The device of this process.
        rank: This process.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        self._device = device
        self._rank = rank
        self.phases: list[PhasePeak] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what runs inside the `with` block, also when it ends in an exception.

        Args:
            name: The phase.
        """
        peak = PhasePeak(name, self._rank)
        self.phases.append(peak)
        self._reset()
        try:
            yield
        finally:
            self._read(peak)

    def sample(self) -> dict[str, int | None]:
        """Returns the current phase's peaks so far, for the step log, in bytes."""
        peak = self.phases[-1]
        self._read(peak)
        return {k: v for k, v in asdict(peak).items() if k.endswith("_bytes") and v is not None}

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
            peak.cpu_peak_rss_bytes = _peak_rss_bytes()
            return
        import torch

        free, total = torch.cuda.mem_get_info(self._device)
        peak.peak_allocated_bytes = torch.cuda.max_memory_allocated(self._device)
        peak.peak_reserved_bytes = torch.cuda.max_memory_reserved(self._device)
        peak.peak_device_used_bytes = max(peak.peak_device_used_bytes or 0, total - free)


def _peak_rss_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def summarise(
    phases: list[dict[str, Any]], device_type: str, phase: str = "train"
) -> dict[str, Any]:
    """Returns the headline of a run: the largest peaks over ranks of one phase.

    Args:
        phases: Peaks of all phases and ranks, as dictionaries of `PhasePeak`.
        device_type: "cuda" or "cpu".
        phase: The phase that makes the headline.

    Returns:
        The headline values by name, `device_type`, and all phases.
    """

    def largest(name: str) -> int | None:
        values = [p[name] for p in phases if p["phase"] == phase and p[name] is not None]
        return max(values) if values else None

    names = [f for f in PhasePeak.__dataclass_fields__ if f.endswith("_bytes")]
    return {"device_type": device_type, **{n: largest(n) for n in names}, "phases": phases}

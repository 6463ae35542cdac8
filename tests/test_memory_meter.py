"""The memory meter: peaks by phase, of a GPU or of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_harness.train import memory_meter as memory
from qlora_harness.train.memory_meter import MemoryMeter, PhasePeak, largest_peaks, managed_bytes

MIB = 2**20


def _peak_can_be_reset() -> bool:
    try:
        return Path("/proc/self/clear_refs").write_text("5") == 1
    except OSError:
        return False


linux_only = pytest.mark.skipif(
    not _peak_can_be_reset(), reason="this system does not let a process reset its peak"
)


def test_cpu_run_has_resident_memory_only() -> None:
    meter = MemoryMeter(torch.device("cpu"), rank=0)
    with pytest.raises(RuntimeError), meter.phase("train"):  # a phase that fails is measured, too
        raise RuntimeError("boom")
    peaks = asdict(meter.phases[0])
    rss = peaks.pop("cpu_peak_rss_bytes")
    assert (peaks.pop("phase"), peaks.pop("rank")) == ("train", 0)
    assert set(peaks.values()) == {None}
    # This process with torch in it: more than 50 MiB, less than the machine.
    assert 50 * MIB < rss < 2**40


@linux_only
def test_peaks_and_samples_belong_to_their_phase() -> None:
    """In a new process, because memory freed by other tests would be reused."""
    code = """
import torch
from qlora_harness.train.memory_meter import MemoryMeter
memory = MemoryMeter(torch.device("cpu"), 0)
def block(size):
    return bytearray(b"x") * (size << 20)
with memory.phase("load"):
    block(400)
with memory.phase("train"):
    before = memory.sample()["cpu_peak_rss_bytes"]
    block(100)
    for size in (400, 200):
        with memory.phase("evaluate_during"):
            block(size)
    after = memory.sample()["cpu_peak_rss_bytes"]
load, train, evaluation = (peak.cpu_peak_rss_bytes for peak in memory.phases)
print(before, after, load, train, evaluation)
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    before, after, load, train, evaluation = (int(word) for word in done.stdout.split())
    assert load - before > 300 * MIB
    assert train == after
    assert 80 * MIB < train - before < 200 * MIB  # from before the evaluations
    assert evaluation - before > 300 * MIB  # the larger of the two


def test_largest_peaks_are_those_of_training_over_ranks() -> None:
    phases = [
        asdict(PhasePeak("load", 0, 900, 950, 990, None)),
        asdict(PhasePeak("train", 0, 500, 700, 800, None, 90, 590, 1, 10)),
        asdict(PhasePeak("train", 1, 600, 650, None, None, 20, 620, 3, 5)),
        asdict(PhasePeak("evaluate", 0, 999, 999, 999, None)),
    ]
    assert largest_peaks(phases, "cuda") == {
        "device_type": "cuda", "peak_allocated_bytes": 600, "peak_reserved_bytes": 700,
        "peak_device_used_bytes": 800, "cpu_peak_rss_bytes": None, "peak_managed_bytes": 90,
        "peak_needed_bytes": 620, "other_processes": 3, "other_bytes": 10, "phases": phases,
    }  # fmt: skip


def test_paged_states_are_counted_and_others_are_not() -> None:
    one, other = torch.zeros(3), torch.zeros(5, dtype=torch.uint8)
    one.is_paged = other.is_paged = True  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"step": 1, "state1": one, "state2": other, "max": torch.zeros(7)}
    assert managed_bytes(optimizer) == 3 * 4 + 5
    assert managed_bytes(None) == 0


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        ([(os.getpid(), 500)], (0, 0)),
        ([(os.getpid(), 500), (1, 30), (2, 40)], (2, 70)),
        ([(os.getpid(), 500), (1, None)], (1, None)),
        ([(77, 500)], (0, 0)),  # this process by another number, as in a container
        ([(77, 500), (78, 30)], (1, None)),
        ([], (0, 0)),
    ],
)
def test_other_processes_on_a_device(
    monkeypatch: pytest.MonkeyPatch,
    running: list[tuple[int, int | None]],
    expected: tuple[int | None, int | None],
) -> None:
    processes = [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in running]
    nvml = SimpleNamespace(nvmlDeviceGetComputeRunningProcesses=lambda handle: processes)
    monkeypatch.setattr(memory, "_nvml", lambda device: (nvml, None))
    assert memory.other_processes(torch.device("cuda")) == expected
    monkeypatch.setattr(memory, "_nvml", lambda device: (None, None))
    assert memory.other_processes(torch.device("cuda")) == (None, None)

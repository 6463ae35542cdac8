"""The memory meter: peaks by phase, on the CPU as resident memory in a field of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_harness.train.memory import (
    MemoryMeter,
    OtherProcesses,
    PhasePeak,
    managed_bytes,
    summarise,
)

MIB = 2**20


def _peak_can_be_reset() -> bool:
    try:
        return Path("/proc/self/clear_refs").write_text("5") == 1
    except OSError:
        return False


linux_only = pytest.mark.skipif(
    not _peak_can_be_reset(), reason="this system does not let a process reset its peak"
)


def meter() -> MemoryMeter:
    return MemoryMeter(torch.device("cpu"), rank=0)


def test_cpu_run_has_resident_memory_only() -> None:
    memory = meter()
    with memory.phase("train"):
        pass
    (peak,) = memory.phases
    found = asdict(peak)
    rss = found.pop("cpu_peak_rss_bytes")
    assert found == {
        "phase": "train",
        "rank": 0,
        "peak_allocated_bytes": None,
        "peak_reserved_bytes": None,
        "peak_device_used_bytes": None,
        "peak_managed_bytes": None,
        "peak_needed_bytes": None,
        "other_processes": None,
        "other_bytes": None,
    }
    # This process with torch in it: more than 50 MiB, less than the machine.
    assert 50 * MIB < rss < 2**40


@linux_only
def test_peak_is_that_of_its_phase() -> None:
    """In a process of its own: what other tests have freed would be used again here."""
    code = """
import torch
from qlora_harness.train.memory import MemoryMeter
memory = MemoryMeter(torch.device("cpu"), 0)
for phase, size in (("load", 200), ("train", 20)):
    with memory.phase(phase):
        block = bytearray(b"x") * (size << 20)
        del block
print(*(peak.cpu_peak_rss_bytes for peak in memory.phases))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    load, train = map(int, done.stdout.split())
    assert load - train > 100 * MIB


@linux_only
def test_sample_reads_the_phase_that_is_running() -> None:
    code = """
import torch
from qlora_harness.train.memory import MemoryMeter
memory = MemoryMeter(torch.device("cpu"), 0)
with memory.phase("train"):
    before = memory.sample()
    block = bytearray(b"x") * (400 << 20)
    after = memory.sample()
assert set(before) == set(after) == {"cpu_peak_rss_bytes"}
print(after["cpu_peak_rss_bytes"] - before["cpu_peak_rss_bytes"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) > 300 * MIB


def test_phase_that_fails_is_measured_too() -> None:
    memory = meter()
    with pytest.raises(RuntimeError), memory.phase("train"):
        raise RuntimeError("boom")
    assert memory.phases[0].cpu_peak_rss_bytes


def test_headline_is_the_largest_over_ranks_of_the_training_phase() -> None:
    phases = [
        asdict(PhasePeak("load", 0, 900, 950, 990, None)),
        asdict(PhasePeak("train", 0, 500, 700, 800, None, 90, 590, 1, 10)),
        asdict(PhasePeak("train", 1, 600, 650, None, None, 20, 620, 3, 5)),
        asdict(PhasePeak("evaluate", 0, 999, 999, 999, None)),
    ]
    assert summarise(phases, "cuda") == {
        "device_type": "cuda",
        "peak_allocated_bytes": 600,
        "peak_reserved_bytes": 700,
        "peak_device_used_bytes": 800,
        "cpu_peak_rss_bytes": None,
        "peak_managed_bytes": 90,
        "peak_needed_bytes": 620,
        "other_processes": 3,
        "other_bytes": 10,
        "phases": phases,
    }


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
    running: list[tuple[int, int | None]], expected: tuple[int | None, int | None]
) -> None:
    others = OtherProcesses.__new__(OtherProcesses)
    processes = [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in running]
    others._handle = None
    others._nvml = SimpleNamespace(nvmlDeviceGetComputeRunningProcesses=lambda handle: processes)
    assert others.count() == expected
    others._nvml = None
    assert others.count() == (None, None)


def test_headline_of_a_run_that_never_trained() -> None:
    summary = summarise([asdict(PhasePeak("load", 0, cpu_peak_rss_bytes=5))], "cpu")
    assert summary["cpu_peak_rss_bytes"] is None
    assert summary["peak_allocated_bytes"] is None

"""Training on the CPU: threads that the user or the launcher set, and the faster dtype."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from qlora_harness.train import cpu

LAUNCH = ["python", "accelerate", "launch"]


@pytest.mark.parametrize(
    ("own", "words", "environment", "given"),
    [
        ("1", LAUNCH, {}, False),
        ("1", LAUNCH, {"OMP_NUM_THREADS": "1"}, True),
        ("1", [*LAUNCH, "--num_cpu_threads_per_process", "1"], {}, True),
        ("1", [*LAUNCH, "--num_cpu_threads_per_process=1"], {}, True),
        ("1", [*LAUNCH, "--num-cpu-threads-per-process=1"], {}, True),
        ("3", LAUNCH, {}, True),
        (None, LAUNCH, {}, True),
    ],
)
@pytest.mark.parametrize("processes", [1, 4])
def test_all_cores_are_used_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, own: str | None, words: list[str],
    environment: dict[str, str], given: bool, processes: int,
) -> None:  # fmt: skip
    launcher = SimpleNamespace(cmdline=lambda: words, environ=lambda: environment)
    monkeypatch.setattr(cpu, "LAUNCHER", launcher)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda process: range(16), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    assert cpu.use_all_cores() is not given
    assert chosen == ([] if given else [8 // processes])


def test_without_a_launcher_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LAUNCHER", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not cpu.use_all_cores()


def test_dtypes_are_measured_in_milliseconds() -> None:
    assert 0 < cpu.bfloat16_slowdown() < 1000

"""What must be ready before the first Triton kernel; the kernels are tested on GPUs."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from qlora_harness.fused import launch


@pytest.mark.parametrize("place", ["triton.runtime.cache", "triton.compiler.compiler"])
def test_tritons_hash_is_computed_once_in_a_thread(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    done = threading.Event()

    def triton_key() -> None:
        threads.append(threading.current_thread().name)
        done.set()

    def import_module(name: str) -> SimpleNamespace:
        return SimpleNamespace(**({"triton_key": triton_key} if name == place else {}))

    monkeypatch.setattr(launch, "_HAS_TRITON", True)
    monkeypatch.setattr(launch, "import_module", import_module)
    launch.hash_triton_ahead.cache_clear()
    launch.hash_triton_ahead()
    launch.hash_triton_ahead()
    assert done.wait(10)
    launch.hash_triton_ahead.cache_clear()
    assert threads == ["qlora_harness hash"]

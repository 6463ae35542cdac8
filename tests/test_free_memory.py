"""Free memory of the host, with and without a control group's limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from qlora_harness.model import free_memory
from qlora_harness.model.free_memory import available_memory

ALL = 10**12


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    own = tmp_path / "own"
    own.write_text("0::/slice/job\n")
    groups = tmp_path / "groups"
    groups.mkdir()
    monkeypatch.setattr(free_memory, "_GROUPS", groups)
    monkeypatch.setattr(free_memory, "_OWN_GROUP", own)

    class Memory:
        available = ALL

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    return groups


def limit(group: Path, most: str, used: int, files: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nslab 1\n")


def test_without_a_limit_the_machine_decides(groups: Path) -> None:
    assert available_memory() == ALL
    limit(groups, "max", 100, 0)
    assert available_memory() == ALL


def test_cached_files_count_as_free(groups: Path) -> None:
    limit(groups, "900", 500, 300)
    assert available_memory() == 900 - (500 - 300)
    limit(groups, "900", 1000, 0)
    assert available_memory() == 0
    limit(groups, str(2 * ALL), 0, 0)
    assert available_memory() == ALL


def test_limits_of_parent_groups_count(groups: Path) -> None:
    limit(groups, "max", 0, 0)
    limit(groups / "slice" / "job", "700", 200, 0)
    assert available_memory() == 500
    limit(groups / "slice", "600", 200, 0)  # of all jobs together
    assert available_memory() == 400
    limit(groups / "slice" / "job", "max", 200, 0)
    assert available_memory() == 400
    free_memory._OWN_GROUP.unlink()
    assert available_memory() == ALL

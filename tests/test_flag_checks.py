"""Flags that are not settings: what is refused, and that no file is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_harness.errors import SettingsError
from qlora_harness.flag_checks import (
    check_above_zero,
    check_at_least,
    check_output_file,
    why_not_writable,
)


def refusal(path: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        check_output_file("--json", path)
    return str(caught.value)


def test_numbers() -> None:
    check_at_least({"--rows": None, "--steps": 1}, 1)
    check_above_zero("--peer-timeout", 0.5)
    with pytest.raises(SettingsError, match=r"^--rows: 0 .* at least 1\.$"):
        check_at_least({"--steps": 1, "--rows": 0}, 1)
    with pytest.raises(SettingsError, match=r"^--margin: 0 .* above 0\.$"):
        check_above_zero("--margin", 0)


def test_files_that_can_be_written_leave_nothing_behind(tmp_path: Path) -> None:
    check_output_file("--json", None)
    check_output_file("--json", tmp_path / "a" / "b" / "new.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text("{}")
    check_output_file("--json", tmp_path / "old.json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


def test_output_that_is_not_a_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"--json {tmp_path} is a folder. Name a file."
    assert refusal(Path("/dev/null")) == "--json /dev/null is not a file. Name a file."
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == f"--json {tmp_path}/pipe is not a file. Name a file."


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert refusal(file / "x.json") == f"--json {file}/x.json: {file} is a file. Name another file."
    name = "x" * 300
    assert refusal(tmp_path / name) == (
        f"--json {tmp_path}/{name} can't be written (File name too long). Name another file."
    )
    assert refusal(tmp_path / name / "x.json").endswith(" (File name too long). Name another file.")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_proc_is_not_writable() -> None:
    reason = why_not_writable(Path("/proc/x/y"))
    assert str(reason).startswith("/proc can't be written (")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert why_not_writable(tmp_path / "x") == f"{tmp_path} can't be written (Permission denied)"

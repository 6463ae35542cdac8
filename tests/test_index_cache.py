from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks._index import Entry, Kind

from qlora_harness.score.index_cache import cached_index

Index = dict[str, Entry]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tasks" / "arc").mkdir(parents=True)
    (tmp_path / "tasks" / "arc" / "arc.yaml").write_text("task: arc\n")
    return tmp_path / "tasks"


def index(**cfg: Any) -> Index:
    path = Path("/x/arc.yaml")
    return {
        "arc": Entry("arc", Kind.TASK, path, {"task": "arc", "n": [1, 2.5, None], **cfg}, {"t"}),
        "t": Entry("t", Kind.TAG, None, None, {"arc"}),
        "group": Entry("group", Kind.GROUP, path, {"group": "group", "task": ["arc"]}, set()),
    }


def counting(made: Index) -> tuple[Callable[[], Index], list[int]]:
    calls: list[int] = []

    def build() -> Index:
        calls.append(1)
        return made

    return build, calls


def cached_files(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache" / "qlora-harness" / "task-index").glob("*"))


def test_second_run_gets_an_equal_index_without_building(folder: Path) -> None:
    build, calls = counting(index())
    assert cached_index(folder, build) == index()
    found = cached_index(folder, build)
    assert found == index()
    assert list(found) == list(index())
    assert len(calls) == 1


def touch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "arc" / "arc.yaml").write_text("task: arc2\n"),
        lambda folder: touch(folder / "arc" / "arc.yaml"),
        lambda folder: (folder / "arc" / "_template_yaml").write_text("a: 1\n"),
        lambda folder: (folder / "arc" / "arc.yaml").rename(folder / "arc" / "b.yaml"),
        lambda folder: (folder / "arc" / "arc.yaml").unlink(),
    ],
)
def test_any_change_of_a_file_builds_anew(folder: Path, change: Callable[[Path], Any]) -> None:
    build, calls = counting(index())
    cached_index(folder, build)
    change(folder)
    cached_index(folder, build)
    assert len(calls) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"arc": {}}', '{"arc": 1}'])
def test_damaged_cache_is_passed_over(folder: Path, content: str) -> None:
    build, calls = counting(index())
    cached_index(folder, build)
    (path,) = cached_files(folder)
    path.write_text(content)
    assert cached_index(folder, build) == index()
    assert cached_index(folder, build) == index()
    assert len(calls) == 2


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), {1: "a"}, (1, 2), {3}])
def test_what_json_would_change_is_not_kept(folder: Path, value: Any) -> None:
    build, calls = counting(index(odd=value))
    for _ in range(2):
        assert cached_index(folder, build) == index(odd=value)
    assert len(calls) == 2
    assert cached_files(folder) == []


def test_cache_that_cannot_be_written_does_no_harm(folder: Path) -> None:
    (folder.parent / "cache").write_text("a file in the way")
    build, calls = counting(index())
    assert cached_index(folder, build) == index()
    assert len(calls) == 1


def test_old_indices_go(folder: Path) -> None:
    for n in range(6):
        (folder / "arc" / "arc.yaml").write_text("#" * n)
        cached_index(folder, counting(index())[0])
    assert len(cached_files(folder)) == 3


def test_index_that_lacks_most_files_is_not_kept(folder: Path) -> None:
    for n in range(5):
        (folder / "arc" / f"more{n}.yaml").write_text(f"task: t{n}\n")
    build, calls = counting(index())  # three entries for six files
    for _ in range(2):
        assert cached_index(folder, build) == index()
    assert len(calls) == 2
    build, calls = counting({})
    assert cached_index(folder, build) == {}
    assert cached_files(folder) == []

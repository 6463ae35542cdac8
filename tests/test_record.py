"""Records are written whole or not at all, and hold no secrets."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from qlora_harness import record
from qlora_harness.errors import ResultsError
from qlora_harness.record import git_state, nested, read_json, scrub, write_json, write_text


def test_write_json_makes_the_folder_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"loss": 1.5, "text": "é ⟦"})
    assert path.read_text(encoding="utf-8") == '{\n "loss": 1.5,\n "text": "é ⟦"\n}\n'
    assert read_json(path) == {"loss": 1.5, "text": "é ⟦"}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_rows_stand_on_one_line_from_a_depth_on(tmp_path: Path) -> None:
    value = {"a": 1, "empty": [], "rows": [{"x": [1, 2]}, {"x": None, "ü": "\n"}]}
    path = tmp_path / "file.json"
    write_json(path, value, rows_at=2)
    assert path.read_text(encoding="utf-8").splitlines() == [
        "{",
        ' "a": 1,',
        ' "empty": [],',
        ' "rows": [',
        '  {"x": [1, 2]},',
        '  {"x": null, "ü": "\\n"}',
        " ]",
        "}",
    ]
    assert read_json(path) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_json_does_not_know_leave_the_old_file(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.0})
    for rows_at in (None, 1):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(path, {"loss": [value]}, rows_at=rows_at)
    assert read_json(path) == {"loss": 1.0}


def test_failed_replacement_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b'{"a": 1,\n "b": }', ", line 2: not valid JSON (Expecting value)"),
        (b'{"a": 1', ", line 1: not valid JSON (Expecting ',' delimiter)"),
        (b"", ", line 1: not valid JSON (Expecting value)"),
        (b"[1]", ": expected a JSON object, found list"),
        (b'{"a": ' + b"1" * 5000 + b"}", ": not valid JSON (a number of 5000 digits)"),
        (b'{"a": 1, "a": 2}', ": not valid JSON (the key 'a' is repeated)"),
        (b'{"a": "\\ud800"}', ": not valid JSON (a text holds half of a surrogate pair)"),
        (b"[" * 100_000, ": not valid JSON (brackets too deep)"),
        *(
            (b'{"a":' + left * depth + b"1" + right * depth + b"}", ": not valid JSON (brackets")
            for left, right in ((b'{"a":', b"}"), (b"[", b"]"))
            for depth in (200, 900, 100_000)
        ),
        (b"\xff\xfe{", " can't be read"),
        (None, " does not exist"),
    ],
)
def test_unreadable_json_is_named_with_its_line(
    tmp_path: Path, content: bytes | None, facts: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultsError) as caught:
        read_json(path)
    assert caught.value.problem.startswith(f"{path}{facts}")


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        (
            "train.py --model /home/ann/llama --token hf_" + "a1B2" * 8,
            "train.py --model ~/llama --token hf_***",
        ),
        ("/home/anna/llama and /data/home/ann/x", "/home/anna/llama and /data/home/ann/x"),
    ],
)
def test_scrub_removes_tokens_and_the_home_folder_only(
    monkeypatch: pytest.MonkeyPatch, text: str, scrubbed: str
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert scrub(text) == scrubbed


def test_nested_reads_a_path_or_gives_none() -> None:
    value = {"a": {"b": {"c": 0}}, "n": None, "text": "x"}
    assert nested(value, "a", "b", "c") == 0
    assert nested(value, "a", "x", "c") is None
    assert nested(value, "n", "b") is None
    assert nested(value, "text", "b") is None


def test_environment_names_versions_platform_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py", "--quant", "nf4"])
    environment = record.environment()
    assert set(environment) == {"versions", "git", "platform", "machine", "cpu_count", "command"}
    assert environment["command"] == "train.py --quant nf4"
    for name in ("torch", "transformers", "peft", "bitsandbytes", "lm_eval"):
        assert environment["versions"][name] == metadata.version(name)
    assert json.loads(json.dumps(environment)) == environment


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_git_state_knows_revision_and_changes_of_its_own_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "record.py").write_text("one")
    git(tmp_path, "add", "record.py")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"revision": head, "dirty": False}
    (tmp_path / "notes.txt").write_text("untracked files do not count")
    assert git_state(tmp_path) == {"revision": head, "dirty": False}
    (tmp_path / "record.py").write_text("two")
    assert git_state(tmp_path) == {"revision": head, "dirty": True}
    # An installed copy inside somebody's project is no part of that project.
    installed = tmp_path / "venv" / "qlora_harness"
    installed.mkdir(parents=True)
    (installed / "record.py").write_text("")
    assert git_state(installed) == {"revision": None, "dirty": None}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_own_records_hold_no_nan_and_no_infinity(tmp_path: Path, number: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'{{"steps": [1, {{"loss": {number}}}]}}')
    read_json(path)  # of lm_eval, for example
    with pytest.raises(ResultsError, match=r"steps\.1\.loss is .*, not a finite number"):
        read_json(path, finite=True)


def test_compressed_records_are_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json.xz"
    path.write_bytes(lzma.compress(b'{"loss": 0.5}'))
    assert read_json(path) == {"loss": 0.5}


@pytest.mark.parametrize("content", [b"not xz", lzma.compress(b'{"loss": 0.5}')[:-9], b""])
def test_damaged_compressed_records_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json.xz"
    path.write_bytes(content)
    with pytest.raises(ResultsError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)

"""Records are written whole or not at all, and hold no secrets."""

from __future__ import annotations

import json
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
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": [[float("nan")]]}, rows_at=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_json_does_not_know_leave_the_old_file(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError):
        write_json(path, {"loss": value})
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
    ("content", "problem"),
    [
        ('{"a": 1,\n "b": }', "{path}, line 2: not valid JSON (Expecting value)"),
        ('{"a": 1', "{path}, line 1: not valid JSON (Expecting ',' delimiter)"),
        ("", "{path}, line 1: not valid JSON (Expecting value)"),
        ("[1]", "{path}: expected a JSON object, found list"),
        ("[" * 100_000, "{path}: not valid JSON (brackets too deep)"),
        ('{"a": ' + "1" * 5000 + "}", "{path}: not valid JSON (a number of 5000 digits)"),
        ('{"a": 1, "a": 2}', "{path}: not valid JSON (the key 'a' is repeated)"),
        ('{"a": "\\ud800"}', "{path}: not valid JSON (a text holds half of a surrogate pair)"),
    ],
)
def test_unreadable_json_is_named_with_its_line(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ResultsError) as caught:
        read_json(path)
    assert caught.value.problem == problem.format(path=path)


def test_missing_and_undecodable_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ResultsError) as missing:
        read_json(path)
    assert str(missing.value) == f"{path} does not exist. Check the path."
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ResultsError, match="can't be read"):
        read_json(path)


def test_scrub_removes_tokens_and_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    token = "hf_" + "a1B2" * 8
    text = f"train.py --model /home/ann/llama --token {token}"
    assert scrub(text) == "train.py --model ~/llama --token hf_***"


def test_scrub_leaves_other_folders_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert scrub("/home/anna/llama and /data/home/ann/x") == "/home/anna/llama and /data/home/ann/x"


def test_nested_reads_a_path_or_gives_none() -> None:
    value = {"a": {"b": {"c": 0}}, "n": None, "text": "x"}
    assert nested(value, "a", "b", "c") == 0
    assert nested(value, "a", "x", "c") is None
    assert nested(value, "n", "b") is None
    assert nested(value, "text", "b") is None


def test_environment_names_versions_platform_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py", "--quant", "nf4"])
    found = record.environment()
    assert set(found) == {"versions", "git", "platform", "machine", "cpu_count", "command"}
    assert found["command"] == "train.py --quant nf4"
    for name in ("torch", "transformers", "peft", "bitsandbytes", "lm_eval"):
        assert found["versions"][name] == metadata.version(name)
    assert json.loads(json.dumps(found)) == found


def _git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_git_state_knows_revision_and_changes(tmp_path: Path) -> None:
    _git(tmp_path, "init", "--quiet")
    (tmp_path / "record.py").write_text("one")
    _git(tmp_path, "add", "record.py")
    _git(tmp_path, "commit", "--quiet", "-m", "one")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"revision": head, "dirty": False}
    (tmp_path / "notes.txt").write_text("untracked files do not count")
    assert git_state(tmp_path) == {"revision": head, "dirty": False}
    (tmp_path / "record.py").write_text("two")
    assert git_state(tmp_path) == {"revision": head, "dirty": True}


def test_an_installed_copy_does_not_report_the_checkout_around_it(tmp_path: Path) -> None:
    _git(tmp_path, "init", "--quiet")
    (tmp_path / "mine.txt").write_text("somebody else's project")
    _git(tmp_path, "add", "mine.txt")
    _git(tmp_path, "commit", "--quiet", "-m", "one")
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


@pytest.mark.parametrize(("left", "right"), [('{"a":', "}"), ("[", "]")])
def test_records_of_many_levels_are_refused(tmp_path: Path, left: str, right: str) -> None:
    path = tmp_path / "a.json"
    for depth in (200, 900, 100_000):
        path.write_text('{"a":' + left * depth + "1" + right * depth + "}")
        with pytest.raises(ResultsError, match="brackets too deep"):
            read_json(path)

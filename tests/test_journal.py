from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_harness.errors import ResultsError
from qlora_harness.score.journal import Journal, question_key

IDENTITY = {"base": "llama", "quant": "nf4", "adapter_sha256": "a" * 64}


def test_what_was_appended_is_known_to_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    first = Journal(path, IDENTITY)
    assert first.known == {}
    first.append([("k1", -1.25, True), ("k2", -2.5, False)])
    first.append([("k3", -0.1, True)])
    second = Journal(path, IDENTITY)
    assert second.known == {"k1": (-1.25, True), "k2": (-2.5, False), "k3": (-0.1, True)}
    second.append([("k4", -4.0, False)])
    assert set(Journal(path, IDENTITY).known) == {"k1", "k2", "k3", "k4"}


@pytest.mark.parametrize("key", sorted(IDENTITY))
def test_another_model_never_gets_these_answers(tmp_path: Path, key: str) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, IDENTITY).append([("k1", -1.0, True)])
    other = Journal(path, IDENTITY | {key: "other"})
    assert other.known == {}
    other.append([("k2", -2.0, True)])
    assert Journal(path, IDENTITY | {key: "other"}).known == {"k2": (-2.0, True)}
    assert Journal(path, IDENTITY).known == {}


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, IDENTITY).append([("k1", -1.0, True), ("k2", -2.0, True)])
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, IDENTITY)
    assert "k1" in again.known
    again.append([("k3", -3.0, True)])
    assert {"k1", "k3"} <= set(Journal(path, IDENTITY).known)


@pytest.mark.parametrize(
    ("key", "logprob", "greedy"),
    [
        ("k1", 1e-9, True),
        ("k1", float("nan"), True),
        ("k1", float("-inf"), True),
        ("k1", None, True),
        ("k1", "-1", True),
        ("k1", -(10**400), True),
        ("k1", False, True),
        (["k1"], -1.0, True),
        ({"k1": 1}, -1.0, True),
        ("k1", -1.0, "no"),
    ],
)
def test_a_line_that_is_no_score_is_scored_again_in_spite_of_its_checksum(
    tmp_path: Path, key: Any, logprob: Any, greedy: Any
) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, IDENTITY)
    journal.append([("k2", -2.0, True)])
    line = {"key": key, "logprob": logprob, "greedy": greedy}
    line["check"] = journal._checksum(key, logprob, greedy)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert Journal(path, IDENTITY).known == {"k2": (-2.0, True)}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1, 2", b'{"other": 1}\n{"key": 2}\n'])
def test_a_foreign_file_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    journal = Journal(path, IDENTITY)
    assert journal.known == {}
    journal.append([("k1", -1.0, True)])
    assert Journal(path, IDENTITY).known == {"k1": (-1.0, True)}


def test_close_removes_the_file_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, IDENTITY)
    journal.append([("k1", -1.0, True)])
    journal.close(remove=False)
    assert path.is_file()
    journal.close(remove=True)
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResultsError, match=r"file/journal\.jsonl can't be written"):
        Journal(tmp_path / "file" / "journal.jsonl", IDENTITY).append([("k", -1.0, True)])


def test_the_key_is_the_hash_of_the_whole_text() -> None:
    """What an interrupted run of an older version wrote is still read."""
    assert question_key("a", "b") == "59b271ae1bbcb1d31d41929817f4b16f"
    pairs = [("a", "b"), ("ab", ""), ("", "ab"), ("Frage: Größe?\nAnswer:", " A")]
    keys = [question_key(*pair) for pair in pairs]
    assert len(set(keys)) == 4
    assert keys == [hashlib.sha256("\0".join(pair).encode()).hexdigest()[:32] for pair in pairs]

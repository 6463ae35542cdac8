"""Errors are one line, tell the remedy, and reach the user without a traceback."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys

import pytest

from qlora_harness import errors
from qlora_harness.cli import main as cli
from qlora_harness.errors import (
    DataError,
    HarnessError,
    TrainingError,
    of_system,
    print_error,
    shown,
)


def test_message_is_problem_and_remedy_as_two_sentences() -> None:
    error = DataError("rows.jsonl, line 3: field 'text' is missing", "Correct the line")
    assert str(error) == "rows.jsonl, line 3: field 'text' is missing. Correct the line."
    assert (error.problem, error.remedy) == (
        "rows.jsonl, line 3: field 'text' is missing",
        "Correct the line",
    )


def test_message_is_one_line_whatever_the_library_said() -> None:
    error = DataError("can't be read: first\n  second\n\nthird.", "Check\tit.")
    assert str(error) == "can't be read: first second third. Check it."


@pytest.mark.parametrize(
    "value", ["x" * 200_000, 10**4000, {"a": ["y" * 9_999] * 99}, "\ud800\x1b[2J"]
)
def test_values_of_any_size_give_one_bounded_printable_line(value: object) -> None:
    for text in (shown(value), str(DataError(f"a.json, key 'b': {shown(value)}", "Mend it"))):
        assert text.isprintable() and len(text) <= 500
    assert len(shown(value)) <= 80
    raw = str(DataError(f"a.json, key 'b': {str(value)[:200_000]} is wrong", "Mend it"))
    assert raw.startswith("a.json, key 'b': ") and raw.endswith(" is wrong. Mend it.")
    assert raw.isprintable() and len(f"qlora-harness: error: {raw}") <= 500


def test_log_lines_hold_no_control_characters(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("qlora_harness").warning("model %s", "\x1b]0;owned\x07 \u202eabc")
    assert caplog.messages == ["model \\x1b]0;owned\\x07 \\u202eabc"]


def test_print_error_writes_one_line_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(DataError("broken\nfile", "Mend it"))
    assert capsys.readouterr() == ("", "qlora-harness: error: broken file. Mend it.\n")


def test_every_kind_is_a_harness_error_with_status_2_but_a_failed_training_has_3() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, HarnessError) and kind is not HarnessError
    ]
    assert {kind.__name__: kind.exit_status for kind in kinds} == {
        "SettingsError": 2,
        "DataError": 2,
        "ModelError": 2,
        "AdapterError": 2,
        "RunError": 2,
        "ResultsError": 2,
        "ComparisonError": 2,
        "TrainingError": 3,
    }
    # The tree in the module's docstring names them all.
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)
    assert TrainingError("a", "b").exit_status == 3


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_excepthook_prints_our_errors_as_one_line() -> None:
    done = _run(
        "from qlora_harness.errors import *\n"
        "install_excepthook(); install_excepthook()\n"
        "raise DataError('x is missing', 'Add x')"
    )
    assert (done.returncode, done.stderr) == (1, "qlora-harness: error: x is missing. Add x.\n")


def test_errors_of_the_system_that_a_user_can_mend_are_one_line() -> None:
    too_long = of_system(OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300))
    assert str(too_long) == f"{'a' * 52}…{'a' * 27}: File name too long. Use a shorter name."
    full = of_system(OSError(errno.ENOSPC, "No space left on device"))
    assert str(full) == "No space left on device. Make room there, or name another place."
    assert of_system(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    assert of_system(OSError("a library's own")) is None
    done = _run(
        "from qlora_harness.errors import *\n"
        "install_excepthook()\nraise PermissionError(13, 'Permission denied', 'x.json')"
    )
    assert (done.returncode, done.stderr) == (
        1,
        "qlora-harness: error: x.json: Permission denied. Check the permissions there, or name "
        "another place.\n",
    )


@pytest.mark.parametrize("words", [["plan", "--model"], ["show"]])
def test_names_that_are_too_long_are_told(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli([*words, "a" * 300]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith(": File name too long. Use a shorter name.\n")
    assert "…" in said.err
    assert said.err.count("\n") == 1


def test_excepthook_leaves_other_exceptions_their_traceback() -> None:
    done = _run(
        "from qlora_harness.errors import install_excepthook\n"
        "install_excepthook()\nraise ValueError('boom')"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("ValueError: boom\n")

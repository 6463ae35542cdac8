"""Errors are one line, tell the remedy, and reach the user without a traceback."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys

import pytest

from qlora_harness.errors import (
    DataError,
    of_system,
    print_error,
    shown,
)


def test_message_is_problem_and_remedy_on_one_line_whatever_the_library_said() -> None:
    error = DataError("rows.jsonl, line 3: first\n  second\n\nthird.", "Check\tit")
    assert str(error) == "rows.jsonl, line 3: first second third. Check it."
    assert error.remedy == "Check\tit"


@pytest.mark.parametrize(
    "value", ["x" * 200_000, 10**4000, {"a": ["y" * 9_999] * 99}, "\ud800\x1b[2J"]
)
def test_values_of_any_size_give_one_bounded_printable_line(value: object) -> None:
    for text in (shown(value), str(DataError(f"a.json, key 'b': {shown(value)}", "Mend it"))):
        assert text.isprintable()
        assert len(text) <= 500
    assert len(shown(value)) <= 80
    raw = str(DataError(f"a.json, key 'b': {str(value)[:200_000]} is wrong", "Mend it"))
    assert raw.startswith("a.json, key 'b': ")
    assert raw.endswith(" is wrong. Mend it.")
    assert raw.isprintable()
    assert len(f"qlora-harness: error: {raw}") <= 500


def test_log_lines_hold_no_control_characters(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("qlora_harness").warning("model %s", "\x1b]0;owned\x07 \u202eabc")
    assert caplog.messages == ["model \\x1b]0;owned\\x07 \\u202eabc"]


def test_print_error_writes_one_line_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(DataError("broken\nfile", "Mend it"))
    assert capsys.readouterr() == ("", "qlora-harness: error: broken file. Mend it.\n")


def raised(statement: str) -> tuple[int, str]:
    """Returns status and stderr of a program that installs our hook, twice, and raises this."""
    hook = "install_excepthook(); install_excepthook()"
    code = f"from qlora_harness.errors import *\n{hook}\nraise {statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_excepthook_prints_what_a_user_can_mend_as_one_line() -> None:
    line = "qlora-harness: error: x is missing. Add x.\n"
    assert raised("DataError('x is missing', 'Add x')") == (1, line)
    status, said = raised("PermissionError(13, 'Permission denied', 'x.json')")
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith("qlora-harness: error: x.json: Permission denied.")
    status, said = raised("ValueError('boom')")
    assert status == 1
    assert said.startswith("Traceback (most recent call last):")
    assert said.endswith("ValueError: boom\n")


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300),
            f"{'a' * 52}…{'a' * 27}: File name too long.",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device."),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), None),
        (OSError("a library's own"), None),
    ],
)
def test_errors_of_the_system_that_a_user_can_mend(error: OSError, facts: str | None) -> None:
    told = of_system(error)
    assert told is None if facts is None else str(told).startswith(facts)

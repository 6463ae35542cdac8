"""The errors a user can cause, as one small hierarchy.

    HarnessError
    ├── SettingsError     a flag, a recipe key or a combination of them
    ├── DataError         a data file: missing, broken, empty after filtering
    ├── ModelError        a base model: missing, gated, unreadable, unsuitable
    ├── AdapterError      an adapter: broken, untrained, or for another base
    ├── RunError          a run folder: occupied, unfinished, not resumable
    ├── ResultsError      a results file: missing, unreadable, contradicting itself
    ├── ComparisonError   runs that can't be compared
    └── TrainingError     a run that went wrong while training (non-finite loss)

Every message is one line of at most 500 characters that says what is wrong, where (file, key,
flag, value) and what to do. The commands print it without a traceback; Python callers get the
exception.

Names and values may come from a stranger's file, so whatever is printed of them passes through
`printable`: no control character reaches a terminal.
"""

from __future__ import annotations

import errno
import logging
import os
import reprlib
import sys
from collections.abc import Callable
from types import TracebackType

_LONGEST_LINE = 500
_PREFIX = "qlora-harness: error: "
_LONGEST_REMEDY = 200
_SHOWN_CHARACTERS = 80


def printable(text: str, keep: str = "") -> str:
    """Escapes every character that isn't printable, but those in `keep`.

    Control characters, marks that change the direction of writing, and lone surrogates are escaped.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def shown(value: object, limit: int = _SHOWN_CHARACTERS) -> str:
    """Returns the repr of a value for a message, cut in the middle to `limit` characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    try:
        text = short.repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return _cut(printable(text), limit)


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's message; a bare KeyError gets its name."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    terse = isinstance(error, KeyError | TypeError | AttributeError | IndexError)
    return f"{type(error).__name__}: {lines[0]}" if terse else lines[0]


def _cut(text: str, limit: int) -> str:
    """Leaves out the middle: a message begins with the place and ends with the rule."""
    if len(text) <= limit:
        return text
    head = (limit - 1) * 2 // 3
    return f"{text[:head]}…{text[head + 1 - limit :]}"


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage(), keep="\n"), ()
        return True


logging.getLogger("qlora_harness").addFilter(_Printable())


class HarnessError(Exception):
    """Base of every error that a user can cause and fix.

    `problem` says what is wrong and where, with the value; `remedy` says what to do.
    """

    exit_status = 2

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        problem, remedy = _one_line(self.problem), _one_line(self.remedy)
        room = _LONGEST_LINE - len(_PREFIX) - len(". .")
        remedy = _cut(remedy, max(_LONGEST_REMEDY, room - len(problem)))
        return f"{_cut(problem, room - len(remedy))}. {remedy}."


def _one_line(text: str) -> str:
    text = _cut(text, 20 * _LONGEST_LINE)  # some are megabytes long
    return printable(" ".join(text.split())).rstrip(".")


class SettingsError(HarnessError):
    """A flag, a recipe key or a combination of them is wrong."""


class DataError(HarnessError):
    """A data file is missing, broken or empty after filtering."""


class ModelError(HarnessError):
    """A base model is missing, gated, unreadable or unsuitable."""


class AdapterError(HarnessError):
    """An adapter is broken, untrained or belongs to another base model."""


class RunError(HarnessError):
    """A run folder is occupied, unfinished or can't be resumed."""


class ResultsError(HarnessError):
    """A results file is missing, unreadable or contradicts itself."""


class ComparisonError(HarnessError):
    """The runs were made under conditions that don't allow a comparison."""


class TrainingError(HarnessError):
    """Training went wrong in a way that more steps can't fix."""

    exit_status = 3


_REMEDIES = {
    errno.ENAMETOOLONG: "Use a shorter name",
    errno.EACCES: "Check the permissions there, or name another place",
    errno.EPERM: "Check the permissions there, or name another place",
    errno.EROFS: "Name another place",
    errno.ENOSPC: "Make room there, or name another place",
    errno.EDQUOT: "Make room there, or name another place",
}


def of_system(error: OSError) -> HarnessError | None:
    """Returns the message for a system error that a user can fix, or None."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    place = "" if error.filename is None else _cut(os.fsdecode(error.filename), _SHOWN_CHARACTERS)
    return HarnessError(": ".join(filter(None, (place, os.strerror(error.errno or 0)))), remedy)


def print_error(error: HarnessError) -> None:
    """Prints an error as one line on standard error."""
    print(f"{_PREFIX}{error}", file=sys.stderr, flush=True)


def run_command(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit status.

    A HarnessError, or a system error that a user can fix, is printed as one line. Ctrl-C is 130.
    """
    try:
        return command()
    except KeyboardInterrupt:
        return 130
    except (HarnessError, OSError) as error:
        message = _message_for(error)
        if message is None:
            raise
        print_error(message)
        return message.exit_status


def _message_for(error: BaseException) -> HarnessError | None:
    """Returns what is printed instead of a traceback, or None if the traceback belongs there."""
    if isinstance(error, OSError):
        return of_system(error)
    return error if isinstance(error, HarnessError) else None


def install_excepthook() -> None:
    """Prints uncaught errors of a user as one line where lm_eval owns the main function.

    Other exceptions keep their traceback. Calling it twice is harmless.
    """
    previous = sys.excepthook
    if getattr(previous, "_qlora_harness", False):
        return

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        message = _message_for(error)
        if message is None:
            previous(kind, error, traceback)
        else:
            print_error(message)

    hook._qlora_harness = True  # type: ignore[attr-defined]  # noqa: SLF001  # marks our own hook
    sys.excepthook = hook

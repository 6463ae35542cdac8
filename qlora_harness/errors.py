"""The errors a user can cause, as one small hierarchy.

    HarnessError
    ├── SettingsError     a flag, a recipe key or a combination of them
    ├── DataError         a data file: missing, broken, empty after filtering
    ├── ModelError        a base model: missing, gated, unreadable, unsuitable
    ├── AdapterError      an adapter: broken, foreign, untrained
    ├── RunError          a run folder: occupied, unfinished, not resumable
    ├── ResultsError      a results file: missing, unreadable, contradicting itself
    ├── ComparisonError   runs that cannot be compared
    └── TrainingError     a run that went wrong while training (non-finite loss)

Every message is one line of at most 500 characters that says what is wrong, where (file, key,
flag, value seen) and what to do. The command lines print it without a traceback; a caller from
Python gets the exception.

Names and values come from files of strangers. Whatever is printed of them passes through
`printable`, so that no control character reaches a terminal.
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
    """Returns a text with an escape in place of every character that isn't printable.

    Those are control characters, marks that turn the direction of writing, and lone surrogates.

    Args:
        text: May come from anybody.
        keep: Characters that stay as they are, such as a line's end.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def shown(value: object, limit: int = _SHOWN_CHARACTERS) -> str:
    """Returns a value as an error message shows it: its repr, cut in the middle if it is long.

    Args:
        value: As it was read.
        limit: Most characters.
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    try:
        text = short.repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return _cut(printable(text), limit)


def _cut(text: str, limit: int) -> str:
    """Leaves out the middle: a message begins with the place and ends with the rule."""
    if len(text) <= limit:
        return text
    head = (limit - 1) * 2 // 3
    return f"{text[:head]}…{text[head + 1 - limit :]}"


class _Printable(logging.Filter):
    """Lets no control character into a log line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage(), keep="\n"), ()
        return True


logging.getLogger("qlora_harness").addFilter(_Printable())


class HarnessError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        problem: What is wrong and where, with the value seen.
        remedy: What to do about it.
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
    """The runs were not made under conditions that allow a comparison."""


class TrainingError(HarnessError):
    """Training went wrong in a way that more steps can't mend."""

    exit_status = 3


_REMEDIES = {
    errno.ENAMETOOLONG: "Name it shorter",
    errno.EACCES: "Check the permissions there, or name another place",
    errno.EPERM: "Check the permissions there, or name another place",
    errno.EROFS: "Name another place",
    errno.ENOSPC: "Make room there, or name another place",
    errno.EDQUOT: "Make room there, or name another place",
}


def of_system(error: OSError) -> HarnessError | None:
    """Returns the error to print for one of the system that a user can mend, or None for others.

    Args:
        error: Of the system; the place is left out where it names none.
    """
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    place = "" if error.filename is None else os.fsdecode(error.filename)
    place = _cut(place, _SHOWN_CHARACTERS)
    return HarnessError(": ".join(filter(None, (place, os.strerror(error.errno or 0)))), remedy)


def print_error(error: HarnessError) -> None:
    """Prints the error as one line on standard error.

    Args:
        error: What the user is told.
    """
    print(f"{_PREFIX}{error}", file=sys.stderr, flush=True)


def run_command(command: Callable[[], int]) -> int:
    """Runs a command; what a user can mend ends it with one line instead of a traceback.

    Args:
        command: Returns its exit status.

    Returns:
        That of the command, of its error, or 130 where it was interrupted.
    """
    try:
        return command()
    except KeyboardInterrupt:
        return 130
    except (HarnessError, OSError) as error:
        told = _told(error)
        if told is None:
            raise
        print_error(told)
        return told.exit_status


def _told(error: BaseException) -> HarnessError | None:
    """What the user is told of an error, or None where that is a traceback."""
    if isinstance(error, OSError):
        return of_system(error)
    return error if isinstance(error, HarnessError) else None


def install_excepthook() -> None:
    """Lets an uncaught HarnessError end the program with its one line instead of a traceback.

    So do those of the system that `of_system` knows; other exceptions keep their traceback. Used
    where another program (lm_eval) owns the main function; calling it twice is harmless.
    """
    previous = sys.excepthook
    if getattr(previous, "_qlora_harness", False):
        return

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        told = _told(error)
        if told is None:
            previous(kind, error, traceback)
        else:
            print_error(told)

    hook._qlora_harness = True  # type: ignore[attr-defined]
    sys.excepthook = hook

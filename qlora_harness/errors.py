"""The errors that a user can cause, all subclasses of HarnessError.

A message is one line of at most 500 characters: what is wrong, where (file, key, flag, value), and
what to do. Commands print it without a traceback. Names and values in it may come from a
stranger's file, so `printable` keeps their control characters from the terminal.
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
    """Escapes control characters, direction marks and lone surrogates, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def shown(value: object, limit: int = _SHOWN_CHARACTERS) -> str:
    """Returns the repr of a value for a message, shortened to `limit` characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    try:
        text = short.repr(value)
    except ValueError:  # Python doesn't print integers of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return _shorten(printable(text), limit)


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's message, with the error's name if it says little."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    terse = isinstance(error, KeyError | TypeError | AttributeError | IndexError)
    return f"{type(error).__name__}: {lines[0]}" if terse else lines[0]


def _shorten(text: str, limit: int) -> str:
    """Cuts the middle, because a message begins with the place and ends with the rule."""
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
    """An error that the user can fix: `problem` is what is wrong and where, `remedy` what to do."""

    exit_status = 2

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        problem, remedy = _one_line(self.problem), _one_line(self.remedy)
        room = _LONGEST_LINE - len(_PREFIX) - len(". .")
        remedy = _shorten(remedy, max(_LONGEST_REMEDY, room - len(problem)))
        return f"{_shorten(problem, room - len(remedy))}. {remedy}."


def _one_line(text: str) -> str:
    text = _shorten(text, 20 * _LONGEST_LINE)  # of megabytes, sometimes
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
    """The runs can't be compared."""


class TrainingError(HarnessError):
    """A training run went wrong, such as by a loss that isn't finite."""

    exit_status = 3


_SYSTEM_REMEDIES = {
    errno.ENAMETOOLONG: "Use a shorter name",
    errno.EACCES: "Check the permissions, or name another folder",
    errno.EPERM: "Check the permissions, or name another folder",
    errno.EROFS: "Name another folder",
    errno.ENOSPC: "Free some space, or name another folder",
    errno.EDQUOT: "Free some space, or name another folder",
}


def of_system(error: OSError) -> HarnessError | None:
    """Returns the error to print for a system error that the user can fix, else None."""
    remedy = _SYSTEM_REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    place = (
        "" if error.filename is None else _shorten(os.fsdecode(error.filename), _SHOWN_CHARACTERS)
    )
    return HarnessError(": ".join(filter(None, (place, os.strerror(error.errno or 0)))), remedy)


def print_error(error: HarnessError) -> None:
    """Prints an error as one line on standard error; of several processes, a wrong flag once."""
    if isinstance(error, SettingsError) and os.environ.get("RANK", "0") != "0":
        return
    print(f"{_PREFIX}{error}", file=sys.stderr, flush=True)


def run_command(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit status.

    Prints a HarnessError, or a system error that the user can fix, as one line. Ctrl-C gives 130.
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
    """Returns the error to print instead of a traceback, or None to leave the traceback."""
    if isinstance(error, OSError):
        return of_system(error)
    return error if isinstance(error, HarnessError) else None


def install_excepthook() -> None:
    """Prints uncaught errors of the user as one line, for programs whose main is lm_eval's."""
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

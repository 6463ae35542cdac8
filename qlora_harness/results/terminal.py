"""Numbers and texts of records on a terminal, whose reader may close the pipe early."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_harness.errors import printable

NOTHING = "–"


def optional(value: float | None, form: str) -> str:
    """Returns a number in a format such as "{:.2f}"; "–" for None."""
    return NOTHING if value is None else form.format(value)


def gib(size: float | None) -> str:
    """Returns bytes as GiB with two digits, without the unit; "–" for None."""
    return NOTHING if size is None else f"{size / 2**30:.2f}"


def duration(seconds: float) -> str:
    """Returns a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


class PrintableText(Text):
    """Text of a record for the terminal, with its control characters escaped."""

    def __init__(self, text: str = "", *args: Any, **options: Any) -> None:
        super().__init__(printable(text, keep="\n"), *args, **options)


class PipedConsole(Console):
    """A console that raises BrokenPipeError; rich's own would end the process."""

    def on_broken_pipe(self) -> None:
        """Raises the BrokenPipeError again."""
        raise BrokenPipeError


def close_quietly() -> None:
    """Keeps Python from reporting at exit that standard output was closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

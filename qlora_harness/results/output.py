"""Standard output that a reader such as `head` may close early."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_harness.errors import printable


class PrintableText(Text):
    """Text of a record for the terminal: control characters in it are escapes."""

    def __init__(self, text: str = "", *args: Any, **options: Any) -> None:
        super().__init__(printable(text, keep="\n"), *args, **options)


class PipedConsole(Console):
    """A console that leaves a closed pipe to its caller, where rich's own would end the process."""

    def on_broken_pipe(self) -> None:
        """Passes on the BrokenPipeError that is being handled."""
        raise BrokenPipeError


def close_quietly() -> None:
    """Keeps Python from reporting at its end that standard output was closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

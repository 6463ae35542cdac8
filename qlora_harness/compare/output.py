"""Standard output that a reader such as `head` may close early."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class PipedConsole(Console):
    """A console that leaves a closed pipe to its caller, where rich's own would end the process."""

    def on_broken_pipe(self) -> None:
        """Passes the error on.

        Raises:
            BrokenPipeError: Always; this is called while it is handled.
        """
        raise BrokenPipeError


def close_quietly() -> None:
    """Keeps Python from reporting at its end that standard output was closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

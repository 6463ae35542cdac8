"""Checks of flags that are not settings of a run: numbers and output files."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from qlora_harness.errors import SettingsError


def check_at_least(numbers: Mapping[str, int | None], low: int) -> None:
    """Raises SettingsError for the first flag whose number is below `low`; None is not given."""
    for flag, number in numbers.items():
        if number is not None and number < low:
            raise SettingsError(f"{flag}: {number} is out of range", f"It must be at least {low}")


def check_above_zero(flag: str, number: float) -> None:
    """Raises SettingsError unless a number is positive; NaN is not."""
    if not number > 0:
        raise SettingsError(f"{flag}: {number:g} is out of range", "It must be above 0")


def check_output_file(flag: str, path: Path | None) -> None:
    """Raises SettingsError if a file, which may be new, can't be written, before hours of work."""
    if path is None:
        return
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except OSError as error:
        raise SettingsError(
            f"{flag} {path} can't be written ({error.strerror})", "Name another file"
        ) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a file"
        raise SettingsError(f"{flag} {path} is {kind}", "Name a file")
    if reason := why_not_writable(path.parent):
        raise SettingsError(f"{flag} {path}: {reason}", "Name another file")


def why_not_writable(folder: Path) -> str | None:
    """Returns why a folder, or its nearest existing parent, can't be written, or None."""
    nearest = folder
    try:
        for nearest in (folder, *folder.parents):
            with suppress(FileNotFoundError, NotADirectoryError):
                nearest.stat()
                break
        if not nearest.is_dir():
            return f"{nearest} is a file"
        # Permissions alone don't tell, for root or for file systems such as /proc.
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"{nearest} can't be written ({error.strerror})"

"""Checks of flags that are no settings of a run: numbers, and files and folders to write."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qlora_harness.errors import SettingsError


def check_at_least(numbers: Mapping[str, int | None], low: int) -> None:
    """Refuses numbers that are too small.

    Args:
        numbers: By flag; None where it was not given.
        low: The smallest that is taken.

    Raises:
        SettingsError: One of them is smaller.
    """
    for flag, number in numbers.items():
        if number is not None and number < low:
            raise SettingsError(f"{flag}: {number} is out of range", f"It must be at least {low}")


def check_above_zero(flag: str, number: float) -> None:
    """Refuses 0, what is below, and what is no number.

    Args:
        flag: Where it was given.
        number: What was given.

    Raises:
        SettingsError: It is not above 0.
    """
    if not number > 0:
        raise SettingsError(f"{flag}: {number:g} is out of range", "It must be above 0")


def check_output_file(flag: str, path: Path | None) -> None:
    """Refuses, before hours of work, a file that could not be written at their end.

    Args:
        flag: Where it was given.
        path: The file, or None; it and its folder need not exist.

    Raises:
        SettingsError: It is a folder or a device, or its folder can't be written.
    """
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
    """Returns why no file could be written into a folder, or None; nothing is left there.

    Args:
        folder: Need not exist; then it is about the nearest of its parents that does.
    """
    place = folder
    try:
        place = _nearest(folder)
        if not place.is_dir():
            return f"{place} is a file"
        # Permissions alone tell too little: of root, and of file systems such as /proc.
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place} can't be written ({error.strerror})"


def _nearest(folder: Path) -> Path:
    """The folder, or the first of its parents that exists."""
    for place in (folder, *folder.parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return place
    return folder

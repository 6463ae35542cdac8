"""Processes: this one, the one that a record names, and the launcher that started this one."""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

_CLOCK_SECONDS = 2.0  # by how much the system may report another creation time of one process
_LAUNCHER_VARIABLES = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")


def host_id() -> str:
    """Returns 16 hexadecimal digits that tell this machine from others without naming it."""
    machine = ""
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        if path.is_file():
            machine = path.read_text(encoding="utf-8", errors="replace").strip()
            break
    return short_hash(f"{socket.gethostname()}\0{machine or uuid.getnode()}")


def short_hash(text: str) -> str:
    """Returns the first 16 hexadecimal digits of a text's SHA-256.

    Args:
        text: A name that records must not hold.
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def this_process() -> dict[str, Any]:
    """Returns what identifies this process in a record."""
    return {"id": os.getpid(), "host": host_id(), "started": psutil.Process().create_time()}


def is_running(process: Mapping[str, Any], begun: str | None) -> bool:
    """Returns whether the process of a record still runs on this machine.

    A process that merely has its number again is another: it was created at another time.

    Args:
        process: "id", "host" and "started" of the record. Older records hold the host's name, and
            no "started".
        begun: When the record was begun, ISO 8601, for older records.
    """
    number, started = process.get("id"), process.get("started")
    if process.get("host") not in (host_id(), socket.gethostname()) or not isinstance(number, int):
        return False
    try:
        other = psutil.Process(number)
        created = other.create_time()
        if other.status() == psutil.STATUS_ZOMBIE or number == os.getpid():
            return False
    except (psutil.Error, ValueError, OverflowError):
        return False
    if isinstance(started, int | float):
        return bool(abs(created - started) < _CLOCK_SECONDS)
    try:
        # A process that is older than the record has had its number since then.
        return bool(created < datetime.fromisoformat(begun or "").timestamp() + 1)
    except ValueError:
        return False


def launcher() -> psutil.Process | None:
    """Returns the launcher that started this process, or None if it was started without one."""
    if not any(name in os.environ for name in _LAUNCHER_VARIABLES):
        return None
    return psutil.Process().parent()


# As early as can be: the parent of an orphan is another process.
LAUNCHER = launcher()


def launcher_has_ended() -> bool:
    """Returns whether the launcher of this process has ended and left it alone."""
    return LAUNCHER is not None and os.getppid() != LAUNCHER.pid

"""The processes of a run: this one, the others, and the launcher that started them.

Imported before torch, as the launcher may end while torch is imported.
"""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from pathlib import Path
from typing import Any

import psutil

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
    """Returns 16 hexadecimal digits for a name that records must not hold."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def this_process() -> dict[str, Any]:
    """Returns what identifies this process in a record."""
    return {"id": os.getpid(), "host": host_id(), "started": psutil.Process().create_time()}


def _find_launcher() -> psutil.Process | None:
    """The launcher that started this process, or None if it was started without one."""
    if not any(name in os.environ for name in _LAUNCHER_VARIABLES):
        return None
    return psutil.Process().parent()


# As early as can be: once the launcher has ended, another process is the parent.
LAUNCHER = _find_launcher()


def launcher_has_ended() -> bool:
    """Returns whether the launcher of this process has ended and left it alone."""
    return LAUNCHER is not None and os.getppid() != LAUNCHER.pid

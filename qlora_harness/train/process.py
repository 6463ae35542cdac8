"""What identifies this process, and the launcher that started it.

Imported before torch, because the launcher may end during that import.
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
    """Returns 16 hexadecimal digits that identify this machine without naming it."""
    path = Path("/etc/machine-id")
    machine = path.read_text(errors="replace").strip() if path.is_file() else ""
    return short_hash(f"{socket.gethostname()}\0{machine or uuid.getnode()}")


def short_hash(text: str) -> str:
    """Returns 16 hexadecimal digits in place of a name that records must not hold."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def this_process() -> dict[str, Any]:
    """Returns what identifies this process in a record, even after its PID is reused."""
    return {"id": os.getpid(), "host": host_id(), "started": psutil.Process().create_time()}


def restarts() -> int:
    """Returns how often torchrun has restarted the processes of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _find_launcher() -> psutil.Process | None:
    if not any(name in os.environ for name in _LAUNCHER_VARIABLES):
        return None
    return psutil.Process().parent()


# Read early: once the launcher has ended, another process is the parent.
LAUNCHER = _find_launcher()


def launcher_has_ended() -> bool:
    """Returns whether this process has outlived its launcher."""
    return LAUNCHER is not None and os.getppid() != LAUNCHER.pid

"""Free host memory, within the limits of containers and jobs."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Returns the bytes of host memory that this process may still allocate.

    Respects the limits of its Linux control groups, version 2
    (https://docs.kernel.org/admin-guide/cgroup-v2.html); cached files count as free.
    """
    free = int(psutil.virtual_memory().available)
    group = _own_group()
    for folder in (group, *group.parents):
        if folder.is_relative_to(_GROUPS):
            free = min(free, _free_in(folder))
    return max(0, free)


def _free_in(group: Path) -> int:
    try:
        limit = int((group / "memory.max").read_text())  # "max" without a limit
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(counts.get("inactive_file", 0))
    except (OSError, ValueError):  # no limit
        return sys.maxsize


def _own_group() -> Path:
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return _GROUPS
    name = next((line[3:] for line in lines if line.startswith("0::")), "/")
    own = _GROUPS / name.strip("/")
    return own if own.is_dir() else _GROUPS  # a container sees its own group at the top

"""How much of the host's memory is free for this process."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Returns the bytes of the host's memory that this process may still take.

    The limit of a container or a job counts, where a Linux control group of version 2, the own one
    or one above it, sets it (https://docs.kernel.org/admin-guide/cgroup-v2.html); cached files that
    can be dropped do not.
    """
    free = int(psutil.virtual_memory().available)
    group = _own_group()
    for folder in (group, *group.parents):
        if folder.is_relative_to(_GROUPS):
            free = min(free, _free_in(folder))
    return max(0, free)


def _free_in(group: Path) -> int:
    """What a control group may still take, or all there could be where it has no limit."""
    try:
        limit = int((group / "memory.max").read_text())  # "max" without a limit
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(counts.get("inactive_file", 0))
    except (OSError, ValueError):
        return sys.maxsize


def _own_group() -> Path:
    """The folder of the process's control group; inside a container that is the top one."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return _GROUPS
    name = next((line[3:] for line in lines if line.startswith("0::")), "/")
    own = _GROUPS / name.strip("/")
    return own if own.is_dir() else _GROUPS

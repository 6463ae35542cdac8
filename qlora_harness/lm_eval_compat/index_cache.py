"""Caches lm_eval's own task index between commands; its 14,000 YAML files take 4 s to read.

The key covers the name, size and modification time of every file under lm_eval/tasks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.locations import cache_dir
from qlora_harness.record import write_text

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

_LEAST = 0.9  # entries per YAML file; with fewer, lm_eval has failed to read some


def cached_index(folder: Path, build: Callable[[], dict[str, Entry]]) -> dict[str, Entry]:
    """Returns the index of `folder`, lm_eval/tasks, from the cache or built and cached."""
    try:
        files = sorted(_files(str(folder)))
        path = cache_dir() / "task-index" / f"{_digest([folder])}.json"
    except OSError:
        return build()
    key = _digest(files)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return _decode(stored["entries"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # missing or damaged, and rewritten below
    index = build()
    if len(index) >= _LEAST * sum(name.endswith(".yaml") for name, _, _ in files):
        try:
            text = json.dumps({"key": key, "entries": _encode(index)})
            if _decode(json.loads(text)["entries"]) == index:
                write_text(path, text)
        except (OSError, ValueError, TypeError):
            pass  # without a cache the next command is slower, not wrong
    return index


def _digest(values: list[Any]) -> str:
    from lm_eval import __version__

    return hashlib.sha256(f"2 {__version__} {values}".encode()).hexdigest()[:32]


def _files(folder: str) -> Iterator[tuple[str, int, int]]:
    """Yields each file's path, size in bytes and modification time in nanoseconds."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name != "__pycache__":
                    yield from _files(entry.path)
            else:
                stat = entry.stat()
                yield entry.path, stat.st_size, stat.st_mtime_ns


def _encode(index: Mapping[str, Entry]) -> dict[str, Any]:
    return {
        name: [e.name, e.kind.name, e.yaml_path and str(e.yaml_path), e.cfg, sorted(e.tags)]
        for name, e in index.items()
    }


def _decode(stored: Mapping[str, Any]) -> dict[str, Entry]:
    from lm_eval.tasks._index import Entry, Kind

    return {
        key: Entry(name, Kind[kind], path and Path(path), config, set(tags))
        for key, (name, kind, path, config, tags) in stored.items()
    }

"""lm-eval's own task index, kept between runs: 14,000 YAML files take seconds to read.

The key is the name, size and time of change of every file under lm_eval/tasks, so an index is used
only while nothing there has changed; and it is kept only if it comes back from the file equal to
what was built.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.locations import cache_dir
from qlora_harness.record import write_text

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

_KEPT = 3
# Of lm-eval's YAML files, nearly each one makes an entry.
_LEAST = 0.9


def cached_index(folder: Path, build: Callable[[], dict[str, Entry]]) -> dict[str, Entry]:
    """Returns the index of lm-eval's own tasks, from the cache or built and put there.

    Args:
        folder: lm_eval/tasks.
        build: Builds the index of it.
    """
    try:
        files = sorted(_files(str(folder)))
        path = cache_dir() / "task-index" / f"{_key(folder, files)}.json"
    except OSError:
        return build()
    try:
        return _decode(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # not there, or damaged: it is written anew
    index = build()
    if len(index) < _LEAST * sum(name.endswith(".yaml") for name, _, _ in files):
        return index  # something has changed what lm-eval reads; that is not to be kept
    try:
        text = json.dumps(_encode(index))
        if _decode(json.loads(text)) == index:
            write_text(path, text)
            _prune(path.parent)
    except (OSError, ValueError, TypeError):
        pass  # a cache that can't be written costs time only
    return index


def _key(folder: Path, files: Iterable[tuple[str, int, int]]) -> str:
    from lm_eval import __version__

    digest = hashlib.sha256(f"1 {__version__} {folder}".encode())
    for name, size, changed in files:
        digest.update(f"{name}\0{size}\0{changed}\0".encode())
    return digest.hexdigest()[:32]


def _files(folder: str) -> Iterator[tuple[str, int, int]]:
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
        name: {
            "name": entry.name,
            "kind": entry.kind.name,
            "yaml_path": None if entry.yaml_path is None else str(entry.yaml_path),
            "cfg": entry.cfg,
            "tags": sorted(entry.tags),
        }
        for name, entry in index.items()
    }


def _decode(stored: Mapping[str, Any]) -> dict[str, Entry]:
    from lm_eval.tasks._index import Entry, Kind

    return {
        name: Entry(
            name=entry["name"],
            kind=Kind[entry["kind"]],
            yaml_path=None if entry["yaml_path"] is None else Path(entry["yaml_path"]),
            cfg=entry["cfg"],
            tags=set(entry["tags"]),
        )
        for name, entry in stored.items()
    }


def _prune(folder: Path) -> None:
    found = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found[_KEPT:]:
        path.unlink(missing_ok=True)

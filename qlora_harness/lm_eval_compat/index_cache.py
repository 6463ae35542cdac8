"""Caches two indices between commands: lm_eval's of its tasks and transformers' of its models.

lm_eval reads 14,000 YAML files for its own, and transformers 2,500 source files, twice. A key
covers the name, size and modification time of every file in the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_harness.locations import cache_dir
from qlora_harness.record import write_text

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

_LEAST = 0.9  # entries per YAML file; with fewer, lm_eval has failed to read some
_T = TypeVar("_T")
_Files = list[tuple[str, int, int]]


def cached_index(folder: Path, build: Callable[[], dict[str, Entry]]) -> dict[str, Entry]:
    """Returns the index of `folder`, lm_eval/tasks, from the cache or built and cached.

    Without the content of YAML files, which lm_eval reads again for the tasks that it runs: parsing
    it would take half a second.
    """

    def build_small() -> dict[str, Entry]:
        return {
            name: entry if entry.yaml_path is None else replace(entry, cfg=None)
            for name, entry in build().items()
        }

    def is_whole(index: dict[str, Entry], files: _Files) -> bool:
        return len(index) >= _LEAST * sum(name.endswith(".yaml") for name, _, _ in files)

    return _cached("lm_eval", folder, build_small, _encode, _decode, is_whole)


def cached_structure(folder: Path, build: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
    """Returns the import structure of `folder`, transformers/models, in the same way."""
    return _cached("transformers", folder, build, _as_pairs, _from_pairs)


def _cached(
    package: str,
    folder: Path,
    build: Callable[[], _T],
    encode: Callable[[_T], Any],
    decode: Callable[[Any], _T],
    is_whole: Callable[[_T, _Files], bool] = lambda value, files: True,
) -> _T:
    try:
        files = sorted(_files(str(folder)))
        path = cache_dir() / "task-index" / f"{_digest(package, [folder])}.json"
        key = _digest(package, files)
    except (OSError, ImportError):  # the latter for a package without metadata
        return build()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return decode(stored["entries"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # missing or damaged, and rewritten below
    value = build()
    if is_whole(value, files):
        try:
            text = json.dumps({"key": key, "entries": encode(value)})
            if decode(json.loads(text)["entries"]) == value:
                write_text(path, text)
        except (OSError, ValueError, TypeError):
            pass  # without a cache the next command is slower, not wrong
    return value


def _digest(package: str, values: list[Any]) -> str:
    return hashlib.sha256(f"3 {version(package)} {values}".encode()).hexdigest()[:32]


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


def _as_pairs(node: Any) -> Any:
    """Dictionaries become pairs, as their keys may be sets; sets become lists."""
    if isinstance(node, dict):
        return {"pairs": [[_as_pairs(key), _as_pairs(value)] for key, value in node.items()]}
    return node if isinstance(node, str) else sorted(node)


def _from_pairs(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            frozenset(key) if isinstance(key, list) else key: _from_pairs(value)
            for key, value in node["pairs"]
        }
    return set(node)

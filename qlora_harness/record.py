"""Reads and writes JSON records, and describes the environment they come from."""

from __future__ import annotations

import glob
import json
import lzma
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_harness.errors import ResultsError, shown

SCHEMA_VERSION = 1

SUMMARY_FILE = "training_summary.json"
LOGS_FILE = "training_logs.json"
TRAINER_STATE_FILE = "trainer_state.json"
EVALUATION_FILE = "evaluation_results.json"
PROGRESS_FILES = "mmlu_progress_*.json*"  # a user may compress them to .json.xz
ADAPTER_DIR = "adapter"
CHECKPOINT_DIR = "checkpoints"

_PACKAGES = (  # that can change the numbers
    "qlora-harness",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "lm_eval",
    "tokenizers",
    "safetensors",
)
_LONGEST_UNPACKED = 500_000_000  # characters; a small .xz can hold far more
_DEEPEST = 100  # nested brackets; readers recurse into them
_NESTED = (dict, list)
_LONGEST_NUMBER = 308  # digits; a float holds no more
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def now() -> str:
    """Returns the current time in UTC, in ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_text(path: Path, text: str) -> None:
    """Writes a text under a temporary name and renames it, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        # A folder's name may hold bytes that aren't UTF-8; each becomes a "?".
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path, seconds: float = 0.0) -> None:
    """Removes temporary files of killed writes of `path`; younger ones may be in use."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime >= seconds:
                leftover.unlink()


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a folder, then renames it to `folder`, a new one unless `replace`; raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield work
        os.chmod(work, 0o755)
        if replace and folder.exists():
            shutil.rmtree(folder)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_json(path: Path, value: object, *, rows_at: int | None = None) -> None:
    """Writes JSON with `write_text`; raises ValueError for NaN and infinity.

    Each value at depth `rows_at` takes one line, so that thousands of them read as a table.
    """
    write_text(path, _json_text(value, rows_at) + "\n")


def _json_text(value: object, rows_at: int | None, depth: int = 0) -> str:
    if rows_at is None:
        return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    if depth == rows_at or not isinstance(value, dict | list) or not value:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    if isinstance(value, dict):
        marks = "{}"
        parts = [
            f"{json.dumps(str(key), ensure_ascii=False)}: {_json_text(part, rows_at, depth + 1)}"
            for key, part in value.items()
        ]
    else:
        marks = "[]"
        parts = [_json_text(part, rows_at, depth + 1) for part in value]
    inside = ",\n".join(f"{' ' * (depth + 1)}{part}" for part in parts)
    return f"{marks[0]}\n{inside}\n{' ' * depth}{marks[1]}"


def read_json(path: Path, *, finite: bool = False) -> dict[str, Any]:
    """Reads a JSON object, also from an .xz, or raises ResultsError.

    Refuses repeated keys, huge integers and deep nesting; with `finite` NaN and infinity, too.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise ResultsError(f"{path} is not a file", "Name another file")
        if path.suffix == ".xz":
            with lzma.open(path, "rt", encoding="utf-8") as file:
                text = file.read(_LONGEST_UNPACKED)
        else:
            text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ResultsError(f"{path} does not exist", "Check the path") from None
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError) as error:
        raise ResultsError(f"{path} can't be read: {error}", "Check the file") from None
    try:
        value = _parse(text)
        _check_values(value, finite)
    except ValueError as error:
        place, reason = str(path), str(error)
        if isinstance(error, json.JSONDecodeError):
            place, reason = f"{path}, line {error.lineno}", error.msg
        raise ResultsError(
            f"{place}: not valid JSON ({reason})",
            "The file is damaged; make it again or remove it",
        ) from None
    if not isinstance(value, dict):
        raise ResultsError(
            f"{path}: expected a JSON object, found {type(value).__name__}", "Name another file"
        )
    return value


def _parse(text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=without_duplicates, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("brackets too deep") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair") from None
    return value


def _check_values(value: Any, finite: bool) -> None:
    """Raises ValueError for values that would end in a traceback later."""
    level: list[Any] = [[value]]
    for _ in range(_DEEPEST + 1):
        parts = [p for item in level for p in (item.values() if isinstance(item, dict) else item)]
        if finite and not all(math.isfinite(part) for part in parts if isinstance(part, float)):
            _refuse_infinite(value, "")
        level = [part for part in parts if isinstance(part, _NESTED)]
        if not level:
            return
    raise ValueError("brackets too deep")


def _refuse_infinite(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}, not a finite number")
    if isinstance(value, _NESTED):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_infinite(part, f"{place}.{key}" if place else str(key))


def _whole_number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Is an `object_pairs_hook` that raises ValueError for a repeated key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {shown(twice)} is repeated")
    return value


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    versions = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def git_state(folder: Path) -> dict[str, Any]:
    """Returns `revision` and `dirty` of a checkout, both None outside one."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A copy installed inside another project's checkout must not report that project's revision.
    if git("ls-files", "--error-unmatch", str(folder / "record.py")) is None:
        return {"revision": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"revision": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def environment() -> dict[str, Any]:
    """Returns versions, git state, platform and command; callers with torch add the device."""
    return {
        "versions": {"python": platform.python_version()} | installed_versions(_PACKAGES),
        "git": git_state(Path(__file__).resolve().parent),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "command": scrub(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
    }


def scrub(text: str) -> str:
    """Removes Hub tokens and the path of the home folder from a text."""
    text = re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_***", text)
    home = str(Path.home())
    if len(home) < 2:
        return text
    return re.sub(rf"(?<![\w/.-]){re.escape(home)}(?![\w.-])", "~", text)


def scrub_all(value: Any) -> Any:
    """Scrubs every string of a JSON value."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {key: scrub_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_all(item) for item in value]
    return value


def nested(value: Mapping[str, Any], *keys: str) -> Any:
    """Returns value[key0][key1]…, or None if a key is missing."""
    current: Any = value
    for key in keys:
        if not isinstance(current, Mapping) or key not in current:
            return None
        current = current[key]
    return current

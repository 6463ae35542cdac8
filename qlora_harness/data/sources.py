"""Data sets by name, file or folder: where the rows of OASST1's schema come from."""

from __future__ import annotations

import gzip
import io
import logging
import lzma
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import jsonlines

from qlora_harness.data.oasst1 import check_row
from qlora_harness.errors import DataError
from qlora_harness.locations import demo_dir, expanded

logger = logging.getLogger("qlora_harness")

DEMO_FILE = "oasst_demo.jsonl"
DEMO = "demo"
HUB_NAMES = {"oasst1": "OpenAssistant/oasst1", "oasst2": "OpenAssistant/oasst2"}

_REMEDY = "Name a .jsonl file, a folder or a Hub id"

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Splits:
    """The rows of a data set.

    Attributes:
        train: Rows for training (and evaluation, where there is no validation split).
        validation: Rows of the data set's own validation split, or None.
        source: Where they came from, for the record.
    """

    train: Rows
    validation: Rows | None
    source: str


def parse_line(line: str, place: str, remedy: str) -> object:
    """Parses one line of a JSON Lines file.

    Args:
        line: The line.
        place: The file and line number, for the message.
        remedy: What to do about a broken line.

    Raises:
        DataError: It is not JSON.
    """
    try:
        return jsonlines.Reader([line]).read()
    except jsonlines.InvalidLineError as error:
        # jsonlines counts lines of its own; the parser's message is its cause.
        reason = getattr(error.__cause__, "msg", None) or str(error).split("\n")[0]
        raise DataError(f"{place}: not valid JSON ({reason})", remedy) from None


def read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the checked rows of a JSON Lines file (also .gz and .xz).

    Args:
        path: The file, UTF-8.

    Raises:
        DataError: The file is missing or unreadable, or a line is broken (named by number).
    """
    try:
        with _open(path) as file:
            lines = enumerate(io.TextIOWrapper(file, encoding="utf-8"), start=1)
            for number, line in lines:
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                yield check_row(parse_line(line, place, "Correct or remove the line"), place)
    except FileNotFoundError:
        raise DataError(f"--dataset: {path} does not exist", _REMEDY) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason})", "Convert the file") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}", "Check the file") from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return path.open("rb")


def load_splits(name: str, revision: str | None = None) -> Splits:
    """Finds the rows of a data set.

    As in `datasets`, what lies in the working folder comes before the Hub; "demo" is always the
    embedded set. Where a known name stands for both, a log line says which one is taken.

    Args:
        name: "demo", "oasst1", "oasst2", another Hub id, a .jsonl file, or a folder (saved by
            `datasets`, or holding .jsonl files or parquet files).
        revision: Branch, tag or commit on the Hub.

    Raises:
        DataError: It can't be found or read.
    """
    path = _local_path(name)
    kind = _kind(path)
    if revision is not None and (name == DEMO or kind is not None):
        what = "the embedded set" if name == DEMO else f"a local {kind}"
        raise DataError(
            f"--dataset-revision {revision}: --dataset {name} is {what}, which has no revisions",
            "Leave the revision out",
        )
    if kind is not None:
        _say_what_is_taken(name, path, kind)
    if name == DEMO:
        return Splits(read_jsonl(demo_dir() / DEMO_FILE), None, f"embedded {DEMO_FILE}")
    if kind == "file":
        return Splits(read_jsonl(path), None, str(path))
    if kind == "folder":
        return _folder(path)
    if path.suffix in {".jsonl", ".json", ".gz", ".xz"} or name.startswith((".", "/", "~")):
        raise DataError(f"--dataset: {name} does not exist", _REMEDY)
    return _hub(HUB_NAMES.get(name, name), revision)


def _local_path(name: str) -> Path:
    """Where a data set of this name would lie: of a known word, also where its Hub id points."""
    path = expanded(name)
    return path if name not in HUB_NAMES or path.exists() else Path(HUB_NAMES[name])


def _kind(path: Path) -> str | None:
    """What lies there: "file", "folder" or None."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise DataError(f"--dataset: {path} can't be read: {error.strerror}", _REMEDY) from None
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    raise DataError(f"--dataset: {path} is neither a file nor a folder", _REMEDY)


def _say_what_is_taken(name: str, path: Path, kind: str) -> None:
    """Where a known name is that of a local file or folder as well; "./NAME" is only the latter."""
    local = f"the local {kind} {path}"
    if name == DEMO:
        logger.warning(
            "--dataset %s: the embedded set is taken, not %s; give ./%s for that", name, local, path
        )
    elif name in HUB_NAMES or name in HUB_NAMES.values():
        logger.warning(
            "--dataset %s: %s is taken, not %s on the Hub; to take the Hub's, rename the %s; to "
            "silence this, give ./%s",
            name,
            local,
            HUB_NAMES.get(name, name),
            kind,
            path,
        )


def _folder(path: Path) -> Splits:
    import datasets

    try:
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except Exception as error:  # datasets raises many kinds; all mean an unreadable folder
        reason = str(error).split("\n")[0]
        raise DataError(
            f"--dataset: folder {path} can't be read: {reason}",
            "It must be saved by datasets.save_to_disk, or hold .jsonl or parquet files",
        ) from None
    return _splits(loaded, str(path))


def _hub(name: str, revision: str | None) -> Splits:
    import datasets

    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # network, access, spelling: the Hub has many
        reason = str(error).split("\n")[0]
        raise DataError(
            f"--dataset: {name!r} can't be loaded from the Hub: {reason}",
            "Check the name, the network and your access, or give a local .jsonl file or folder",
        ) from None
    return _splits(loaded, name)


def _splits(loaded: Any, source: str) -> Splits:
    if not isinstance(loaded, Mapping):
        return Splits(_checked(loaded, source), None, source)
    if "train" not in loaded:
        raise DataError(
            f"--dataset: {source} has the splits {', '.join(loaded)} but no 'train'",
            "Name a data set with a train split",
        )
    validation = loaded.get("validation")
    return Splits(
        _checked(loaded["train"], f"{source}, split train"),
        None if validation is None else _checked(validation, f"{source}, split validation"),
        source,
    )


def _checked(rows: Iterable[object], place: str) -> Iterator[Mapping[str, Any]]:
    for number, row in enumerate(rows):
        if isinstance(row, Mapping) and isinstance(row.get("created_date"), datetime):
            # datasets turns some dates of a JSON Lines file into this.
            row = {**row, "created_date": row["created_date"].isoformat()}
        yield check_row(row, f"{place}, row {number}")

"""Reads rows from a named data set, a file or a folder."""

from __future__ import annotations

import glob
import logging
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_harness.data.files import (
    COMPRESSED,
    FORMATS,
    REMEDY,
    known_columns,
    placed,
    read_rows,
    suffixes_of,
)
from qlora_harness.data.rows import Row
from qlora_harness.errors import DataError, first_line
from qlora_harness.locations import demo_dir, expanded

logger = logging.getLogger("qlora_harness")

DEMO_ROWS = "oasst_demo.jsonl"
DEMO = "demo"


@dataclass(frozen=True)
class KnownSet:
    """A data set with a name of its own here: its Hub id, and the commit that is used."""

    hub: str
    commit: str | None = None


KNOWN_SETS = {
    "oasst1": KnownSet("OpenAssistant/oasst1", "fdf72ae0827c1cda404aff25b6603abec9e3399b"),
    "oasst2": KnownSet("OpenAssistant/oasst2", "179dd21fc55192153d94adb0e0ce8f69e222bf75"),
    "guanaco": KnownSet(
        "timdettmers/openassistant-guanaco", "831dabac2283d99420cda0b673d7a2a43849f17a"
    ),
    "alpaca": KnownSet("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017"),
    "alpaca-cleaned": KnownSet("yahma/alpaca-cleaned", "12567cabf869d7c92e573c7c783905fc160e9639"),
    "dolly-15k": KnownSet(
        "databricks/databricks-dolly-15k", "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"
    ),
    "longform": KnownSet("akoksal/LongForm"),
}

_TRAIN = ("train", "train_sft")  # the second in HuggingFaceH4's data sets, such as UltraChat

_FOLDER = "It must be saved by datasets.save_to_disk, or hold .jsonl, .json, .csv or .parquet files"

_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@dataclass(frozen=True)
class Split:
    """The rows of a split, to be read once, and the files that hold them.

    Without `files` the rows are in memory only.
    """

    rows: Iterable[Row]
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Splits:
    """The splits of a data set; `validation` is its own validation split, if it has one.

    `commit` is that of a data set on the Hub.
    """

    train: Split
    validation: Split | None
    source: str
    commit: str | None = None


def load_splits(name: str, revision: str | None = None) -> Splits:
    """Returns the rows of "demo", a name of `KNOWN_SETS`, another Hub id, a file or a folder.

    As in `datasets`, the working folder comes before the Hub, but "demo" is always the embedded
    set. A warning says which of two data sets of one name is used. `revision` is a branch, tag or
    commit on the Hub. Raises DataError.
    """
    path = expanded(name)
    known = KNOWN_SETS.get(name)
    if known is not None and not path.exists():
        path = Path(known.hub)  # `OpenAssistant/oasst1` may be a local folder, too
    kind = _path_kind(path)
    if revision is not None and (name == DEMO or kind is not None):
        what = "the embedded set" if name == DEMO else f"a local {kind}"
        raise DataError(
            f"--dataset-revision {revision}: --dataset {name} is {what}, which has no revisions",
            "Leave the revision out",
        )
    if kind is not None:
        _warn_of_same_name(name, path, kind)
    if name == DEMO:
        return Splits(_files_split([demo_dir() / DEMO_ROWS]), None, f"embedded {DEMO_ROWS}")
    if kind == "file":
        return Splits(_files_split([path]), None, str(path))
    if kind == "folder":
        return _folder_splits(path)
    if path.suffix.lower() in (*FORMATS, *COMPRESSED) or name.startswith((".", "/", "~")):
        raise DataError(f"--dataset: {name} does not exist", REMEDY)
    if known is None:
        return _hub_splits(name, revision)
    return _hub_splits(known.hub, revision or known.commit)


def _files_split(paths: Sequence[Path]) -> Split:
    return Split(chain.from_iterable(map(read_rows, paths)), tuple(paths))


def _path_kind(path: Path) -> str | None:
    """Returns "file", "folder", or None if there is nothing at the path."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise DataError(f"--dataset: {path} can't be read: {error.strerror}", REMEDY) from None
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    raise DataError(f"--dataset: {path} is neither a file nor a folder", REMEDY)


def _warn_of_same_name(name: str, path: Path, kind: str) -> None:
    """Warns if a known data set has the name of a local file or folder."""
    local = f"the local {kind} {path}"
    if name == DEMO:
        logger.warning(f"--dataset {name}: uses the embedded set, not {local}; that is ./{path}")
        return
    hubs = {known.hub for known in KNOWN_SETS.values()}
    if name in KNOWN_SETS or name in hubs:
        hub = KNOWN_SETS[name].hub if name in KNOWN_SETS else name
        logger.warning(
            f"--dataset {name}: uses {local}, not {hub} of the Hub; rename "
            f"the {kind} to use the Hub's, or write ./{path} to silence this"
        )


def _folder_splits(path: Path) -> Splits:
    """Reads a folder saved by `datasets`, or one of files, which `datasets` sorts into splits."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    saved = any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
    try:
        if saved:
            loaded = datasets.load_from_disk(str(path))
            for part in loaded.values() if isinstance(loaded, Mapping) else [loaded]:
                part.data.validate(full=True)  # reading damaged data would crash the process
            return _loaded_splits(loaded, str(path))
        base = glob.escape(str(path))
        files_by_split = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  # datasets raises many kinds
        raise DataError(
            f"--dataset: folder {path} can't be read: {first_line(error)}", _FOLDER
        ) from None
    splits = {}
    for name, files in files_by_split.items():
        paths = [file for file in map(Path, files) if suffixes_of(file)[0] in FORMATS]
        if paths:
            splits[str(name)] = _files_split(sorted(paths))
    if not splits:
        raise DataError(f"--dataset: folder {path} holds no data file", _FOLDER)
    return Splits(splits[_train_of(splits, str(path))], splits.get("validation"), str(path))


def _hub_splits(name: str, revision: str | None) -> Splits:
    import datasets

    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # noqa: BLE001  # network, access, spelling: many kinds
        raise DataError(
            f"--dataset: {name!r} can't be loaded from the Hub: {first_line(error)}",
            "Check the name, the network and your access, or give a local file or folder",
        ) from None
    return _loaded_splits(loaded, name)


def _loaded_splits(loaded: Any, source: str) -> Splits:
    if not isinstance(loaded, Mapping):
        return Splits(_loaded_split(loaded, source), None, source)
    name = _train_of(loaded, source)
    train, validation = loaded[name], loaded.get("validation")
    info = getattr(train, "info", None)
    # Such as hf://datasets/OpenAssistant/oasst1@fdf7…/data/train.parquet.
    urls = " ".join(map(str, getattr(info, "download_checksums", None) or ()))
    commit = _COMMIT.search(urls)
    return Splits(
        _loaded_split(train, f"{source}, split {name}"),
        None if validation is None else _loaded_split(validation, f"{source}, split validation"),
        source,
        commit[1] if commit else None,
    )


def _loaded_split(rows: Any, place: str) -> Split:
    files = [Path(file["filename"]) for file in getattr(rows, "cache_files", ())]
    return Split(_loaded_rows(rows, place), tuple(files))


def _train_of(splits: Collection[str], source: str) -> str:
    """Returns the name of the split to train on."""
    for name in _TRAIN:
        if name in splits:
            return name
    raise DataError(
        f"--dataset: {source} has the splits {', '.join(splits)} but no 'train'",
        "Name a data set with a train split, or one of its files",
    )


def _loaded_rows(rows: Any, place: str) -> Iterator[Row]:
    number = 0
    try:
        if hasattr(rows, "select_columns"):  # other columns may need packages to decode
            known = known_columns()
            present = [name for name in rows.column_names if name in known]
            rows = rows.select_columns(present) if present else rows
        for number, row in enumerate(rows, start=1):
            yield placed(f"{place}, row {number}", row)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  # decoding a column raises many kinds
        raise DataError(
            f"{place}, row {number + 1} can't be read: {type(error).__name__}: {error}",
            "Check the data set",
        ) from None

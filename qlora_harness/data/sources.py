"""Reads rows from a named data set, a file or a folder."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import logging
import lzma
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from qlora_harness.data.forms import FORMS
from qlora_harness.data.rows import Row
from qlora_harness.errors import DataError, first_line
from qlora_harness.locations import demo_dir, expanded
from qlora_harness.record import without_duplicates

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

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_CSV_NULLS = frozenset({"", "NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "<NA>"})
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_FORMATS = (".jsonl", ".json", ".ndjson", ".parquet", *_DELIMITERS)
_LONGEST_CELL = 1 << 24  # characters, in csv
_REMEDY = "Name a file (.jsonl, .json, .csv or .parquet), a folder or a Hub id"
_FOLDER = "It must be saved by datasets.save_to_disk, or hold .jsonl, .json, .csv or .parquet files"

_COLUMNS = frozenset[str]().union(*(form.all_columns for form in FORMS.values()))
# Cells of these columns are texts as they stand: a message may be "None".
_TEXTS = _COLUMNS.difference(FORMS["oasst"].optional) | {"text"}
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


_JSON = json.JSONDecoder(object_pairs_hook=without_duplicates)


def parse_line(line: str, place: str, remedy: str) -> object:
    """Parses a line of JSON Lines; raises DataError, with `place` and `remedy`, if it can't."""
    try:
        return _JSON.decode(line)
    except RecursionError:
        reason = "brackets too deep"
    except ValueError as error:
        reason = getattr(error, "msg", str(error))
    raise DataError(f"{place}: not valid JSON ({reason:.120})", remedy)


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a file: JSON Lines, a JSON array, csv or parquet.

    All but parquet are UTF-8 and may be compressed (.gz, .xz, .bz2, .zst). Raises DataError with
    the line or number of an unusable row.
    """
    suffix, compression = _suffixes(path)
    try:
        if not compression and _is_parquet(path):
            rows = _parquet_rows(path)
        else:
            file = _open(path, compression)
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            separator = _DELIMITERS.get(suffix)
            rows = _csv_rows(path, text, separator) if separator else _json_rows(path, text)
        for place, row in rows:
            yield _row(place, row)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"--dataset: {path} does not exist", _REMEDY) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason})", "Convert the file") from None
    except Exception as error:  # noqa: BLE001  # parsers raise many kinds for damaged files
        raise DataError(f"{path} can't be read: {first_line(error)}", "Check the file") from None


def _row(place: str, row: object) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(
            f"{place}: expected an object, found {type(row).__name__}",
            "A row is an object, with a value for each column",
        )
    return Row(place, row)


def _suffixes(path: Path) -> tuple[str, str]:
    """Returns ".csv" and ".gz" for rows.csv.gz; an absent one is empty."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSED else ""
    return (suffixes[-1] if suffixes else ""), compression


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1" or path.suffix.lower() == ".parquet"


def _open(path: Path, compression: str) -> IO[bytes]:
    if compression == ".zst":
        import pyarrow  # installed with datasets

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream))
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return cast(IO[bytes], openers.get(compression, open)(path, "rb"))


def _json_rows(path: Path, text: IO[str]) -> Iterator[tuple[str, object]]:
    """Yields the place and the value of each row of JSON Lines or of a JSON array."""
    first = True
    with text:
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            if first and line.lstrip().startswith("["):
                yield from _array_rows(path, line + text.read())
                return
            first = False
            place = f"{path}, line {number}"
            yield place, parse_line(line, place, "Correct or remove the line")


def _array_rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        rows = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        reason = "brackets too deep" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{path}: not valid JSON ({reason:.120})", "Correct the file") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _csv_rows(path: Path, text: IO[str], separator: str) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(_LONGEST_CELL)
    with text:
        reader = csv.reader(text, delimiter=separator, strict=True)
        names = next(reader, [])
        without_duplicates([(name, None) for name in names])
        for cells in filter(None, reader):
            place = f"{path}, line {reader.line_num}"
            if len(cells) != len(names):
                raise DataError(
                    f"{place}: {len(cells)} cells in {len(names)} columns",
                    "Quote the cells that hold commas or line breaks",
                )
            row = zip(names, cells, strict=True)
            yield place, {name: _csv_cell(name, cell) for name, cell in row}


def _csv_cell(name: str, value: str) -> str | None:
    """Reads a cell as pandas, and so datasets, does; but a text may be "None"."""
    if name in _TEXTS:
        return value
    if name.endswith("_id") and re.fullmatch(r"\d+\.0", value):
        return value.removesuffix(".0")  # pandas writes a column of integers with a null this way
    return None if value in _CSV_NULLS else value


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    from pyarrow import parquet, types

    number = 0
    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        without_duplicates([(name, None) for name in names])
        columns = [name for name in names if name in _COLUMNS]
        if not columns:
            yield f"{path}, row 1", dict.fromkeys(names)  # has no form, and the message names these
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            table = pyarrow.Table.from_batches([batch])
            for index, column in enumerate(table.schema):
                # Dates become numbers: Python's have a smaller range and fewer time zones.
                values = table[index]
                if types.is_date(column.type):
                    values = values.cast(pyarrow.timestamp("s"))
                if types.is_timestamp(values.type):
                    table = table.set_column(index, column.name, values.cast(pyarrow.int64()))
            for row in table.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


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
    if path.suffix.lower() in (*_FORMATS, *_COMPRESSED) or name.startswith((".", "/", "~")):
        raise DataError(f"--dataset: {name} does not exist", _REMEDY)
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
        raise DataError(f"--dataset: {path} can't be read: {error.strerror}", _REMEDY) from None
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    raise DataError(f"--dataset: {path} is neither a file nor a folder", _REMEDY)


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
        paths = [file for file in map(Path, files) if _suffixes(file)[0] in _FORMATS]
        if paths:
            splits[str(name)] = _files_split(sorted(paths))
    if not splits:
        raise DataError(f"--dataset: folder {path} holds no data file", _FOLDER)
    if "train" not in splits:
        raise _no_train_split(str(path), splits)
    return Splits(splits["train"], splits.get("validation"), str(path))


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
    if "train" not in loaded:
        raise _no_train_split(source, loaded)
    train, validation = loaded["train"], loaded.get("validation")
    info = getattr(train, "info", None)
    # Such as hf://datasets/OpenAssistant/oasst1@fdf7…/data/train.parquet.
    urls = " ".join(map(str, getattr(info, "download_checksums", None) or ()))
    commit = _COMMIT.search(urls)
    return Splits(
        _loaded_split(train, f"{source}, split train"),
        None if validation is None else _loaded_split(validation, f"{source}, split validation"),
        source,
        commit[1] if commit else None,
    )


def _loaded_split(rows: Any, place: str) -> Split:
    files = [Path(file["filename"]) for file in getattr(rows, "cache_files", ())]
    return Split(_loaded_rows(rows, place), tuple(files))


def _no_train_split(source: str, names: Iterable[str]) -> DataError:
    return DataError(
        f"--dataset: {source} has the splits {', '.join(names)} but no 'train'",
        "Name a data set with a train split",
    )


def _loaded_rows(rows: Any, place: str) -> Iterator[Row]:
    number = 0
    try:
        if hasattr(rows, "select_columns"):  # other columns may need packages to decode
            present = [name for name in rows.column_names if name in _COLUMNS]
            rows = rows.select_columns(present) if present else rows
        for number, row in enumerate(rows, start=1):
            yield _row(f"{place}, row {number}", row)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  # decoding a column raises many kinds
        raise DataError(
            f"{place}, row {number + 1} can't be read: {type(error).__name__}: {error}",
            "Check the data set",
        ) from None

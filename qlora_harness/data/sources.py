"""Reads rows in OASST1's schema from a named data set, a file or a folder."""

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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import jsonlines

from qlora_harness.data.oasst1 import FIELDS, REQUIRED, check_row
from qlora_harness.errors import DataError, first_line
from qlora_harness.locations import demo_dir, expanded
from qlora_harness.record import without_duplicates

logger = logging.getLogger("qlora_harness")

DEMO_ROWS = "oasst_demo.jsonl"
DEMO = "demo"
HUB_NAMES = {"oasst1": "OpenAssistant/oasst1", "oasst2": "OpenAssistant/oasst2"}

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_CSV_NULLS = frozenset({"", "NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "<NA>"})
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_FORMATS = (".jsonl", ".json", ".ndjson", ".parquet", *_DELIMITERS)
_LONGEST_CELL = 1 << 24  # characters, in csv
_REMEDY = "Name a file (.jsonl, .json, .csv or .parquet), a folder or a Hub id"
_FOLDER = "It must be saved by datasets.save_to_disk, or hold .jsonl, .json, .csv or .parquet files"

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Splits:
    """The rows of a data set; `validation` is its own validation split, if it has one."""

    train: Rows
    validation: Rows | None
    source: str


def parse_line(line: str, place: str, remedy: str) -> object:
    """Parses a line of JSON Lines; raises DataError, with `place` and `remedy`, if it can't."""
    try:
        return jsonlines.Reader([line], loads=_loads).read()
    except RecursionError:
        reason = "brackets too deep"
    except jsonlines.InvalidLineError as error:
        # The message of jsonlines has a wrong line number; that of the JSON parser is the cause.
        reason = getattr(error.__cause__, "msg", None) or str(error.__cause__ or error)
    raise DataError(f"{place}: not valid JSON ({reason:.120})", remedy) from None


def _loads(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=without_duplicates)


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the checked rows of a file: JSON Lines, a JSON array, csv or parquet.

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
            yield check_row(row, place)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"--dataset: {path} does not exist", _REMEDY) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason})", "Convert the file") from None
    except Exception as error:  # noqa: BLE001  # parsers raise many kinds for damaged files
        raise DataError(f"{path} can't be read: {first_line(error)}", "Check the file") from None


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
        rows = _loads(text)
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
    """Reads a cell as pandas, and so datasets, does; but the text of a message may be "None"."""
    if name == "text":
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
        columns = [name for name in names if name in FIELDS]
        if not set(columns) >= REQUIRED:
            yield f"{path}, row 1", dict.fromkeys(names)  # refused by check_row, with these names
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
    """Returns the rows of "demo", "oasst1", "oasst2", another Hub id, a file or a folder.

    As in `datasets`, the working folder comes before the Hub, but "demo" is always the embedded
    set. A warning says which of two data sets of one name is used. `revision` is a branch, tag or
    commit on the Hub. Raises DataError.
    """
    path = expanded(name)
    if name in HUB_NAMES and not path.exists():
        path = Path(HUB_NAMES[name])  # `OpenAssistant/oasst1` may be a local folder, too
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
        return Splits(read_rows(demo_dir() / DEMO_ROWS), None, f"embedded {DEMO_ROWS}")
    if kind == "file":
        return Splits(read_rows(path), None, str(path))
    if kind == "folder":
        return _folder_splits(path)
    if path.suffix.lower() in (*_FORMATS, *_COMPRESSED) or name.startswith((".", "/", "~")):
        raise DataError(f"--dataset: {name} does not exist", _REMEDY)
    return _hub_splits(HUB_NAMES.get(name, name), revision)


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
    elif name in HUB_NAMES or name in HUB_NAMES.values():
        logger.warning(
            f"--dataset {name}: uses {local}, not {HUB_NAMES.get(name, name)} of the Hub; rename "
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
            splits[str(name)] = chain.from_iterable(map(read_rows, sorted(paths)))
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
        return Splits(_checked_rows(loaded, source), None, source)
    if "train" not in loaded:
        raise _no_train_split(source, loaded)
    validation = loaded.get("validation")
    return Splits(
        _checked_rows(loaded["train"], f"{source}, split train"),
        None if validation is None else _checked_rows(validation, f"{source}, split validation"),
        source,
    )


def _no_train_split(source: str, names: Iterable[str]) -> DataError:
    return DataError(
        f"--dataset: {source} has the splits {', '.join(names)} but no 'train'",
        "Name a data set with a train split",
    )


def _checked_rows(rows: Any, place: str) -> Iterator[Mapping[str, Any]]:
    number = 0
    try:
        if hasattr(rows, "select_columns"):  # other columns may need packages to decode
            present = [name for name in rows.column_names if name in FIELDS]
            if set(present) >= REQUIRED:
                rows = rows.select_columns(present)
        for number, row in enumerate(rows, start=1):
            yield check_row(row, f"{place}, row {number}")
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  # decoding a column raises many kinds
        raise DataError(
            f"{place}, row {number + 1} can't be read: {type(error).__name__}: {error}",
            "Check the data set",
        ) from None

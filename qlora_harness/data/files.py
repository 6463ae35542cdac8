"""Reads the rows of one file: JSON Lines, a JSON array, csv or parquet."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import jsonlines

from qlora_harness.data.forms import FORMS, PREFERENCE, TURN_COLUMNS
from qlora_harness.data.rows import Row
from qlora_harness.errors import DataError, first_line
from qlora_harness.record import without_duplicates

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_CSV_NULLS = frozenset({"", "NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "<NA>"})
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
FORMATS = (".jsonl", ".json", ".ndjson", ".parquet", *_DELIMITERS)
_LONGEST_CELL = 1 << 24  # characters, in csv
REMEDY = "Name a file (.jsonl, .json, .csv or .parquet), a folder or a Hub id"
_JSON_REMEDY = "Rows are JSON, one a line or in a list, or .csv, .tsv or .parquet files"
_JSON = json.JSONDecoder(object_pairs_hook=without_duplicates)


def known_columns() -> frozenset[str]:
    """Returns the columns that are read or refused; others are not read where that saves work."""
    return TURN_COLUMNS.union(PREFERENCE, *(form.all_columns for form in FORMS.values()))


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
    assert isinstance(text, str)
    return _JSON.decode(text)


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a file: JSON Lines, a JSON array, csv or parquet.

    All but parquet are UTF-8 and may be compressed (.gz, .xz, .bz2, .zst). Raises DataError with
    the line or number of an unusable row.
    """
    suffix, compression = suffixes_of(path)
    try:
        if not compression and _is_parquet(path):
            rows = _parquet_rows(path)
        else:
            file = _open(path, compression)
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            separator = _DELIMITERS.get(suffix)
            rows = _csv_rows(path, text, separator) if separator else _json_rows(path, text)
        for place, row in rows:
            yield placed(place, row)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"--dataset: {path} does not exist", REMEDY) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason})", "Convert the file") from None
    except Exception as error:  # noqa: BLE001  # parsers raise many kinds for damaged files
        raise DataError(f"{path} can't be read: {first_line(error)}", "Check the file") from None


def placed(place: str, row: object) -> Row:
    """Returns a row with its place; raises DataError if it is no object."""
    if not isinstance(row, Mapping):
        raise DataError(
            f"{place}: expected an object, found {type(row).__name__}",
            "A row is an object, with a value for each column",
        )
    return Row(place, row)


def suffixes_of(path: Path) -> tuple[str, str]:
    """Returns ".csv" and ".gz" for rows.csv.gz; an absent one is empty."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
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
            if first and line.strip() == "{":
                raise DataError(f"{path}: one JSON object over several lines", _JSON_REMEDY)
            place = f"{path}, line {number}"
            is_object = line.lstrip().startswith("{")
            remedy = "Correct or remove the line" if is_object else _JSON_REMEDY
            yield place, parse_line(line, place, remedy)
            first = False


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
    # A text stands as it is: a reply may be "None".
    texts = known_columns() - FORMS["oasst"].all_columns | {"text"}
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
            yield place, {k: cell if k in texts else _csv_cell(k, cell) for k, cell in row}


def _csv_cell(name: str, value: str) -> str | None:
    """Reads a cell as pandas, and so datasets, does."""
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
        known = known_columns()
        columns = [name for name in names if name in known]
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

"""Checked reading of single fields of a record; every problem names the file and the key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qlora_harness.errors import ResultsError
from qlora_harness.record import SCHEMA_VERSION, nested, read_json

_T = TypeVar("_T")
# What lm_eval writes where a standard error is not defined.
_NOT_AVAILABLE = "N/A"
# Beyond anything measured; sums, squares and percentages of smaller numbers stay finite.
_LARGEST = 1e100


def field_error(path: Path | str, keys: tuple[str, ...], problem: str) -> ResultsError:
    """Returns the error for one field.

    Args:
        path: The file that holds it.
        keys: The path of keys into the file.
        problem: What is wrong, for example "is missing".
    """
    return ResultsError(
        f"{path}: {'.'.join(keys)} {problem}",
        "The file is damaged or comes from another program; make it anew or remove it",
    )


def read_record(path: Path, kind: str) -> dict[str, Any]:
    """Reads one of this project's own records.

    Args:
        path: The file.
        kind: The value its "kind" must have.

    Raises:
        ResultsError: The file is unreadable, of another kind or of a newer schema.
    """
    record = read_json(path, finite=True)
    found = record.get("kind")
    if found != kind:
        raise ResultsError(
            f'{path}: expected "kind": "{kind}", found {found!r}',
            "The file comes from another program; name the folder of a run of qlora-harness",
        )
    version = record.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise field_error(path, ("schema_version",), f"is {version!r}, not a whole number")
    if version > SCHEMA_VERSION:
        raise ResultsError(
            f"{path}: schema_version {version} is newer than this program knows ({SCHEMA_VERSION})",
            "Update qlora-harness",
        )
    return record


def optional_number(record: Mapping[str, Any], path: Path | str, *keys: str) -> float | None:
    """Returns a finite number, or None where it is missing, null or "N/A".

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is NaN, infinite, beyond 1e100 or not a number.
    """
    value = nested(record, *keys)
    if value is None or value == _NOT_AVAILABLE:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise field_error(path, keys, f"is {value!r}, not a number")
    try:
        result = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        result = math.inf
    if not math.isfinite(result):
        raise field_error(path, keys, f"is {result}, not a finite number")
    if abs(result) > _LARGEST:
        raise field_error(path, keys, f"is {result}, which nothing here can be")
    return result


def number(record: Mapping[str, Any], path: Path | str, *keys: str) -> float:
    """Returns a finite number that must be there.

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is missing, NaN, infinite or not a number.
    """
    return _present(optional_number(record, path, *keys), path, keys)


def optional_amount(record: Mapping[str, Any], path: Path | str, *keys: str) -> float | None:
    """Returns a finite number of at least 0, or None where it is missing, null or "N/A".

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is negative, NaN, infinite or not a number.
    """
    value = optional_number(record, path, *keys)
    if value is not None and value < 0:
        raise field_error(path, keys, f"is {value}, not a number of at least 0")
    return value


def amount(record: Mapping[str, Any], path: Path | str, *keys: str) -> float:
    """Returns a finite number of at least 0 that must be there.

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is missing, negative, NaN, infinite or not a number.
    """
    return _present(optional_amount(record, path, *keys), path, keys)


def share(record: Mapping[str, Any], path: Path | str, *keys: str) -> float:
    """Returns a number from 0 to 1 that must be there, for example an accuracy.

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is missing, not a number or outside 0 to 1.
    """
    value = number(record, path, *keys)
    if not 0.0 <= value <= 1.0:
        raise field_error(path, keys, f"is {value}, not between 0 and 1")
    return value


def optional_count(record: Mapping[str, Any], path: Path | str, *keys: str) -> int | None:
    """Returns a whole number of at least 0, or None where it is missing or null.

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is negative or not a whole number.
    """
    value = optional_number(record, path, *keys)
    if value is None:
        return None
    if value < 0 or value != int(value):
        raise field_error(path, keys, f"is {value}, not a whole number of at least 0")
    return int(value)


def count(record: Mapping[str, Any], path: Path | str, *keys: str) -> int:
    """Returns a whole number of at least 0 that must be there.

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is missing, negative or not a whole number.
    """
    return _present(optional_count(record, path, *keys), path, keys)


def optional_text(record: Mapping[str, Any], path: Path | str, *keys: str) -> str | None:
    """Returns a string, or None where it is missing or null.

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is not a string.
    """
    value = nested(record, *keys)
    if value is not None and not isinstance(value, str):
        raise field_error(path, keys, f"is {value!r}, not a string")
    return value


def text(record: Mapping[str, Any], path: Path | str, *keys: str) -> str:
    """Returns a string that must be there.

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is missing or not a string.
    """
    return _present(optional_text(record, path, *keys), path, keys)


def mapping(record: Mapping[str, Any], path: Path | str, *keys: str) -> Mapping[str, Any]:
    """Returns an object (a mapping) that must be there.

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is missing or not an object.
    """
    value = _present(nested(record, *keys), path, keys)
    if not isinstance(value, Mapping):
        raise field_error(path, keys, f"is a {type(value).__name__}, not an object")
    return value


def optional_mapping(record: Mapping[str, Any], path: Path | str, *keys: str) -> Mapping[str, Any]:
    """Returns an object (a mapping), or an empty one where it is missing or null.

    Args:
        record: The record.
        path: The file it came from, for the message.
        *keys: The path of keys into it.

    Raises:
        ResultsError: The value is not an object.
    """
    return {} if nested(record, *keys) is None else mapping(record, path, *keys)


def flatten(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    """Yields the leaves of nested objects as ("a.b.c", value); lists count as leaves.

    Args:
        value: A value as read from JSON.
        prefix: The name of the value itself.
    """
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from flatten(inner, f"{prefix}.{key}")


def _present(value: _T | None, path: Path | str, keys: tuple[str, ...]) -> _T:
    if value is None:
        raise field_error(path, keys, "is missing")
    return value

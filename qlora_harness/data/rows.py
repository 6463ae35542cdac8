"""One row of a data set with its place, and checked access to its values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_harness.errors import DataError, shown


class DroppedRow(Exception):
    """A row that is left out and counted by `reason`; the others are used."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Row:
    """A row, with its file and number in `place`; every error names both and the key."""

    place: str
    values: Mapping[str, Any]

    def text(self, key: str) -> str:
        """Returns the text of a key, "" for null or an absent key; raises DataError for others."""
        return check_text(self.values.get(key), f"{self.place}: field '{key}'")

    def objects(self, key: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Returns the objects of a list, each with its place; raises DataError for others."""
        items = self.values.get(key)
        if not isinstance(items, list):
            raise DataError(
                f"{self.place}: field '{key}' is {shown(items)}", "It must be a list of messages"
            )
        placed = [(f"{self.place}: {key}[{n}]", item) for n, item in enumerate(items)]
        for where, item in placed:
            if not isinstance(item, Mapping):
                raise DataError(f"{where} is {shown(item)}", "It must be a message")
        return placed


def check_text(value: object, where: str) -> str:
    """Returns a text, "" for null or NaN; raises DataError for another type or half a character."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas' null
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where} is {shown(value)}", "It must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a surrogate pair as character {error.start + 1}, which no "
            "tokenizer can encode",
            "Correct or remove the row",
        ) from None
    return value

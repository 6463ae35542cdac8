"""The questions of a task as lm-eval reads them: what it uses of a data set, without Arrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

Document = dict[str, Any]


class Documents(Sequence[Document]):
    """Rows with the same columns.

    lm-eval goes through the documents of a task three times. A data set of `datasets` converts
    every row anew each time, which takes longer than all else that is done with it.

    Args:
        rows: At least one.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = tuple(rows)

    @property
    def features(self) -> dict[str, type]:
        """The columns and the type of each, after the first row."""
        return {name: type(value) for name, value in self._rows[0].items()}

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Document: ...

    @overload
    def __getitem__(self, place: slice) -> Documents: ...

    def __getitem__(self, place: int | slice) -> Document | Documents:
        if isinstance(place, slice):
            return Documents(self._rows[place])
        return dict(self._rows[place])

    def __iter__(self) -> Iterator[Document]:
        # Copies, as a data set gives them: what is changed in one reaches no other reader.
        return map(dict, self._rows)

"""Examples: conversations as token ids and labels, one by one or as a table in Arrow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, overload

from qlora_harness.data.text_ids import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One conversation as the model sees it.

    `input_ids` begin with BOS if the tokenizer uses one. `labels` are the ids that are learned,
    and -100 elsewhere. `turns` counts the turns that were not cut.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    turns: int = field(default=0, compare=False)

    @property
    def supervised_tokens(self) -> int:
        """The number of learned tokens; nothing predicts the first token of a row."""
        return sum(label != IGNORE for label in self.labels[1:])

    def learned_spans(self) -> list[int]:
        """Returns where each learned span begins and ends, in one list."""
        borders, at = [], 0
        for learned, run in groupby(self.labels, lambda label: label != IGNORE):
            length = sum(1 for _ in run)
            if learned:
                borders += [at, at + length]
            at += length
        return borders


class ExampleTable(Sequence[Example]):
    """Some rows of a table of examples, which may be larger than memory.

    The columns are `input_ids`, `spans` (`Example.learned_spans`), `truncated` and `turns`. An
    example is made when it is read.
    """

    def __init__(self, table: pa.Table, rows: np.ndarray[Any, Any]) -> None:
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ExampleTable: ...
    def __getitem__(self, index: int | slice) -> Example | ExampleTable:
        """Returns the example of a position, or a table of some."""
        if isinstance(index, slice):
            return ExampleTable(self._table, self._rows[index])
        row = int(self._rows[index])
        ids = self._table["input_ids"][row].as_py()
        borders = self._table["spans"][row].as_py()
        labels = [IGNORE] * len(ids)
        for begin, end in zip(borders[::2], borders[1::2], strict=True):
            labels[begin:end] = ids[begin:end]
        truncated, turns = self._table["truncated"][row], self._table["turns"][row]
        return Example(ids, labels, truncated.as_py(), turns.as_py())

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        import pyarrow.compute as pc

        lengths = pc.list_value_length(self._table["input_ids"]).to_numpy()
        return [int(length) for length in lengths[self._rows]]

    def report(self) -> dict[str, Any]:
        """Returns what records say of a split: counts, and `fingerprint` of the examples."""
        import numpy as np

        borders = self._table["spans"].combine_chunks()
        flat = borders.values.to_numpy()
        # Nothing predicts the first token of a row.
        learned = np.concatenate([[0], np.cumsum(flat[1::2] - np.maximum(flat[::2], 1))])
        pairs = borders.offsets.to_numpy() // 2
        supervised = learned[pairs[1:]] - learned[pairs[:-1]]

        def total(values: Any) -> int:
            return int(values[self._rows].sum())

        return {
            "conversations": len(self),
            "turns": total(self._table["turns"].to_numpy()),
            "tokens": sum(self.lengths),
            "supervised_tokens": total(supervised),
            "truncated": total(self._table["truncated"].to_numpy()),
            "fingerprint": fingerprint(self._arrays()),
        }

    def _arrays(self) -> Iterator[tuple[Any, Any]]:
        """Yields ids and labels of each example, as int32."""
        import numpy as np

        columns = [(_Lists(self._table["input_ids"])), _Lists(self._table["spans"])]
        for row in self._rows:
            ids, borders = (column[row] for column in columns)
            labels = np.full(len(ids), IGNORE, np.int32)
            for begin, end in borders.reshape(-1, 2):
                labels[begin:end] = ids[begin:end]
            yield ids, labels


class _Lists:
    """A column of lists of int32, whose lists are views of the column's memory."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        import numpy as np

        chunks = column.chunks
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, chunks)])

    def __getitem__(self, row: int) -> Any:
        chunk = int(self._starts.searchsorted(row, side="right")) - 1
        place = row - self._starts[chunk]
        offsets = self._offsets[chunk]
        return self._values[chunk][offsets[place] : offsets[place + 1]]


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Returns the number of tokens of each example."""
    if isinstance(examples, ExampleTable):
        return examples.lengths
    return [len(example.input_ids) for example in examples]


def fingerprint(arrays: Iterable[tuple[Any, Any]]) -> str:
    """Returns "sha256:" and a hash of all token ids and labels, int32, in order."""
    digest = hashlib.sha256()
    for ids, labels in arrays:
        digest.update(len(ids).to_bytes(4, "little"))
        digest.update(ids.astype("<i4", copy=False).tobytes())
        digest.update(labels.astype("<i4", copy=False).tobytes())
    return f"sha256:{digest.hexdigest()}"


def show(example: Example, tokenizer: Tokenizer) -> str:
    """Returns an example as text, with each learned span between ⟦ and ⟧."""
    pieces = []
    pairs = zip(example.input_ids, example.labels, strict=True)
    for learned, span in groupby(pairs, lambda pair: pair[1] != IGNORE):
        text = tokenizer.decode([token for token, _ in span], skip_special_tokens=False)
        pieces.append(f"⟦{text}⟧" if learned else text)
    return "".join(pieces)

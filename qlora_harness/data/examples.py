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


@dataclass(frozen=True)
class SpannedIds:
    """An example as tables hold it: `spans` are the borders of the learned spans, in turn."""

    input_ids: list[int]
    spans: list[int]
    truncated: bool = False
    turns: int = 0

    def example(self) -> Example:
        """Returns the example with its labels."""
        ids, spans = self.input_ids, self.spans
        labels = [IGNORE] * len(ids)
        for begin, end in zip(spans[::2], spans[1::2], strict=True):
            labels[begin:end] = ids[begin:end]
        return Example(ids, labels, self.truncated, self.turns)


class ExampleTable(Sequence[Example]):
    """Some rows of a table of examples, in its order; it may be larger than memory.

    The columns are the fields of `SpannedIds`. An example is made when it is read.
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
        fields = ("input_ids", "spans", "truncated", "turns")
        return SpannedIds(*(self._table[name][row].as_py() for name in fields)).example()

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

        rows = self._rows
        columns = self._table["input_ids"], self._table["spans"]
        begin = 0
        for ids, spans in zip(*(column.iterchunks() for column in columns), strict=True):
            first, last = rows.searchsorted([begin, begin + len(ids)])
            starts = ids.offsets.to_numpy()
            values = ids.values.to_numpy()
            # Borders count from the start of their own example, and change what is learned.
            owner = np.repeat(starts[:-1], np.diff(spans.offsets.to_numpy()))
            is_border = np.zeros(len(values) + 1, np.int8)
            np.add.at(is_border, spans.values.to_numpy() + owner, 1)
            learned = np.cumsum(is_border[:-1]) % 2 == 1
            labels = np.where(learned, values, np.int32(IGNORE))
            for row in rows[first:last] - begin:
                example = slice(starts[row], starts[row + 1])
                yield values[example], labels[example]
            begin += len(ids)


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

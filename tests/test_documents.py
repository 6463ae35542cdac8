"""Documents: what lm-eval uses of a data set, row for row as `datasets` gives it."""

from __future__ import annotations

import datasets
import pytest

from qlora_harness.score.documents import Documents

ROWS = [
    {"index": 3, "subject": "anatomy", "input": "Which bone?\nAnswer:", "output": "B"},
    {"index": 4, "subject": "anatomy", "input": "Größe: 2 µm\nAnswer:", "output": "D"},
    {"index": 7, "subject": "anatomy", "input": "", "output": "A"},
]


def test_rows_are_those_of_a_data_set() -> None:
    ours, theirs = Documents(ROWS), datasets.Dataset.from_list(ROWS)
    assert len(ours) == len(theirs) == 3
    assert list(ours) == list(theirs) == ROWS
    assert [list(row) for row in ours] == [list(row) for row in theirs]  # the order of the keys
    assert ours[1] == theirs[1] == ROWS[1]
    assert ours[-1] == theirs[-1] == ROWS[2]
    assert list(ours.features) == list(theirs.features) == ["index", "subject", "input", "output"]
    assert ours.features == {"index": int, "subject": str, "input": str, "output": str}


def test_slice_is_documents_again() -> None:
    part = Documents(ROWS)[1:]
    assert isinstance(part, Documents)
    assert list(part) == ROWS[1:]


def test_each_reader_gets_a_row_of_its_own() -> None:
    documents = Documents(ROWS)
    first = next(iter(documents))
    first["output"] = "changed"
    documents[0]["output"] = "changed"
    assert documents[0]["output"] == "B"
    assert next(iter(documents))["output"] == "B"


def test_place_past_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        Documents(ROWS)[3]

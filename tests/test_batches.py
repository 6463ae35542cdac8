"""Padding depends on length, never by token id."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qlora_harness.data.examples import Example
from qlora_harness.train.batches import ExampleSet, pad_batch, padding_id


def test_rows_are_padded_on_the_right() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    batch = pad_batch(rows, pad_id=9)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [-100, -100, -100]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_text_tokens_equal_to_the_pad_id_are_attended_and_learned() -> None:
    # SmolLM2 pads with its end-of-turn token, which every reply ends with.
    rows = [
        {"input_ids": [2, 6, 2], "labels": [-100, 6, 2]},
        {"input_ids": [2, 2], "labels": [2, 2]},
    ]
    batch = pad_batch(rows, pad_id=2)
    assert batch["input_ids"].tolist() == [[2, 6, 2], [2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [2, 2, -100]]


def test_example_set_gives_ids_and_labels() -> None:
    examples = ExampleSet([Example([1, 2], [-100, 2], truncated=True)])
    assert len(examples) == 1
    assert examples[0] == {"input_ids": [1, 2], "labels": [-100, 2]}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (SimpleNamespace(pad_token_id=7, unk_token_id=0, eos_token_id=2), 7),
        (SimpleNamespace(pad_token_id=0, unk_token_id=5, eos_token_id=2), 0),
        (SimpleNamespace(pad_token_id=None, unk_token_id=5, eos_token_id=2), 5),
        (SimpleNamespace(pad_token_id=None, unk_token_id=None, eos_token_id=2), 2),
        (SimpleNamespace(pad_token_id=None), 0),
    ],
)
def test_padding_id_exists(tokenizer: SimpleNamespace, expected: int) -> None:
    assert padding_id(tokenizer) == expected

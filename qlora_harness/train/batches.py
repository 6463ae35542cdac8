"""Examples as batches, with padding or without."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from qlora_harness.data.examples import IGNORE, Example, lengths_of


class ExampleSet(Dataset[dict[str, list[int]]]):
    """Examples as rows for Trainer."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return lengths_of(self._examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self._examples[index]
        return {"input_ids": example.input_ids, "labels": example.labels}


def pad_batch(rows: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pads rows on the right with any valid `pad_id`, which is neither attended to nor learned.

    Returns `input_ids`, `attention_mask` and `labels` (-100 on padding), each [B, T] int64.
    """
    input_ids = [torch.tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    labels = [torch.tensor(row["labels"], dtype=torch.int64) for row in rows]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }


def pack_batch(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Concatenates rows without padding; no row attends to another.

    Returns `input_ids`, `position_ids` and `labels`, each [1, T] int64: positions restart in each
    row, and a row's first label is -100. `shift_labels`, [1, T], are the labels of the next tokens,
    -100 at the end of a row. `read_at` and `read_token`, [R] int64, say where a token is learned,
    and which. `borders`, [N + 1] int32, and `starts`, the same as a tuple, are the beginnings of
    the rows and the end of the last. `longest` is the number of tokens of the longest row.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    starts = (0, *accumulate(lengths))
    input_ids = [token for row in rows for token in row["input_ids"]]
    positions = [position for length in lengths for position in range(length)]
    labels = [label for row in rows for label in (IGNORE, *row["labels"][1:])]
    shifted = torch.tensor([*labels[1:], IGNORE], dtype=torch.int64)
    read_at = torch.nonzero(shifted != IGNORE).squeeze(1)
    return {
        "input_ids": torch.tensor([input_ids], dtype=torch.int64),
        "position_ids": torch.tensor([positions], dtype=torch.int64),
        "labels": torch.tensor([labels], dtype=torch.int64),
        "shift_labels": shifted[None],
        "read_at": read_at,
        "read_token": shifted[read_at],
        "borders": torch.tensor(starts, dtype=torch.int32),
        "starts": starts,
        "longest": max(lengths),
    }


def padding_id(tokenizer: Any) -> int:
    """Returns the id of the tokenizer's pad, unknown or end token, or 0."""
    for name in ("pad_token_id", "unk_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int) and value >= 0:
            return value
    return 0

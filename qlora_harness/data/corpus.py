"""Loads the data of a run: reads and encodes, splits by tree, mixes, reports."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_harness.data.chat_encoder import ChatEncoder
from qlora_harness.data.encoded import Encoded, encode_split, remembered
from qlora_harness.data.examples import ExampleTable
from qlora_harness.data.mixture import Part, mix, parse_parts
from qlora_harness.data.reading import check_tree_settings
from qlora_harness.data.sources import Splits, load_splits
from qlora_harness.data.text_ids import Tokenizer
from qlora_harness.errors import DataError
from qlora_harness.settings import DataSettings

if TYPE_CHECKING:
    import numpy as np

    Rows = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TrainingData:
    """Examples to train on, held-out examples, and a JSON report of both."""

    train: ExampleTable
    evaluation: ExampleTable
    report: dict[str, Any]


@dataclass(frozen=True)
class _Side:
    """Training or evaluation: the rows that it has in an encoded split."""

    encoded: Encoded
    rows: Rows

    @property
    def usable(self) -> Rows:
        """The rows with a supervised token."""
        usable: Rows = self.rows[self.encoded.usable()[self.rows]]
        return usable


@dataclass(frozen=True)
class _LoadedPart:
    """A data set, encoded and split."""

    part: Part
    splits: Splits
    train: _Side
    evaluation: _Side
    evaluation_source: str

    def report(self) -> dict[str, Any]:
        """Returns what records say of a data set."""
        report = {
            "source": self.splits.source,
            "commit": self.splits.commit,
            "evaluation_source": self.evaluation_source,
            **_counts(self.train.encoded),
        }
        if self.splits.validation is not None:
            report["validation"] = _counts(self.evaluation.encoded)
            del report["validation"]["form"]
        return report


def _counts(encoded: Encoded) -> dict[str, Any]:
    return {name: value for name, value in encoded.counts.items() if name != "first"}


def load_training_data(tokenizer: Tokenizer, settings: DataSettings) -> TrainingData:
    """Loads, encodes and splits a data set, or a mixture of several.

    A data set's own validation split is used for evaluation. Without one, `eval_fraction` of the
    trees is held out, chosen by `eval_seed` alone: runs that differ in the seed of the training
    have the same conversations. Raises DataError if the data can't be read or nothing is left to
    train on.
    """
    parts = parse_parts(settings.dataset)
    if len(parts) > 1 and settings.dataset_revision is not None:
        raise DataError(
            f"--dataset-revision {settings.dataset_revision}: --dataset is a mixture",
            "Leave the revision out; the data sets known by name have theirs",
        )
    encoder = ChatEncoder(tokenizer, settings.template, settings.max_length, settings.mask)
    loaded = [_load_part(part, settings, encoder) for part in parts]
    _check_parts(loaded, settings)
    train, train_report = _combine([p.train for p in loaded], parts, settings)
    evaluation, evaluation_report = _combine([p.evaluation for p in loaded], parts, settings)
    report = {
        "dataset": settings.dataset,
        "revision": settings.dataset_revision,
        "languages": settings.languages,
        "conversations": settings.conversations,
        "template": settings.template,
        "mask": settings.mask,
        "leading_bos": encoder.leading_bos,
        **_merged(loaded),
        "train": train_report,
        "eval": evaluation_report,
    }
    return TrainingData(train, evaluation, report)


def _load_part(part: Part, settings: DataSettings, encoder: ChatEncoder) -> _LoadedPart:
    import numpy as np

    splits = load_splits(part.name, settings.dataset_revision)
    encoded = encode_split(splits.train, settings, encoder, splits.source)
    if splits.validation is None:
        fraction, seed = settings.eval_fraction, settings.eval_seed
        train, held_out = split_by_tree(encoded.trees(), fraction, seed)
        source = f"{fraction:g} of the trees" + (f", seed {seed}" if seed else "")
        return _LoadedPart(part, splits, _Side(encoded, train), _Side(encoded, held_out), source)
    validation = encode_split(splits.validation, settings, encoder, splits.source)
    train, held_out = (np.arange(len(e.table)) for e in (encoded, validation))
    sides = _Side(encoded, train), _Side(validation, held_out)
    return _LoadedPart(part, splits, *sides, "validation split")


def split_by_tree(trees: Rows, eval_fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Returns the rows for training and evaluation, in file order, with no tree on both sides.

    `trees` [N] is the tree of each row, numbered from 0. `eval_fraction` is rounded to whole trees,
    but to no less than one if it is above 0 and there are at least two.
    """
    import numpy as np

    number = int(trees.max()) + 1 if len(trees) else 0
    count = round(number * eval_fraction)
    if eval_fraction > 0 and number > 1:
        count = max(count, 1)
    is_held_out = np.zeros(number, dtype=bool)
    is_held_out[random.Random(seed).sample(range(number), count)] = True
    return np.flatnonzero(~is_held_out[trees]), np.flatnonzero(is_held_out[trees])


def _combine(
    sides: Sequence[_Side], parts: Sequence[Part], settings: DataSettings
) -> tuple[ExampleTable, dict[str, Any]]:
    """Returns the examples of training or evaluation, mixed by weight, and their report."""
    import numpy as np
    import pyarrow as pa

    available = [side.usable for side in sides]
    chosen = mix(available, parts, settings.eval_seed)
    tables = [side.encoded.table for side in sides]
    starts = np.cumsum([0, *map(len, tables)])
    pairs = zip(starts[:-1], chosen, strict=True)
    rows = np.concatenate([start + part for start, part in pairs]).astype(np.int64)
    examples = ExampleTable(pa.concat_tables(tables), rows)
    report = remembered([side.encoded.key for side in sides], rows, examples.report)
    report["without_supervised_token"] = sum(
        len(side.rows) - len(usable) for side, usable in zip(sides, available, strict=True)
    )
    if len(parts) > 1:
        report["mixture"] = [
            {"dataset": part.name, "conversations": len(rows), "available": len(usable)}
            for part, rows, usable in zip(parts, chosen, available, strict=True)
        ]
    return examples, report


def _merged(loaded: Sequence[_LoadedPart]) -> dict[str, Any]:
    """Returns the report of one data set, or those of several and their sum."""
    reports = [part.report() for part in loaded]
    if len(reports) == 1:
        return reports[0]
    merged: dict[str, Any] = {
        name: ", ".join(dict.fromkeys(report[name] for report in reports))
        for name in ("source", "form", "evaluation_source")
    }
    merged["rows"] = sum(map(_rows, reports))
    merged["trees"] = sum(report["trees"] for report in reports)
    for name in ("dropped", "resolved"):
        counts = sum((Counter(report[name]) for report in reports), Counter[str]())
        merged[name] = dict(sorted(counts.items()))
    weights = ({"dataset": p.part.name, "weight": p.part.weight} for p in loaded)
    merged["mixture"] = [a | b for a, b in zip(weights, reports, strict=True)]
    return merged


def _rows(report: Mapping[str, Any]) -> int:
    """Returns the number of rows; those of trees are messages."""
    rows: int = report.get("messages", report.get("rows", 0))
    return rows


def _check_parts(loaded: Sequence[_LoadedPart], settings: DataSettings) -> None:
    """Raises DataError if a part is another one again, is empty, or a setting has no effect."""
    check_tree_settings({part.train.encoded.counts["form"] for part in loaded}, settings)
    names: dict[str, str] = {}
    for part in loaded:
        name, encoded = part.part.name, part.train.encoded
        # The key is a hash of the content, so two spellings of one file have the same.
        other = names.setdefault(encoded.key or part.splits.source, name)
        if other != name:
            raise DataError(
                f"--dataset {settings.dataset}: {other} and {name} are the same data",
                "Name it once, with the sum of its weights",
            )
        if not len(part.train.usable):
            raise _nothing_left(part)


def _nothing_left(part: _LoadedPart) -> DataError:
    counts = part.train.encoded.counts
    reasons = [
        f"{n} {reason}{f', first {place}' if (place := counts['first'].get(reason)) else ''}"
        for reason, n in counts["dropped"].items()
    ]
    return DataError(
        f"--dataset {part.part.name}: no conversation is left to train on (of {_rows(counts)} "
        f"rows; dropped: {'; '.join(reasons) or 'none'}; without a supervised token: "
        f"{len(part.train.rows)})",
        "Check the data with `qlora-harness data`, --languages and --max-length",
    )

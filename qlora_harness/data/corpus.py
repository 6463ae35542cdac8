"""Loads the data of a run: reads, splits by tree, encodes, reports."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_harness.data.chat_encoder import ChatEncoder, EncodedSet, Example, Tokenizer, fingerprint
from qlora_harness.data.conversation import Conversation, Corpus
from qlora_harness.data.oasst1 import build_conversations
from qlora_harness.data.sources import Rows, load_splits
from qlora_harness.errors import DataError
from qlora_harness.settings import DataSettings


@dataclass(frozen=True)
class TrainingData:
    """Examples to train on, held-out examples, and a JSON report of both."""

    train: list[Example]
    evaluation: list[Example]
    report: dict[str, Any]


def load_training_data(tokenizer: Tokenizer, settings: DataSettings) -> TrainingData:
    """Loads, splits and encodes a data set.

    A data set's own validation split is used for evaluation. Without one, `eval_fraction` of the
    trees is held out, chosen by `eval_seed` alone: runs that differ in the seed of the training
    have the same conversations. Raises DataError if the data can't be read or nothing is left to
    train on.
    """
    encoder = ChatEncoder(tokenizer, settings.template, settings.max_length, settings.mask)
    splits = load_splits(settings.dataset, settings.dataset_revision)
    corpus = _build(splits.train, settings, splits.source)
    validation = None
    if splits.validation is None:
        fraction = settings.eval_fraction
        train, held_out = split_by_tree(corpus.conversations, fraction, settings.eval_seed)
        evaluation_source = f"{fraction:g} of the trees"
        if settings.eval_seed:
            evaluation_source += f", seed {settings.eval_seed}"
    else:
        validation = _build(splits.validation, settings, splits.source)
        train, held_out = corpus.conversations, validation.conversations
        evaluation_source = "validation split"
    encoded = encoder.encode_all(train)
    encoded_evaluation = encoder.encode_all(held_out)
    if not encoded.examples:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(corpus.dropped.items()))
        raise DataError(
            f"--dataset {settings.dataset}: no conversation is left to train on (of "
            f"{corpus.messages} messages; dropped: {reasons or 'none'}; without a supervised "
            f"token: {encoded.dropped})",
            "Check --languages and --max-length",
        )
    report = {
        "dataset": settings.dataset,
        "revision": settings.dataset_revision,
        "source": splits.source,
        "languages": settings.languages,
        "conversations": settings.conversations,
        "evaluation_source": evaluation_source,
        "template": settings.template,
        "mask": settings.mask,
        "leading_bos": encoder.leading_bos,
        **_corpus_report(corpus),
        "train": _split_report(encoded),
        "eval": _split_report(encoded_evaluation),
    }
    if validation is not None:
        report["validation"] = _corpus_report(validation)
    return TrainingData(encoded.examples, encoded_evaluation.examples, report)


def _build(rows: Rows, settings: DataSettings, source: str) -> Corpus:
    """Builds conversations; an error that names no file gets the name of the data set."""
    languages = parse_languages(settings.languages)
    try:
        return build_conversations(rows, languages, settings.conversations)
    except DataError as error:
        if source in str(error):
            raise
        raise DataError(f"{source}: {error.problem}", error.remedy) from None


def parse_languages(languages: str) -> tuple[str, ...] | None:
    """Returns the codes of --languages, or None for "all"."""
    codes = tuple(code.strip() for code in languages.split(",") if code.strip())
    if "all" in codes and len(codes) > 1:
        raise DataError(
            f"--languages {languages}: 'all' can't be combined with codes", "Give one of the two"
        )
    return None if codes == ("all",) else codes


def split_by_tree(
    conversations: Sequence[Conversation], eval_fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Returns training and evaluation conversations, in file order, with no tree on both sides.

    `eval_fraction` is rounded to whole trees, but to no less than one if it is above 0 and there
    are at least two.
    """
    trees = list(dict.fromkeys(c.tree for c in conversations))
    count = round(len(trees) * eval_fraction)
    if eval_fraction > 0 and len(trees) > 1:
        count = max(count, 1)
    held_out = set(random.Random(seed).sample(trees, count))
    train = [c for c in conversations if c.tree not in held_out]
    return train, [c for c in conversations if c.tree in held_out]


def _corpus_report(corpus: Corpus) -> dict[str, Any]:
    return {
        "messages": corpus.messages,
        "trees": corpus.trees,
        "dropped": dict(sorted(corpus.dropped.items())),
        "resolved": dict(sorted(corpus.resolved.items())),
    }


def _split_report(encoded: EncodedSet) -> dict[str, Any]:
    return {
        "conversations": len(encoded.examples),
        "turns": encoded.turns,
        "tokens": sum(len(e.input_ids) for e in encoded.examples),
        "supervised_tokens": sum(e.supervised_tokens for e in encoded.examples),
        "truncated": encoded.truncated,
        "without_supervised_token": encoded.dropped,
        "fingerprint": fingerprint(encoded.examples),
    }

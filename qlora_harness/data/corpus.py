"""A run's data from name to examples: read, split by tree, encode, report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_harness.data.chat import ChatEncoder, EncodedSet, Example, Tokenizer, fingerprint
from qlora_harness.data.conversation import Conversation, Corpus
from qlora_harness.data.oasst1 import build_conversations
from qlora_harness.data.sources import Rows, load_splits
from qlora_harness.errors import DataError
from qlora_harness.settings import DataSettings

_SPLIT_SEED = 0


@dataclass(frozen=True)
class TrainingData:
    """Examples to learn, examples held out, and the report of both (JSON)."""

    train: list[Example]
    evaluation: list[Example]
    report: dict[str, Any]


def load_chosen_data(tokenizer: Tokenizer, chosen: DataSettings) -> TrainingData:
    """Loads, splits and encodes the data that the settings name; see `load_training_data`."""
    return load_training_data(
        ChatEncoder(tokenizer, chosen.template, chosen.max_length, chosen.mask),
        chosen.dataset,
        revision=chosen.dataset_revision,
        languages=chosen.languages,
        paths=chosen.conversations,
        eval_fraction=chosen.eval_fraction,
    )


def load_training_data(
    encoder: ChatEncoder,
    dataset: str,
    *,
    revision: str | None,
    languages: str,
    paths: str,
    eval_fraction: float,
) -> TrainingData:
    """Loads, splits and encodes a data set.

    The data set's own validation split is the evaluation set. Without one, a share of the trees is
    held out, so that no tree is on both sides; it is the same share for every seed, so runs of
    several seeds learn from and are evaluated on the same conversations. Raises DataError if the
    data can't be read or nothing is left to train on.
    """
    codes = parse_languages(languages)
    splits = load_splits(dataset, revision)
    corpus = _build(splits.train, codes, paths, splits.source)
    if splits.validation is None:
        train, held_out = split_by_tree(corpus.conversations, eval_fraction, _SPLIT_SEED)
        evaluation_source = f"{eval_fraction:g} of the trees"
        validation = None
    else:
        validation = _build(splits.validation, codes, paths, splits.source)
        train, held_out = corpus.conversations, validation.conversations
        evaluation_source = "validation split"
    encoded = encoder.encode_all(train)
    encoded_evaluation = encoder.encode_all(held_out)
    if not encoded.examples:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(corpus.dropped.items()))
        raise DataError(
            f"--dataset {dataset}: no conversation is left to train on (of {corpus.messages} "
            f"messages; dropped: {reasons or 'none'}; without a supervised token: "
            f"{encoded.dropped})",
            "Check --languages and --max-length",
        )
    report = {
        "dataset": dataset,
        "revision": revision,
        "source": splits.source,
        "languages": languages,
        "conversations": paths,
        "evaluation_source": evaluation_source,
        "template": encoder.template_name,
        "mask": encoder.mask,
        "leading_bos": encoder.leading_bos,
        **_corpus_report(corpus),
        "train": _split_report(encoded),
        "eval": _split_report(encoded_evaluation),
    }
    if validation is not None:
        report["validation"] = _corpus_report(validation)
    return TrainingData(encoded.examples, encoded_evaluation.examples, report)


def _build(rows: Rows, languages: Sequence[str] | None, paths: str, source: str) -> Corpus:
    """Builds conversations; errors about all rows get the data set's name."""
    try:
        return build_conversations(rows, languages, paths)
    except DataError as error:
        if source in str(error):
            raise
        raise DataError(f"{source}: {error.problem}", error.remedy) from None


def parse_languages(languages: str) -> tuple[str, ...] | None:
    """Returns the codes of --languages, or None for "all"."""
    codes = tuple(code.strip() for code in languages.split(",") if code.strip())
    if "all" in codes and len(codes) > 1:
        raise DataError(
            f"--languages {languages}: 'all' stands beside others", "Give one of the two"
        )
    return None if codes == ("all",) else codes


def split_by_tree(
    conversations: Sequence[Conversation], eval_fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Returns training and evaluation conversations, each in file order, no tree on both sides.

    `eval_fraction` is rounded to whole trees, and to one at least if it is above 0 and there are
    two.
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

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
    """The examples of a run and the report that is stored with it.

    Attributes:
        train: Examples to learn.
        evaluation: Examples held out; empty when there are none.
        report: Counts, reasons and fingerprints (JSON).
    """

    train: list[Example]
    evaluation: list[Example]
    report: dict[str, Any]


def load_chosen_data(tokenizer: Tokenizer, chosen: DataSettings) -> TrainingData:
    """Loads, splits and encodes the data that settings name.

    Args:
        tokenizer: The base model's tokenizer.
        chosen: Which data, and what of them is trained on.

    Raises:
        SettingsError: The template does not suit the tokenizer; see `chat.ChatEncoder`.
        DataError: See `load_training_data`.
    """
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

    The data set's own validation split is the evaluation set; without one, a share of the trees is
    held out, so that no tree stands on both sides. It is the same share whatever the seed of a run,
    so that runs of several seeds learn from the same conversations and are evaluated on the same.

    Args:
        encoder: Tokenizer, template and length.
        dataset: Name, file or folder; see `sources.load_splits`.
        revision: Branch, tag or commit on the Hub.
        languages: Comma-separated codes, or "all".
        paths: "best-path" or "all-paths".
        eval_fraction: Share of trees to hold out, 0 to 0.5.

    Raises:
        DataError: The data can't be read, or nothing is left to train on.
    """
    wanted = parse_languages(languages)
    splits = load_splits(dataset, revision)
    corpus = _build(splits.train, wanted, paths, splits.source)
    if splits.validation is None:
        train, held_out = split_by_tree(corpus.conversations, eval_fraction, _SPLIT_SEED)
        evaluation_source = f"{eval_fraction:g} of the trees"
        validation = None
    else:
        validation = _build(splits.validation, wanted, paths, splits.source)
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
    """Builds conversations; what is wrong with them as a whole is said with the file's name."""
    try:
        return build_conversations(rows, languages, paths)
    except DataError as error:
        if source in str(error):
            raise
        raise DataError(f"{source}: {error.problem}", error.remedy) from None


def parse_languages(languages: str) -> tuple[str, ...] | None:
    """Returns the language codes, or None for all.

    Args:
        languages: Comma-separated codes, or "all".

    Raises:
        DataError: "all" stands beside other codes.
    """
    codes = tuple(code.strip() for code in languages.split(",") if code.strip())
    if "all" in codes and len(codes) > 1:
        raise DataError(
            f"--languages {languages}: 'all' stands beside others", "Give one of the two"
        )
    return None if codes == ("all",) else codes


def split_by_tree(
    conversations: Sequence[Conversation], eval_fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Splits conversations so that each tree is on one side only.

    Args:
        conversations: In file order.
        eval_fraction: Share of trees for evaluation; rounded to whole trees, at least one if above
            0 and there are two trees.
        seed: Which trees.

    Returns:
        Training and evaluation conversations, each in file order.
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

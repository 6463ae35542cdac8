"""Texts to token ids as HFLM does it, each distinct text once, in batches.

HFLM encodes context and continuation together for every pair and splits the ids at the length of
the context's own. Here a context is encoded once for all its continuations where that is provably
the same: a continuation that starts with a space after a non-space, with a tokenizer none of whose
tokens has a space behind a non-space, can't share a token with its context.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_SAMPLE = 16
_TAIL = 24


def encode_pairs(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Encodes (context, continuation) pairs.

    Args:
        lm: An HFLM; its `tok_encode` is the rule.
        pairs: Texts; an empty context stands for the prefix token.

    Returns:
        Token ids of context and continuation, as `TemplateLM.loglikelihood` would give them.
    """
    separable = _separable(lm.tokenizer)
    moved = [_move_spaces(context, continuation) for context, continuation in pairs]
    contexts = _encode_distinct(lm, (context for context, _ in moved if context))
    wholes = _encode_distinct(
        lm,
        (
            context + continuation
            for context, continuation in moved
            if context and not (separable and _splits(context, continuation))
        ),
    )
    tails: dict[tuple[str, str], list[int]] = {}
    found = []
    for context, continuation in moved:
        if not context:
            found.append(_without_context(lm, continuation))
        elif context + continuation in wholes:
            ids = contexts[context]
            found.append((ids, wholes[context + continuation][len(ids) :]))
        else:
            key = (context[-_TAIL:], continuation)
            if key not in tails:
                before = lm.tok_encode(key[0], add_special_tokens=False)
                both = lm.tok_encode(key[0] + continuation, add_special_tokens=False)
                tails[key] = both[len(before) :]
            found.append((contexts[context], tails[key]))
    if tails and not _confirmed(lm, moved, found):
        everything = _encode_distinct(lm, (c + k for c, k in moved if c))
        found = [
            (ids, everything[c + k][len(ids) :]) if c else (ids, continuation)
            for (c, k), (ids, continuation) in zip(moved, found, strict=True)
        ]
    return found


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Moves spaces from the end of the context to the continuation, as HFLM does."""
    stripped = context.rstrip()
    if not context or len(stripped) == len(context):
        return context, continuation
    return stripped, context[len(stripped) :] + continuation


def _splits(context: str, continuation: str) -> bool:
    return continuation.startswith(" ") and continuation[1:2].strip() != ""


def _separable(tokenizer: Any) -> bool:
    """Whether no token reaches over a border between a non-space and a space."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    if type(tokenizer.backend_tokenizer.model).__name__ != "BPE":
        return False
    # "▁" is a space for SentencePiece vocabularies, "Ġ" for byte-level ones.
    crossing = re.compile(r"[^▁Ġ ][▁Ġ ]")
    return not any(crossing.search(token) for token in tokenizer.get_vocab())


def _encode_distinct(lm: Any, texts: Iterator[str]) -> dict[str, list[int]]:
    distinct = list(dict.fromkeys(texts))
    bos = lm.tokenizer.decode(lm.prefix_token_id)
    # HFLM adds no second BOS to a text that begins with one; such texts go its own way.
    special = [text for text in distinct if bos and text.startswith(bos)]
    plain = [text for text in distinct if not (bos and text.startswith(bos))]
    options = {} if lm.add_bos_token is None else {"add_special_tokens": lm.add_bos_token}
    encoded = {text: lm.tok_encode(text) for text in special}
    if plain:
        with _parallel():
            ids = lm.tokenizer(plain, return_attention_mask=False, **options)["input_ids"]
        encoded.update(zip(plain, ids, strict=True))
    return encoded


@contextmanager
def _parallel() -> Iterator[None]:
    """lm_eval switches the tokenizers library to one thread; a batch gains from all of them."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _without_context(lm: Any, continuation: str) -> tuple[list[int], list[int]]:
    """An empty context is the prefix token, unless the continuation begins with it."""
    ids = lm.tok_encode(continuation, add_special_tokens=False)
    prefix = lm.prefix_token_id
    return ([prefix], ids) if prefix != ids[0] else (ids[:1], ids[1:])


def _confirmed(
    lm: Any,
    pairs: Sequence[tuple[str, str]],
    found: Sequence[tuple[list[int], list[int]]],
) -> bool:
    """Checks a sample against the plain rule: a tokenizer may do what its vocabulary hides."""
    for i in random.Random(0).sample(range(len(pairs)), min(_SAMPLE, len(pairs))):
        context, continuation = pairs[i]
        if context:
            whole = lm.tok_encode(context + continuation)
            ids = lm.tok_encode(context)
            if (ids, whole[len(ids) :]) != found[i]:
                return False
    return True

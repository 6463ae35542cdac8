"""Encodes texts as HFLM does, but each distinct piece of text only once, in batches.

HFLM encodes context and continuation together, and splits the ids at the length of the context's
ids. Here texts are cut between a non-space and a space, if no token of the vocabulary crosses such
a border. Few-shot prompts then share most of their pieces.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

_PARALLELISM = "TOKENIZERS_PARALLELISM"
_SAMPLE = 32  # pairs encoded whole, too, as a check
_ANCHOR = 24  # characters to search for the word before a piece
_PIECE = 128  # least characters of a piece
_BORDER = re.compile(r"(?<=[^\s▁Ġ]) (?=[^\s▁Ġ])")
_SPACED = re.compile(r"[^▁Ġ ][▁Ġ ]")
_CROSSING = re.compile(r"\S[ ▁]")

Pair = tuple[str, str]
TokenIds = tuple[list[int], list[int]]  # of the context and the continuation


def encode_pairs(lm: Any, pairs: Sequence[Pair]) -> list[TokenIds]:
    """Encodes (context, continuation) pairs as `lm.loglikelihood` of an HFLM does."""
    moved = [_move_spaces(context, continuation) for context, continuation in pairs]
    distinct = list(dict.fromkeys(moved))
    encoded = _by_pieces(lm, distinct) if _is_separable(lm.tokenizer) else {}
    rest = [pair for pair in distinct if pair not in encoded]
    encoded.update(zip(rest, _whole(lm, rest), strict=True))
    return [encoded[pair] for pair in moved]


def _whole(lm: Any, pairs: Sequence[Pair]) -> list[TokenIds]:
    """Encodes pairs as HFLM does, each distinct text once."""
    texts = (text for c, k in pairs if c for text in (c, c + k))
    ids = _encode_distinct(lm, texts)
    return [(ids[c], ids[c + k][len(ids[c]) :]) if c else _without_context(lm, k) for c, k in pairs]


def _by_pieces(lm: Any, pairs: Sequence[Pair]) -> dict[Pair, TokenIds]:
    """Encodes distinct pieces and joins their ids, for pairs whose continuation is a piece.

    Returns an empty dict if the ids differ from those of whole texts.
    """
    separate = _separate(pairs, _added_tokens(lm.tokenizer))
    words = {context: _word_before(context) for context in dict.fromkeys(c for c, _ in separate)}
    heads: dict[str, _Cut] = {}
    cuts = {context: _cut(context, heads) for context in words}
    pieces = dict.fromkeys(p for cut in (*heads.values(), *cuts.values()) for p in cut.pieces)
    pieces |= dict.fromkeys((words[context], continuation) for context, continuation in separate)
    tails = _encode_tails(lm, [piece for piece in pieces if piece[0]])
    if tails is None:
        return {}
    first = _encode_distinct(lm, (text for word, text in pieces if not word))
    known = tails | {("", text): ids for text, ids in first.items()}
    complete = {head: _joined(cut.pieces[:-1], known) for head, cut in heads.items()}
    ids = {c: complete[cut.head] + _joined(cut.pieces, known) for c, cut in cuts.items()}
    encoded = {(c, k): (ids[c], tails[words[c], k]) for c, k in separate}
    # The vocabulary does not show all that a tokenizer may do.
    sample = random.Random(0).sample(list(encoded), min(_SAMPLE, len(encoded)))
    confirmed = _whole(lm, sample) == [encoded[pair] for pair in sample]
    return encoded if confirmed else {}


def _separate(pairs: Sequence[Pair], added: re.Pattern[str] | None) -> list[Pair]:
    """The pairs whose continuation can be encoded without its context."""
    texts = {text for pair in pairs for text in pair}
    special = {text for text in texts if added is not None and added.search(text)}
    return [
        (context, continuation)
        for context, continuation in pairs
        if _BORDER.match(context[-1:] + continuation[:2], 1)
        and not (context in special or continuation in special)
    ]


class _Cut(NamedTuple):
    """The pieces of a text, each with the word before it, which the text's first piece lacks."""

    head: str  # the text without its last paragraph, whose pieces but the last come first
    pieces: list[Pair]  # then these
    start: int  # of the last one


def _cut(text: str, heads: dict[str, _Cut]) -> _Cut:
    """Cuts a text at the first border of a line once a piece is long enough.

    `heads` holds the heads cut so far: few-shot prompts share most of theirs.
    """
    head = text.rpartition("\n\n")[0]
    if head not in heads:
        heads[head] = _cut_from(head, "", 0)
    return _cut_from(text, head, heads[head].start)


def _cut_from(text: str, head: str, start: int) -> _Cut:
    """Cuts a text after the complete pieces of its head, which end at `start`."""
    starts = [start]
    while (line := text.find("\n", starts[-1] + _PIECE)) >= 0:
        border = _BORDER.search(text, line)
        if border is None:
            break
        starts.append(border.start())
    pieces = [
        (_word_before(text[max(0, start - _ANCHOR) : start]), text[start:stop])
        for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)
    ]
    return _Cut(head, pieces, starts[-1])


def _joined(pieces: Sequence[Pair], known: Mapping[Pair, list[int]]) -> list[int]:
    return list(chain.from_iterable(known[piece] for piece in pieces))


def _move_spaces(context: str, continuation: str) -> Pair:
    """Moves spaces from the end of the context to the continuation, as HFLM does."""
    stripped = context.rstrip()
    if not context or len(stripped) == len(context):
        return context, continuation
    return stripped, context[len(stripped) :] + continuation


def _is_separable(tokenizer: Any) -> bool:
    """Whether no token crosses a border between a non-space and a space."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    if type(tokenizer.backend_tokenizer.model).__name__ != "BPE":
        return False
    return _keeps_borders(tokenizer, len(tokenizer))


@lru_cache(maxsize=1)
def _keeps_borders(tokenizer: Any, tokens: int) -> bool:
    """Looks through a vocabulary of so many tokens, which takes as long as encoding many texts."""
    # "▁" is a space for SentencePiece vocabularies, "Ġ" for byte-level ones. Before it may be
    # another kind of space, such as a tab, which only the decoded token shows.
    spaced = [token for token in tokenizer.get_vocab() if _SPACED.search(token)]
    return not any(_CROSSING.search(tokenizer.convert_tokens_to_string([t])) for t in spaced)


def _added_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches added tokens, which may swallow the spaces around them."""
    contents = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return re.compile("|".join(map(re.escape, contents))) if contents else None


def _word_before(text: str) -> str:
    """The last word of a text, which replaces the text before a tail."""
    words = text[-_ANCHOR:].split()
    return words[-1] if words else text[-1:]


def _encode_tails(lm: Any, tails: Iterable[Pair]) -> dict[Pair, list[int]] | None:
    """The ids that each tail adds after its word; None if the word's ids change."""
    distinct = list(dict.fromkeys(tails))
    if not distinct:
        return {}
    texts = list(dict.fromkeys(t for word, tail in distinct for t in (word, word + tail)))
    with _parallel():
        encoded = lm.tokenizer(texts, return_attention_mask=False, add_special_tokens=False)
    ids = dict(zip(texts, encoded["input_ids"], strict=True))
    added = {}
    for word, tail in distinct:
        before, whole = ids[word], ids[word + tail]
        if whole[: len(before)] != before:
            return None
        added[word, tail] = whole[len(before) :]
    return added


def _encode_distinct(lm: Any, texts: Iterable[str]) -> dict[str, list[int]]:
    distinct = list(dict.fromkeys(texts))
    bos = lm.tokenizer.decode(lm.prefix_token_id)
    # HFLM adds no second BOS to a text that begins with one.
    special = {text: lm.tok_encode(text) for text in distinct if bos and text.startswith(bos)}
    plain = [text for text in distinct if text not in special]
    options = {} if lm.add_bos_token is None else {"add_special_tokens": lm.add_bos_token}
    if not plain:
        return special
    with _parallel():
        ids = lm.tokenizer(plain, return_attention_mask=False, **options)["input_ids"]
    return special | dict(zip(plain, ids, strict=True))


@contextmanager
def _parallel() -> Iterator[None]:
    """Undoes lm_eval's limit of the tokenizers library to one thread."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before


def _without_context(lm: Any, continuation: str) -> TokenIds:
    """Encodes a pair without context: the prefix token is its context."""
    ids = lm.tok_encode(continuation, add_special_tokens=False)
    prefix = lm.prefix_token_id
    return ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])

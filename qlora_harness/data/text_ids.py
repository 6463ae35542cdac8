"""Texts to token ids, many at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any
    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, /, **options: Any) -> list[int]: ...  # noqa: D102

    def decode(self, token_ids: Any, skip_special_tokens: bool = ...) -> Any: ...  # noqa: D102


def leading_bos(tokenizer: Tokenizer) -> list[int]:
    """Returns [BOS] if the tokenizer itself puts it before a text, else [].

    LLaMA's does, Qwen's and SmolLM2's don't. Scoring follows the tokenizer, so training must too.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer.encode("a"))[:1] == [bos] else []


def identity_of(tokenizer: Any) -> str | None:
    """Returns a hash of all that decides the ids of a fast tokenizer; None for others."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.all_special_ids)
    parts = (tokenizer.backend_tokenizer.to_str(), repr(ends), repr(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class TextIds:
    """Encodes texts without special tokens of the tokenizer's own; changes nothing in it.

    In `plain` a "</s>" that a user typed stays text and doesn't end the turn; `control` recognises
    it as the token. Several threads may use it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer: Tokenizer = tokenizer
        # The Rust part encodes many texts in parallel, and without the offsets of their tokens.
        self._backend = (
            tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        )
        self._lock, self._inside, self._before = Lock(), 0, False

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        backend = self._backend
        if backend is None or backend.truncation is not None or backend.padding is not None:
            return [self._encode(text, split=True) for text in texts]
        with self._special_tokens_as_text(backend):
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    @contextmanager
    def _special_tokens_as_text(self, backend: Any) -> Iterator[None]:
        """Sets the tokenizer so while any thread is inside."""
        with self._lock:
            if not self._inside:
                self._before = backend.encode_special_tokens
                backend.encode_special_tokens = True
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    backend.encode_special_tokens = self._before

    def control(self, text: str) -> list[int]:
        """Returns the ids of a text of the template, in which special tokens are recognised."""
        return self._encode(text, split=False)

    def _encode(self, text: str, *, split: bool) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)
        return list(ids)

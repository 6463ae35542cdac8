"""The hashes by which records know prompts without holding their text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

PROMPT_DIGITS = 16  # of the 64 hexadecimal digits of a SHA-256; lm_eval's samples hold all of them


def prompt_hash(prompt: str) -> str:
    """Returns 16 hexadecimal digits, the beginning of prompt_hash in lm_eval's samples."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:PROMPT_DIGITS]


def prompts_hash(questions: Iterable[tuple[int, str, str, str]]) -> str:
    """Returns one hash over (index, subject, prompt hash, right letter), whatever their order."""
    digest = hashlib.sha256()
    for question in sorted(questions):
        digest.update("".join(f"{part}\0" for part in question).encode())
    return digest.hexdigest()

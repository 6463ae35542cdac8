"""The hashes by which records know prompts without holding their text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

# Of the 64 hexadecimal digits of a SHA-256; lm_eval's samples hold all of them.
PROMPT_DIGITS = 16


def prompt_hash(prompt: str) -> str:
    """Returns the hash by which a prompt is known in records, 16 hexadecimal digits.

    It is the beginning of the prompt_hash in lm_eval's samples.

    Args:
        prompt: The text that was scored.
    """
    return hashlib.sha256(prompt.encode()).hexdigest()[:PROMPT_DIGITS]


def prompts_hash(questions: Iterable[tuple[int, str, str, str]]) -> str:
    """Returns one hash over all questions of a record, whatever their order.

    Args:
        questions: Index, subject, prompt hash and right letter of each.
    """
    digest = hashlib.sha256()
    for question in sorted(questions):
        digest.update("".join(f"{part}\0" for part in question).encode())
    return digest.hexdigest()

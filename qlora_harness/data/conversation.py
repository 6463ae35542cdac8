"""A conversation: what every data set becomes before it meets a tokenizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Turn:
    """One message, verbatim; `supervised` says whether its tokens are learned."""

    role: Literal["user", "assistant"]
    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Conversation:
    """Alternating turns from a user turn to an assistant turn.

    `tree` is the id of its tree, which is never split between training and evaluation.
    """

    tree: str
    turns: tuple[Turn, ...]


@dataclass
class Corpus:
    """The conversations of a data set, in file order, and what was left out.

    `dropped` counts messages (or trees, if the reason says so) by reason; `resolved` counts choices
    that were made without a rank, by kind.
    """

    conversations: list[Conversation]
    trees: int = 0
    messages: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    resolved: Counter[str] = field(default_factory=Counter)

"""Conversations: what every data set becomes before it is tokenized."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Turn:
    """One message, verbatim; its tokens are learned if it is `supervised`."""

    role: Literal["user", "assistant"]
    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Conversation:
    """Alternating turns, from a user's to an assistant's.

    All conversations of one `tree` are either trained or evaluated on.
    """

    tree: str
    turns: tuple[Turn, ...]


@dataclass
class Corpus:
    """The conversations of a data set, in file order, and what was left out.

    `dropped` counts messages (or trees, if the reason says so) by reason; `resolved` counts the
    choices that no rank decided, by kind.
    """

    conversations: list[Conversation]
    trees: int = 0
    messages: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    resolved: Counter[str] = field(default_factory=Counter)

"""A conversation: what every data set becomes before it meets a tokenizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: Who speaks.
        text: What is said, verbatim.
        supervised: Whether its tokens are learned (assistant turns only).
    """

    role: Literal["user", "assistant"]
    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Conversation:
    """Alternating turns from a user turn to an assistant turn.

    Attributes:
        tree: Id of the tree it comes from; trees are never split between training and evaluation.
        turns: The turns, in order.
    """

    tree: str
    turns: tuple[Turn, ...]


@dataclass
class Corpus:
    """The conversations of a data set and what was left out of them.

    Attributes:
        conversations: In the order of their trees in the file.
        trees: Number of trees (roots) seen.
        messages: Number of messages seen.
        dropped: Messages (or trees, where the reason says so) left out, by reason.
        resolved: Choices that had to be made without a rank, by kind.
    """

    conversations: list[Conversation]
    trees: int = 0
    messages: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    resolved: Counter[str] = field(default_factory=Counter)

"""Conversations: what every data set becomes before it is tokenized."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Turn:
    """One message, verbatim; its tokens are learned if it is `supervised`.

    `context` is what an instruction comes with: Alpaca's input, Dolly's context. A "text" turn
    stands alone and is learned as it is.
    """

    role: Literal["user", "assistant", "text"]
    text: str
    supervised: bool = False
    context: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Alternating turns, from a user's to an assistant's, or one "text" turn.

    All conversations of one `tree` are either trained or evaluated on. `place` names the row for
    messages, and `resolved` a choice to count.
    """

    tree: str
    turns: tuple[Turn, ...]
    system: str = ""
    place: str = field(default="", compare=False)
    resolved: str = field(default="", compare=False)


@dataclass
class Corpus:
    """The conversations of a data set, in file order, and what was left out.

    `dropped` counts messages, or the trees or rows that the reason names, by reason; `resolved`
    counts the choices that no rank decided, by kind.
    """

    conversations: list[Conversation]
    trees: int = 0
    messages: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    resolved: Counter[str] = field(default_factory=Counter)

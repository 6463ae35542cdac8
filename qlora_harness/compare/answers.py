"""Answers question by question, by the place of each question: what a paired comparison joins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Question(NamedTuple):
    """The place of a question: its subject and its number there."""

    subject: str
    doc_id: int


@dataclass(frozen=True)
class Answer:
    """One logged sample.

    Attributes:
        document: Hash of the row of the data file.
        prompt: Hash of the text that the model saw.
        target: Hash of the right answer.
        right: Whether the model's answer was right.
        tied: Whether the best log-probability is shared by several choices.
        choice: Place of the predicted letter, 0 to 3; of a tie, the first.
        answer: Place of the right letter, if the sample names it.
        question: The end of the prompt: the question without its shots, shortened; if logged.
    """

    document: str
    prompt: str
    target: str
    right: bool
    tied: bool
    choice: int
    answer: int | None = None
    question: str | None = None

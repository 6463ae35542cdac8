"""Answers question by question, by the place of each question: what a paired comparison joins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qlora_harness.families import LETTERS
from qlora_harness.question_hashes import PROMPT_DIGITS

Source = Literal["samples", "mmlu_progress"]


class Question(NamedTuple):
    """The place of a question: its subject and its number there."""

    subject: str
    doc_id: int


@dataclass(frozen=True)
class Answer:
    """One answered question, from a logged sample or from a row of an mmlu_progress file.

    Attributes:
        document: Hash of the row of the data file; an mmlu_progress file has none.
        prompt: Hash of the text that the model saw: 64 digits, or the first 16 of them.
        target: Hash of the right answer.
        right: Whether the model's answer was right.
        tied: Whether the best log-probability is shared by several choices.
        choice: Place of the predicted letter, 0 to 3; of a tie, the first.
        answer: Place of the right letter, if the sample names it.
        question: The end of the prompt: the question without its shots, shortened; if logged.
    """

    document: str | None
    prompt: str
    target: str
    right: bool
    tied: bool
    choice: int
    answer: int | None = None
    question: str | None = None

    def difference(self, other: Answer) -> str | None:
        """Returns what tells that another answer is to another question; None if nothing does.

        The hashes that both have are compared, and of prompts as many digits as both have; those
        of prompt and right answer are always there.

        Args:
            other: The answer of another run at the same place.

        Returns:
            "document", "prompt", "target" or None.
        """
        if None not in (self.document, other.document) and self.document != other.document:
            return "document"
        one, two = self.prompt, other.prompt
        if PROMPT_DIGITS in (len(one), len(two)):
            one, two = one[:PROMPT_DIGITS], two[:PROMPT_DIGITS]
        if one != two:
            return "prompt"
        return None if self.target == other.target else "target"


def count_letters(answers: Iterable[Answer]) -> tuple[int, ...]:
    """Returns how often each letter was the answer.

    Args:
        answers: Of any questions.
    """
    found = Counter(answer.choice for answer in answers)
    return tuple(found[place] for place in range(len(LETTERS)))


@dataclass(frozen=True)
class RecordedAnswers:
    """All answers of a run to one task family.

    Attributes:
        source: Where they were read from.
        by_question: The answers.
    """

    source: Source
    by_question: Mapping[Question, Answer]

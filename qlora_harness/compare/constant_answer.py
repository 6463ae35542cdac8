"""Whether a run does better than one letter for all questions.

A model that does not know the answers still prefers a letter, and the right answers are not spread
evenly over the letters: so its accuracy is near a quarter, and moves when the preference does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from qlora_harness.compare.answers import Answer
from qlora_harness.compare.paired import LEVEL

_FEWEST = 100  # questions


@dataclass(frozen=True)
class ConstantAnswer:
    """A run against the letter that is right most often.

    Attributes:
        letter: Its place, 0 to 3; of several, the first.
        accuracy: Share of the questions to which it is the right answer.
        p: Of the one-sided exact test (binomial, on the questions that one of both gets right)
            that the run does no better.
    """

    letter: int
    accuracy: float
    p: float

    @property
    def beaten(self) -> bool:
        """Whether the run is shown to do better."""
        return self.p < 1 - LEVEL


def against_constant(answers: Collection[Answer]) -> ConstantAnswer | None:
    """Tests a run's answers against the letter that is right most often.

    Args:
        answers: Of one task family.

    Returns:
        None where there are fewer than 100 answers, too few to tell much, or one whose right
        letter is not known.
    """
    from scipy.stats import binomtest

    right = Counter(answer.answer for answer in answers)
    if len(answers) < _FEWEST or None in right:
        return None
    letter, count = min(
        ((place, n) for place, n in right.items() if place is not None),
        key=lambda item: (-item[1], item[0]),
    )
    alone = sum(answer.right and answer.answer != letter for answer in answers)
    lost = sum(not answer.right and answer.answer == letter for answer in answers)
    p = binomtest(alone, alone + lost, alternative="greater").pvalue if alone + lost else 1.0
    return ConstantAnswer(letter, count / len(answers), float(p))

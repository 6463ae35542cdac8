"""MMLU questions that occur in the data.

Matched by n-grams of words, as in GPT-3's study of contamination: a question is in a conversation
that has 13 consecutive words of it, or all its words if it has fewer. Case, punctuation and answers
don't count. Questions of fewer than 8 words are left out: they occur by chance.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_harness.locations import expanded
from qlora_harness.score.mmlu_files import DIR_VARIABLE, Question, load_questions

LONGEST, SHORTEST = 13, 8  # words
_FILES = ("five_shot_mmlu_test.json", "five_shot_mmlu_val.json")
_WORD = re.compile(r"\w+")


@dataclass
class Overlap:
    """A question, the first row that holds it, and how many do."""

    subject: str
    question: str
    place: str
    rows: int = 1


class Questions:
    """The questions to look for; `overlaps` are those seen so far, by text."""

    def __init__(self, questions: Iterable[Question]) -> None:
        self.overlaps: dict[str, Overlap] = {}
        self._subjects = {stem_of(question.prompt): question.subject for question in questions}
        self._phrases: dict[str, list[str]] = {}
        # By the first words of each phrase: most rows need no other look.
        self._by_start: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for stem in self._subjects:
            words = _words(stem)
            if len(words) < SHORTEST:
                continue
            phrases = _windows(words, min(LONGEST, len(words)))
            self._phrases[stem] = [f" {' '.join(phrase)} " for phrase in phrases]
            for phrase in phrases:
                self._by_start[phrase[:SHORTEST]].add(stem)

    def __len__(self) -> int:
        return len(self._phrases)

    def look(self, text: str, place: str) -> None:
        """Notes the questions that a conversation holds."""
        words = _words(text)
        windows = _windows(words, SHORTEST)
        if self._by_start.keys().isdisjoint(windows):
            return
        candidates = {stem for window in windows for stem in self._by_start.get(window, ())}
        joined = f" {' '.join(words)} "
        for stem in sorted(candidates):
            if not any(phrase in joined for phrase in self._phrases[stem]):
                continue
            if stem in self.overlaps:
                self.overlaps[stem].rows += 1
            else:
                self.overlaps[stem] = Overlap(self._subjects[stem], stem, place)


def local_questions() -> Questions | None:
    """Returns the questions in QLORA_MMLU_DIR; None if it is not set. Raises DataError."""
    folder = os.environ.get(DIR_VARIABLE)
    if not folder:
        return None
    present = [
        name
        for name in _FILES
        if any((expanded(folder) / f"{name}{suffix}").is_file() for suffix in ("", ".xz"))
    ]
    # Without any, loading the first raises the error that says what is missing.
    return Questions(q for name in present or _FILES[:1] for q in load_questions(name))


def stem_of(prompt: str) -> str:
    """Returns the last question of a prompt, without the choices."""
    return prompt.rsplit("\n\n", 1)[-1].split("\nA. ", 1)[0].strip()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _windows(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(size)), strict=False))

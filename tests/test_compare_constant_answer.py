"""A run against one letter for all questions, and what the comparison says of it."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from compare_runs import texts, write_harness

from qlora_harness.compare.answers import Answer
from qlora_harness.compare.comparison import compare
from qlora_harness.compare.constant_answer import against_constant


def answers(pairs: list[tuple[int, int]]) -> list[Answer]:
    return [
        Answer(None, str(i), str(right), given == right, False, given, right)
        for i, (given, right) in enumerate(pairs)
    ]


def tail(hits: int, trials: int) -> float:
    return sum(math.comb(trials, k) for k in range(hits, trials + 1)) / 2**trials


def test_the_letter_that_is_right_most_often_is_the_measure() -> None:
    # D is right 40 times of 100; the run gives C, and is right 30 times.
    pairs = [(2, 2)] * 30 + [(2, 3)] * 40 + [(2, 0)] * 15 + [(2, 1)] * 15
    found = against_constant(answers(pairs))
    assert found is not None
    assert (found.letter, found.accuracy) == (3, 0.4)
    assert found.p == pytest.approx(tail(30, 70), rel=1e-9)
    assert not found.beaten


def test_a_run_that_knows_some_answers_is_better() -> None:
    # A right 40 times, of which the run knows 30; it knows 30 of the others.
    pairs = [(0, 0)] * 30 + [(1, 0)] * 10 + [(2, 2)] * 30 + [(1, 2)] * 30
    found = against_constant(answers(pairs))
    assert found is not None
    assert (found.letter, found.accuracy) == (2, 0.6)
    assert found.p == pytest.approx(tail(30, 60), rel=1e-9)
    better = against_constant(answers([(i % 4, i % 4) for i in range(100)]))
    assert better is not None
    assert better.beaten
    assert better.p == pytest.approx(tail(75, 75), rel=1e-9)


def test_nothing_is_said_of_few_questions_or_unknown_letters() -> None:
    assert against_constant(answers([(0, 0)] * 99)) is None
    some = answers([(0, 0)] * 100)
    always = against_constant(some)
    assert always is not None
    assert always.p == 1.0
    nameless = Answer(None, "x", "y", True, False, 0, None)
    assert against_constant([*some, nameless]) is None


def test_runs_that_guess_are_told(tmp_path: Path) -> None:
    """The samples of these runs give A to every question."""
    marks = random.Random(0).choices("01", [3, 1], k=120)
    files = [
        write_harness(tmp_path / name, {"anatomy": "".join(marks[place:] + marks[:place])})
        for name, place in (("a", 0), ("b", 1))
    ]
    comparison = compare(files)
    right = marks.count("1")
    share = 100 * right / 120
    for name in "ab":
        # The right letter of these samples is A or B.
        other = f"always answering B gives ({100 - share:.2f}%; one-sided exact test, p = 1.00)"
        assert (
            f"{name}/gpt2: {share:.2f}% right is not shown to be more than {other}; "
            "it answers A to 100.0% of the questions."
        ) in [note.replace(f"{name}:", f"{name}/gpt2:") for note in comparison.notes]
    assert comparison.verdict[0].endswith(
        "; neither is shown to do better than one letter for all questions, so this says nothing "
        "about what they know."
    )
    assert texts(comparison, "mmlu", "letter.A") == ["100.0", "100.0", "–"]
    assert texts(comparison, "mmlu", "letter.D") == ["0.0", "0.0", "–"]


def test_runs_without_answers_have_no_letters(tmp_path: Path) -> None:
    marks: dict[str, Any] = {"anatomy": "1" * 60 + "0" * 60}
    files = [write_harness(tmp_path / name, marks, samples=False) for name in "ab"]
    comparison = compare(files)
    assert not any("always answering" in note for note in comparison.notes)
    table = next(item for item in comparison.tables if item.key == "mmlu")
    assert not any(row.key.startswith("letter.") for row in table.rows)

"""Standard errors against values worked out by hand and by numpy's own formula."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from qlora_harness.compare.statistics import (
    Difference,
    PairedCounts,
    count_pairs,
    paired_difference,
    unpaired_difference,
)


def test_unpaired_standard_error_is_the_root_of_the_sum_of_squares() -> None:
    difference = unpaired_difference(0.44, 0.003, 0.45, 0.004)
    assert difference.value == pytest.approx(0.01, abs=1e-15)
    assert difference.stderr == 0.005
    assert not difference.paired


def test_unpaired_standard_error_is_unknown_when_one_is() -> None:
    difference = unpaired_difference(0.44, None, 0.45, 0.004)
    assert difference.stderr is None
    assert difference.shown is None


def test_pairs_are_counted_by_who_was_right() -> None:
    pairs = [(True, True)] * 3 + [(True, False)] * 5 + [(False, True)] * 2 + [(False, False)] * 7
    assert count_pairs(pairs) == PairedCounts(both=3, only_first=5, only_second=2, neither=7)


def test_paired_difference_of_a_hand_made_table() -> None:
    # b = 25, c = 15, n = 100: (15 - 25)/100, sqrt(40 - 100/100)/100.
    difference = paired_difference(PairedCounts(40, 25, 15, 20))
    assert difference.value == -0.1
    assert difference.stderr == pytest.approx(math.sqrt(39) / 100, abs=1e-15)
    assert difference.paired
    assert difference.shown is False  # 0.1 < 1.96 * 0.0624


def test_paired_standard_error_is_that_of_the_mean_of_differences() -> None:
    draw = random.Random(0)
    pairs = [(draw.random() < 0.6, draw.random() < 0.5) for _ in range(500)]
    changes = [second - first for first, second in pairs]
    difference = paired_difference(count_pairs(pairs))
    assert difference.value == pytest.approx(statistics.mean(changes), abs=1e-12)
    expected = statistics.pstdev(changes) / math.sqrt(len(changes))
    assert difference.stderr == pytest.approx(expected, abs=1e-12)


def test_paired_standard_error_is_zero_when_every_answer_changed_the_same_way() -> None:
    assert paired_difference(PairedCounts(0, 0, 7, 0)) == Difference(1.0, 0.0, paired=True)


def test_no_question_has_no_difference() -> None:
    with pytest.raises(ValueError, match="no question"):
        paired_difference(PairedCounts(0, 0, 0, 0))


@pytest.mark.parametrize(
    ("value", "stderr", "shown"),
    [
        (0.0, 0.0, False),
        (0.0, 0.1, False),
        (0.0195, 0.01, False),
        (-0.0197, 0.01, True),
        (0.1, 0.0, True),
        (0.1, None, None),
    ],
)
def test_a_difference_is_shown_from_196_standard_errors_on(
    value: float, stderr: float | None, shown: bool | None
) -> None:
    assert Difference(value, stderr, paired=False).shown is shown

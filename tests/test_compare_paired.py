"""Paired statistics against statsmodels, against hand-made tables, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from qlora_harness.compare.paired import (
    add,
    analyse,
    bootstrap,
    correct,
    detectable,
    equivalence,
    holm,
    mcnemar,
)
from qlora_harness.compare.statistics import PairedCounts, count_pairs, paired_difference

TABLES = [
    PairedCounts(40, 25, 15, 20),
    PairedCounts(0, 0, 7, 0),
    PairedCounts(7, 5, 3, 5),
    PairedCounts(5000, 700, 800, 7542),
    PairedCounts(1, 0, 1, 0),
]


@pytest.mark.parametrize("counts", TABLES)
def test_mcnemar_is_that_of_statsmodels(counts: PairedCounts) -> None:
    table = [[counts.both, counts.only_first], [counts.only_second, counts.neither]]
    assert mcnemar(counts) == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue, rel=1e-9)


def test_without_a_changed_answer_nothing_is_shown() -> None:
    counts = PairedCounts(3, 0, 0, 2)
    assert mcnemar(counts) == 1.0
    found = analyse({"a": counts}, {}, same_letter=5, draws=200)
    assert found.interval is None
    assert not found.different
    # Five questions can't show that two models are alike within a point; many can.
    assert not found.equivalent
    assert analyse({"a": PairedCounts(3000, 0, 0, 2000)}, {}, same_letter=5000).equivalent


def test_one_question() -> None:
    found = analyse({"a": PairedCounts(0, 0, 1, 0)}, {"a": "stem"}, same_letter=0, draws=200)
    assert found.difference.value == 1.0
    assert found.mcnemar_p == 1.0
    assert not found.equivalent
    assert found.detectable == 1.0


def test_holm_is_that_of_statsmodels() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 4, 57):
        values = generator.uniform(size=size) ** 3
        wanted = multipletests(values, method="holm")[1]
        assert holm(values.tolist()) == pytest.approx(wanted.tolist(), rel=1e-12)


def test_tests_of_several_runs_are_corrected_among_each_other() -> None:
    tables = [PairedCounts(40, 28, 10, 22), PairedCounts(50, 1, 8, 41), PairedCounts(50, 9, 11, 30)]
    alone = {
        index: analyse({"a": counts}, {}, same_letter=100, draws=200)
        for index, counts in enumerate(tables, start=1)
    }
    assert all((item.tests, item.mcnemar_holm) == (1, item.mcnemar_p) for item in alone.values())
    found = correct(alone)
    raw = [
        statsmodels_mcnemar([[c.both, c.only_first], [c.only_second, c.neither]]).pvalue
        for c in tables
    ]
    wanted = multipletests(raw, method="holm")[1]
    assert list(found) == [1, 2, 3]
    assert [item.mcnemar_p for item in found.values()] == pytest.approx(raw, rel=1e-9)
    assert [item.mcnemar_holm for item in found.values()] == pytest.approx(wanted, rel=1e-9)
    assert [item.tests for item in found.values()] == [3, 3, 3]
    # The second is below 5% alone and above it among three.
    assert [item.different for item in alone.values()] == [True, True, False]
    assert [item.different for item in found.values()] == [True, False, False]
    assert correct({}) == {}
    # Without the first, which is no comparison of interest, two tests are corrected.
    apart = correct(alone, apart=[1])
    wanted = multipletests(raw[1:], method="holm")[1].tolist()
    holm_p = [item.mcnemar_holm for item in apart.values()]
    assert holm_p == [None, pytest.approx(wanted[0]), pytest.approx(wanted[1])]
    assert [item.tests for item in apart.values()] == [0, 2, 2]
    assert [item.mcnemar_p for item in apart.values()] == pytest.approx(raw, rel=1e-9)
    assert apart[1].different


def test_bootstrap_of_counts_is_that_of_questions() -> None:
    """Drawing cells from a multinomial is drawing questions with replacement."""
    counts = PairedCounts(40, 25, 15, 20)
    changes = np.repeat([0, -1, 1], [60, 25, 15])
    generator = np.random.default_rng(1)
    drawn = generator.choice(changes, size=(20_000, 100)).mean(axis=1)
    micro, macro = bootstrap([counts], draws=20_000, seed=0)
    assert (micro.low, micro.high) == pytest.approx(
        np.percentile(drawn, [2.5, 97.5]).tolist(), abs=0.011
    )
    assert (macro.low, macro.high) == pytest.approx((micro.low, micro.high), abs=0.011)


def test_macro_interval_is_drawn_within_subjects() -> None:
    # A subject of one question that changed always changes: it adds its mean and no spread.
    parts = [PairedCounts(0, 0, 1, 0), PairedCounts(50, 10, 10, 30)]
    _, macro = bootstrap(parts, draws=5000, seed=0)
    alone, _ = bootstrap(parts[1:], draws=5000, seed=0)
    assert macro.low == pytest.approx(0.5 + alone.low / 2, abs=0.011)
    assert macro.high == pytest.approx(0.5 + alone.high / 2, abs=0.011)


def simulate(
    generator: np.random.Generator, questions: int, first: float, second: float, same: float
) -> dict[str, PairedCounts]:
    """Two runs over three subjects; `same` is the share of questions both answer alike."""
    found = {}
    for place, size in enumerate((questions // 2, questions // 3, questions // 6)):
        alike = generator.uniform(size=size) < same
        one = generator.uniform(size=size) < first
        other = np.where(alike, one, generator.uniform(size=size) < second)
        found[str(place)] = count_pairs(zip(one.tolist(), other.tolist(), strict=True))
    return found


def test_intervals_cover_the_true_difference() -> None:
    generator = np.random.default_rng(2)
    true = 0.3 * (0.48 - 0.44)  # 30% of the questions are answered independently
    micro_covers = macro_covers = 0
    for run in range(500):
        parts = list(simulate(generator, 1200, 0.44, 0.48, 0.7).values())
        micro, macro = bootstrap(parts, draws=1000, seed=run)
        micro_covers += micro.low <= true <= micro.high
        macro_covers += macro.low <= true <= macro.high
    assert 0.93 <= micro_covers / 500 <= 0.97
    assert 0.93 <= macro_covers / 500 <= 0.97


def test_tests_hold_their_level() -> None:
    generator = np.random.default_rng(3)
    differences = equivalences = 0
    margin = 0.03
    for _ in range(500):
        alike = add(list(simulate(generator, 1200, 0.45, 0.45, 0.7).values()))
        differences += mcnemar(alike) < 0.05
        # The true difference is the margin itself: equivalence may be claimed in 5% at most.
        apart = add(list(simulate(generator, 1200, 0.45, 0.55, 0.7).values()))
        equivalences += equivalence(apart, margin) < 0.05
    assert differences / 500 <= 0.07
    assert equivalences / 500 <= 0.07


@pytest.mark.parametrize(
    ("first", "second", "total", "margin"),
    [(5, 3, 200, 0.05), (700, 800, 14042, 0.01), (2, 1, 570, 0.01), (10, 0, 300, 0.05)],
)
def test_equivalence_is_the_score_test_at_the_likeliest_shares(
    first: int, second: int, total: int, margin: float
) -> None:
    from scipy.optimize import minimize_scalar
    from scipy.stats import norm

    def beyond(less: int, more: int) -> float:
        def cost(q: float) -> float:
            value = less * math.log(q) + (total - less - more) * math.log(1 - 2 * q + margin)
            return -value - (more * math.log(q - margin) if more else 0.0)

        ends = (margin + 1e-9, (1 + margin) / 2 - 1e-9)
        q = minimize_scalar(cost, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
        spread = math.sqrt(total * (2 * q - margin - margin**2))
        return float(norm.sf((more - less + total * margin) / spread))

    counts = PairedCounts(total - first - second, first, second, 0)
    wanted = max(beyond(first, second), beyond(second, first))
    assert equivalence(counts, margin) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("changed", [0, 2, 10, 60])
def test_detectable_difference_is_never_below_what_the_exact_test_can_find(changed: int) -> None:
    from scipy.stats import binom

    total = 300
    size = detectable(PairedCounts(total - changed, changed // 2, changed - changed // 2, 0))
    # All changes to one side: found if at least six of them come.
    assert size >= 8 / total
    if changed < 8:
        assert binom.sf(5, total, size) >= 0.75


def test_detectable_difference_is_found_in_four_of_five_samples() -> None:
    counts = PairedCounts(400, 180, 180, 440)
    size = detectable(counts)
    generator = np.random.default_rng(4)
    share = 360 / 1200
    first, second = (share - size) / 2, (share + size) / 2
    found = 0
    for _ in range(1000):
        cells = generator.multinomial(1200, [first, second, 1 - share]).tolist()
        sample = PairedCounts(cells[2], cells[0], cells[1], 0)
        difference = paired_difference(sample)
        found += abs(difference.value) > 1.96 * math.sqrt(cells[0] + cells[1]) / 1200
    assert found / 1000 == pytest.approx(0.8, abs=0.04)


def test_categories_hold_their_subjects() -> None:
    parts = {
        "a": PairedCounts(4, 1, 2, 3),
        "b": PairedCounts(1, 1, 0, 3),
        "c": PairedCounts(1, 0, 0, 0),
    }
    found = analyse(parts, {"a": "stem", "b": "stem"}, same_letter=16, draws=200)
    (stem,) = found.categories
    assert (stem.name, stem.counts) == ("stem", PairedCounts(5, 2, 2, 6))
    assert [group.name for group in found.subjects] == ["a", "b", "c"]
    assert found.agreement == 1.0
    assert found.macro == pytest.approx((0.1 - 0.2 + 0.0) / 3)

"""Intervals and tests against other programs, against hand tables, and in simulations."""

# Endpoints without a value are None, on which arithmetic fails a test as it should.
# mypy: disable-error-code="operator,union-attr"
from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from qlora_harness.compare import choices
from qlora_harness.compare import statistics as st
from qlora_harness.compare.power import questions_needed
from qlora_harness.compare.statistics import wilson

RNG = np.random.default_rng(0)


def likelihood_score(lost: int, won: int, n: int, delta: float) -> float:
    """Tango's statistic with the restricted maximum found by a search, not by the formula."""

    def negative(q: float) -> float:
        parts = ((lost, q), (won, q + delta), (n - lost - won, 1 - 2 * q - delta))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in parts if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = optimize.minimize_scalar(
        negative, bounds=(low, high), options={"xatol": 1e-12}, method="bounded"
    ).x
    return (won - lost - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))


@pytest.mark.parametrize(
    ("lost", "won", "n"), [(3, 9, 44), (0, 5, 30), (778, 894, 14042), (7, 7, 60)]
)
@pytest.mark.parametrize("delta", [-0.2, -0.01, 0.0, 0.01, 0.15])
def test_tango_score_is_that_of_the_restricted_likelihood(
    lost: int, won: int, n: int, delta: float
) -> None:
    score = float(st.tango_score(lost, won, n, delta))
    assert score == pytest.approx(likelihood_score(lost, won, n, delta), abs=2e-4)


def test_tango_interval_of_published_tables() -> None:
    # Tango 1998, table III: 9 and 3 of 44 discordant; and no discordant pair of 50.
    low, high = st.tango_interval(3, 9, 44, 0.05)
    assert (float(low), float(high)) == pytest.approx((-0.0201, 0.2948), abs=1e-4)
    low, high = st.tango_interval(0, 0, 50, 0.05)
    z = 1.959964
    assert float(high) == pytest.approx(z**2 / (50 + z**2), abs=1e-5) == -float(low)


def test_no_two_statements_contradict_each_other() -> None:
    count = 100_000
    lost, won = RNG.integers(0, 80, count), RNG.integers(0, 80, count)
    n = lost + won + RNG.integers(1, 4000, count)
    low, high = st.tango_interval(lost, won, n, 0.05)
    inner_low, inner_high = st.tango_interval(lost, won, n, 0.10)
    p = st.no_difference(lost, won, n)
    assert (((low > 0) | (high < 0)) == (p < 0.05)).all()
    assert ((low <= inner_low) & (inner_low <= inner_high) & (inner_high <= high)).all()
    middle = (won - lost) / n
    assert ((inner_low <= middle) & (middle <= inner_high)).all()
    mirrored_low, mirrored_high = st.tango_interval(won, lost, n, 0.05)
    assert (mirrored_low == -high).all()
    assert (mirrored_high == -low).all()
    # Equivalence by the two one-sided tests is the 90% interval within the margin.
    for margin in (0.01, 0.05):
        z = stats.norm.ppf(0.95)
        above = st.tango_score(lost, won, n, -margin) > z
        below = st.tango_score(lost, won, n, margin) < -z
        assert ((above & below) == ((inner_low > -margin) & (inner_high < margin))).all()


def test_estimates_agree_with_their_tests_for_any_data() -> None:
    for _ in range(300):
        size = int(RNG.integers(20, 200))
        differences = RNG.choice([-1.0, -0.5, 0.0, 0.5, 1.0], size, p=[0.1, 0.1, 0.5, 0.15, 0.15])
        a, b = RNG.normal(size=3), RNG.normal(size=3)
        welch, blocks = st.over_seeds(a, b[:2], blocks=False), st.over_seeds(a, b, blocks=True)
        mean, items = st.over_items(differences)
        for one in (
            st.paired_proportions(differences),
            st.combine(mean, items, welch),
            st.combine(mean, items, blocks),
        ):
            assert (one.low > 0 or one.high < 0) == (one.p < 0.05)
            assert one.low <= one.inner_low <= one.difference <= one.inner_high <= one.high
        one, other = st.paired_proportions(differences), st.paired_proportions(-differences)
        assert (one.low, one.high, one.p) == (-other.high, -other.low, other.p)


def test_fractions_of_ties_have_their_sum_and_squares() -> None:
    differences = np.array([1.0, -1.0, 0.5, -0.25, 0.0, 0.0, 1.0])
    lost, won = st.pair_counts(differences.sum(), (differences**2).sum())
    assert (won - lost, won + lost) == pytest.approx((1.25, 3.3125))
    assert st.pair_counts(1.0, 3.0) == (1.0, 2.0)


def test_items_with_weights_clusters_and_strata() -> None:
    values = RNG.normal(0.3, 1, 60)
    mean, variance = st.over_items(values)
    assert (mean, variance.value, variance.freedom) == pytest.approx(
        (values.mean(), values.var(ddof=1) / 60, 59)
    )
    tokens = RNG.integers(5, 50, 60).astype(float)
    mean, variance = st.over_items(values / tokens, tokens)
    ratio = values.sum() / tokens.sum()
    residuals = values - ratio * tokens
    assert mean == pytest.approx(ratio)
    assert variance.value == pytest.approx(60 / 59 * (residuals**2).sum() / tokens.sum() ** 2)
    groups = np.repeat(np.arange(6), 10)
    _, clustered = st.over_items(values, clusters=groups)
    sums = [(values[groups == g] - values.mean()).sum() for g in range(6)]
    assert clustered.value == pytest.approx(6 / 5 * sum(s**2 for s in sums) / 60**2)
    assert clustered.freedom == 5
    uneven = np.array([0] * 10 + [1] * 30 + [2] * 20)
    mean, variance = st.over_strata(values, uneven)
    parts = [values[uneven == g] for g in range(3)]
    assert mean == pytest.approx(np.mean([part.mean() for part in parts]))
    assert variance.value == pytest.approx(sum(p.var(ddof=1) / len(p) for p in parts) / 9)


def test_seeds_are_welchs_or_blocks() -> None:
    one, two = np.array([0.5, 0.7, 0.6]), np.array([0.4, 0.45, 0.38])
    welch = st.combine(float(one.mean() - two.mean()), None, st.over_seeds(one, two, blocks=False))
    theirs = stats.ttest_ind(one, two, equal_var=False)
    assert welch.p == pytest.approx(theirs.pvalue)
    assert welch.freedom == pytest.approx(theirs.df)
    paired = st.combine(float((one - two).mean()), None, st.over_seeds(one, two, blocks=True))
    assert paired.p == pytest.approx(stats.ttest_rel(one, two).pvalue)
    # An arm of one seed is taken to vary as the other does; a base has no seed.
    (single,) = st.over_seeds(one, two[:1], blocks=False)
    assert (single.value, single.freedom) == (pytest.approx(one.var(ddof=1) * (1 / 3 + 1)), 2)
    (alone,) = st.over_seeds(one, two[:1], blocks=False, fixed=(False, True))
    assert (alone.value, alone.freedom) == (pytest.approx(one.var(ddof=1) / 3), 2)
    assert st.over_seeds(one[:1], two[:1], blocks=True) == []


def test_cochrans_quantile_weighs_the_parts() -> None:
    items, seeds = st.Variance(3.0, 1000), st.Variance(1.0, 1)
    estimate = st.combine(0.0, items, [seeds])
    quantile = (3 * stats.t.ppf(0.975, 1000) + stats.t.ppf(0.975, 1)) / 4
    assert estimate.high == pytest.approx(quantile * 2, rel=1e-6)
    inner = (3 * stats.t.ppf(0.95, 1000) + stats.t.ppf(0.95, 1)) / 4
    assert estimate.inner_high == pytest.approx(inner * 2, rel=1e-6)
    edge = st.combine(estimate.high, items, [seeds])  # type: ignore[arg-type]
    assert (edge.low, edge.p) == (pytest.approx(0, abs=1e-9), pytest.approx(0.05))
    welch = st.combine(0.0, items, [st.Variance(1.0, 1), st.Variance(0.0, 1)])
    assert welch.freedom == pytest.approx(16 / (9 / 1000 + 1))


CELLS = [(k, k, sd) for k, sd in product((2, 3, 5), (0.0004, 0.002, 0.006))]
UNEVEN = [(3, 1, 0.002), (3, 1, 0.006), (2, 5, 0.0004), (2, 5, 0.002), (2, 5, 0.006)]


@pytest.mark.parametrize(("seeds", "others", "sd"), [*CELLS, *UNEVEN])
def test_arm_intervals_cover(seeds: int, others: int, sd: float) -> None:
    """10% of 14,042 answers differ; the parts of an interval are drawn as they are distributed."""
    n, draws, rng = 14_042, 4000, np.random.default_rng(seeds)
    changes = rng.multinomial(n, [0.05, 0.05, 0.9], size=draws)
    covered = 0
    for lost, won, _ in changes:
        # Sums are all that `over_items` takes from the questions.
        mean = (won - lost) / n
        items = st.Variance(((won + lost) / n - mean**2) / (n - 1), n - 1)
        one, two = rng.normal(0, sd, seeds), rng.normal(0, sd, others)
        estimate = st.combine(
            mean + float(one.mean() - two.mean()), items, st.over_seeds(one, two, blocks=False)
        )
        covered += estimate.low <= 0 <= estimate.high
    low = 0.925 if others > seeds else 0.93
    assert low <= covered / draws <= (0.97 if others == seeds else 0.98)


@pytest.mark.parametrize("n", [100, 1531, 14_042])
def test_size_of_the_test_of_two_runs(n: int) -> None:
    rng = np.random.default_rng(n)
    lost, won, _ = rng.multinomial(n, [0.05, 0.05, 0.9], size=40_000).T
    rejected = (st.no_difference(lost, won, n) < 0.05).mean()
    assert 0.04 <= rejected <= 0.06


def test_holm_and_wilson_are_those_of_statsmodels() -> None:
    p = RNG.uniform(size=57) ** 2
    assert st.holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert wilson(0.3, 50) == pytest.approx(proportion_confint(15, 50, method="wilson"), abs=1e-6)


def test_probabilities_and_what_follows_from_them() -> None:
    logprobs = np.log(np.array([[0.4, 0.1, 0.3, 0.2], [0.1, 0.1, 0.1, 0.1]])) - 3
    logprobs[1, 3] = np.nan  # a question with three choices
    shares = choices.probabilities(logprobs)
    assert shares == pytest.approx(np.array([[0.4, 0.1, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3, 0]]))
    answer = np.array([2, 0], dtype=np.int8)
    assert choices.nll_of(shares, answer) == pytest.approx([-math.log(0.3), math.log(3)])
    assert choices.brier_of(shares, answer) == pytest.approx(
        [0.16 + 0.01 + 0.49 + 0.04, 4 / 9 + 2 / 9]
    )
    other = np.full((2, 4), 0.25)
    expected = np.mean([stats.entropy(row, [0.25] * 4) for row in shares])
    assert choices.divergence(shares, other) == pytest.approx(expected)
    assert choices.divergence(shares, shares) == 0
    # Confidences of 0.65 and 0.61 share a bin, 0.9 has one of its own; ends are right or wrong.
    sure = np.array([[0.65, 0.35], [0.39, 0.61], [0.9, 0.1]])
    right = np.array([0, 0, 0], dtype=np.int8)
    assert choices.calibration_error(sure, right) == pytest.approx((abs(1 - 0.65 - 0.61) + 0.1) / 3)
    best = choices.best_choices(np.array([[-1.0, -1.0, -2.0], [-3.0, np.nan, -1.0]]))
    assert best.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]


def test_letter_preference_is_taken_out() -> None:
    n = 4000
    answer = RNG.integers(0, 4, n).astype(np.int8)
    ignorant = RNG.normal(size=(n, 4)) + np.array([3.0, 0.0, 1.0, 0.0])
    values = choices.letter_centred(ignorant, answer)
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(n)
    knowing = ignorant.copy()
    knowing[np.arange(n), answer] += 0.5
    assert choices.letter_centred(knowing, answer).mean() > 0.08
    # The same whatever is added to a letter.
    shifted = knowing + np.array([5.0, -2.0, 0.0, 1.0])
    assert choices.letter_centred(shifted, answer) == pytest.approx(
        choices.letter_centred(knowing, answer)
    )


@pytest.mark.parametrize(("sd", "seeds"), [(0.002, 3), (0.003, 3), (0.002, 5), (0.0004, 2)])
def test_plan_is_what_simulated_studies_need(sd: float, seeds: int) -> None:
    need = questions_needed(0.01, 0.10, sd, seeds)
    rng = np.random.default_rng(5)
    draws = 3000
    for same, n in ((True, need.equivalence), (False, need.detection)):
        shown = 0
        for _ in range(draws):
            mean = rng.normal(0.0 if same else 0.01, math.sqrt(0.10 / n))
            one, two = rng.normal(0, sd, (2, seeds))
            estimate = st.combine(
                mean + float(one.mean() - two.mean()),
                st.Variance(0.10 / n, n - 1),
                st.over_seeds(one, two, blocks=False),
            )
            shown += estimate.is_within(0.01) if same else estimate.low > 0
        assert shown / draws == pytest.approx(0.8, abs=0.025)


def test_plans_that_no_study_meets() -> None:
    assert questions_needed(0.001, 0.1, 0.006, 2).detection is None
    # Zero changes in few questions are no proof of equivalence.
    assert questions_needed(0.01, 1e-9, 0.0, 1).equivalence == 268
    # To differ by a point, one answer in a hundred must.
    assert (
        questions_needed(0.01, 1e-9, 0.0, 1).detection
        == questions_needed(0.01, 0.01, 0.0, 1).detection
    )

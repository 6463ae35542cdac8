"""Endpoints from the answers of two arms: accuracy, NLL, Brier score, letters, groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qlora_harness.compare import choices
from qlora_harness.compare import statistics as st
from qlora_harness.compare.arms import Arm
from qlora_harness.compare.choices import RunAnswers, stacked
from qlora_harness.compare.endpoint import SPECS, Spec, measured
from qlora_harness.compare.measures import Measure
from qlora_harness.compare.record import Chance, Detail, Endpoint, GroupDifference, Kind
from qlora_harness.compare.statistics import Floats
from qlora_harness.results.scored import Scored

Runs = Sequence[RunAnswers]
MOSTLY = 0.5  # a cause of more than this share of a difference is named
FEWEST_SUBJECTS = 10  # a standard error over fewer says little
_BY_SUBJECT = ("nll", "brier", "letter_centred")


class Design(NamedTuple):
    """Each question's subject, [n], the two-sided level, which arms have no seed, and weights [n].

    Weights None are all 1.
    """

    subjects: NDArray[np.intp]
    level: float
    fixed: tuple[bool, bool]
    weights: Floats | None = None


def scores(
    one: Runs, two: Runs, arms: tuple[Arm, Arm], task: str, level: float, margin: float
) -> list[Endpoint]:
    """Returns the endpoints from aligned answers of an arm (`one`) and its baseline (`two`).

    `margin` is the difference, a share, within which accuracies are the same.
    """
    credit = stacked(one, "credit"), stacked(two, "credit")
    spec = _accuracy_spec(arms[0].runs[0].scored[task], margin, credit)
    design = _design(one, arms, level)
    endpoints = [paired("accuracy", *credit, design, spec, counts=_are_counts(one, two))]
    if design.subjects.max() > 0:
        endpoints.append(_macro(*credit, design, spec))
    if one[0].has_choices:
        for key in ("nll", "brier"):
            endpoints.append(paired(key, stacked(one, key), stacked(two, key), design))
    if all(run.alike for run in (*one, *two)):
        spec = SPECS["letter_centred"]._replace(margin=margin)
        values = stacked(one, "centred"), stacked(two, "centred")
        endpoints.append(paired("letter_centred", *values, design, spec))
    return endpoints


def benchmark(
    measure: Measure, arms: tuple[Arm, Arm], level: float, margin: float
) -> Endpoint | None:
    """Returns the endpoint of a measure; None unless all runs of both arms have it."""
    labels = [[run.label for run in arm.runs] for arm in arms]
    if not all(label in measure.scored for part in labels for label in part):
        return None
    scored = measure.scored[labels[0][0]]
    if not all(label in measure.answers for part in labels for label in part):
        first, second = ([measure.scored[label] for label in part] for part in labels)
        return unpaired(measure.key, first, second, level, margin, name=measure.name)
    one, two = ([measure.answers[label] for label in part] for part in labels)
    credit = stacked(one, "credit"), stacked(two, "credit")
    spec = _accuracy_spec(scored, margin, credit)._replace(name=measure.name)
    counts = _are_counts(one, two)
    return paired(measure.key, *credit, _design(one, arms, level), spec, counts=counts)


def _design(runs: Runs, arms: tuple[Arm, Arm], level: float) -> Design:
    weights = runs[0].weight
    fixed = not arms[0].tuned, not arms[1].tuned
    return Design(runs[0].subjects, level, fixed, None if (weights == 1).all() else weights)


def _are_counts(one: Runs, two: Runs) -> bool:
    return all(run.counts for run in (*one, *two))


def _accuracy_spec(scored: Scored, margin: float, values: Sequence[Floats]) -> Spec:
    shares = all(part.min() >= 0 and part.max() <= 1 for part in values)
    return Spec(
        "accuracy" if scored.metric == "acc" else scored.metric,
        "share" if shares else "metric",
        margin if shares else None,
        not scored.higher_is_better,
    )


def paired(
    key: str,
    one: Floats,
    two: Floats,
    design: Design,
    spec: Spec | None = None,
    *,
    counts: bool = False,
) -> Endpoint:
    """Compares values by question, [seeds, n]; NLL and the like with errors by subject.

    With `counts`, each value is the credit for an answer that is right or wrong, 0 to 1.
    """
    change = one.mean(axis=0) - two.mean(axis=0)
    means = [np.average(part, axis=1, weights=design.weights) for part in (one, two)]
    difference, items = st.over_items(change, design.weights)
    clustered = _by_subject(change, design.subjects, design.weights)
    if counts and len(one) == len(two) == 1:
        estimate = st.paired_proportions(change, level=design.level)
    else:
        seeds = st.over_seeds(means[0], means[1], blocks=False, fixed=design.fixed)
        if counts:
            items = _never_zero(items, len(change))
        if key in _BY_SUBJECT and clustered is not None:
            items = clustered
        estimate = st.combine(difference, items, seeds, level=design.level)
    error = None if clustered is None else math.sqrt(clustered.value)
    return measured(key, (means[0], means[1]), estimate, spec=spec, n=len(change), clustered=error)


def _by_subject(
    values: Floats, subjects: NDArray[np.intp], weights: Floats | None = None
) -> st.Variance | None:
    """The variance of the mean, clustered by subject; None if there are too few subjects."""
    if subjects.max() < FEWEST_SUBJECTS - 1:
        return None
    return st.over_items(values, weights, clusters=subjects)[1]


def _never_zero(items: st.Variance, n: int) -> st.Variance:
    """Adds half a question to each cell (Agresti and Min): equal answers are no proof."""
    return st.Variance(items.value + 1 / n**2, items.freedom)


def _macro(one: Floats, two: Floats, design: Design, spec: Spec) -> Endpoint:
    sizes = np.bincount(design.subjects)
    values = [
        np.array([(np.bincount(design.subjects, weights=row) / sizes).mean() for row in part])
        for part in (one, two)
    ]
    difference, items = st.over_strata(one.mean(axis=0) - two.mean(axis=0), design.subjects)
    seeds = st.over_seeds(values[0], values[1], blocks=False, fixed=design.fixed)
    items = _never_zero(items, len(design.subjects))
    estimate = st.combine(difference, items, seeds, level=design.level)
    spec = spec._replace(name=f"macro {spec.name}")
    return measured("macro", (values[0], values[1]), estimate, spec=spec, n=len(sizes))


def unpaired(
    key: str,
    arm: Sequence[Scored],
    baseline: Sequence[Scored],
    level: float,
    margin: float,
    name: str | None = None,
) -> Endpoint:
    """Returns the difference of two accuracies, or the like, without their answers."""
    results = arm, baseline
    one, two = (np.array([result.value for result in part]) for part in results)
    errors = [[r.stderr for r in part if r.stderr is not None] for part in results]
    items = st.Variance(sum(max(part) ** 2 for part in errors), st.NORMAL) if all(errors) else None
    seeds = st.over_seeds(one, two, blocks=False)
    estimate = st.combine(float(one.mean() - two.mean()), items, seeds, level=level)
    spec = _accuracy_spec(arm[0], margin, (one, two))
    spec = spec if name is None else spec._replace(name=name)
    reason = "unpaired: no answers by question"
    return measured(key, (one, two), estimate, spec=spec, n=arm[0].n, reason=reason)


def chance(name: str, runs: Runs) -> Chance | None:
    """Tests whether an arm beats chance; None without the same choices in all questions."""
    if not runs or not all(run.alike for run in runs):
        return None
    centred = stacked(runs, "centred")
    values = centred.mean(axis=0)
    mean, items = st.over_items(values)
    items = _by_subject(values, runs[0].subjects) or items
    seeds = st.over_seeds(centred.mean(axis=1), np.zeros(1), blocks=False, fixed=(False, True))
    estimate = st.combine(mean, items, seeds)
    shown = estimate.p is not None and mean > 0 and estimate.p / 2 < st.LEVEL
    return Chance(arm=name, centred=mean, stderr=estimate.stderr or 0.0, at_chance=not shown)


def _mean_over(
    pairs: Sequence[tuple[RunAnswers, RunAnswers]], value: Callable[[RunAnswers, RunAnswers], float]
) -> float:
    return float(np.mean([value(run, other) for run, other in pairs]))


def _flips(run: RunAnswers, other: RunAnswers) -> float:
    return float((run.frame["choice"].to_numpy() != other.frame["choice"].to_numpy()).mean())


def _divergence(run: RunAnswers, reference: RunAnswers) -> float:
    return choices.divergence(reference.shares, run.shares)


def detail(one: Runs, two: Runs) -> Detail | None:
    """Returns more on the answers; None if the questions have no choices."""
    if not one[0].has_choices:
        return None
    parts = (one, two)
    answer = one[0].answer
    across = list(product(one, two))
    seeds = [pair for part in parts for pair in combinations(part, 2)]
    first, second = one[0].score > 0, two[0].score > 0
    won, lost = int((first & ~second).sum()), int((second & ~first).sum())
    errors = [
        float(np.mean([choices.calibration_error(run.shares, answer) for run in part]))
        for part in parts
    ]
    ties = [float(np.mean([(run.best > 0).sum(axis=1) > 1 for run in part])) for part in parts]
    mixes = [np.mean([run.best.mean(axis=0) for run in part], axis=0) for part in parts]
    right = np.bincount(answer, minlength=mixes[0].shape[0]) / len(answer)
    alike = all(run.alike for part in parts for run in part)
    score, credit = (
        np.mean(stacked(one, name)) - np.mean(stacked(two, name)) for name in ("score", "credit")
    )
    return Detail(
        flips=_mean_over(across, _flips),
        flips_floor=_mean_over(seeds, _flips) if seeds else None,
        divergence=_mean_over(across, _divergence),
        divergence_floor=_mean_over(seeds, _divergence) if seeds else None,
        calibration=(errors[0], errors[1]),
        letters=(mixes[0].tolist(), mixes[1].tolist()) if alike else None,
        explained=float((mixes[0] - mixes[1]) @ right) if alike else None,
        ties=(ties[0], ties[1]),
        tie_effect=float(score - credit),
        won=won,
        lost=lost,
    )


def mark_letters(endpoint: Endpoint, detail: Detail | None) -> Endpoint:
    """Returns an endpoint that notes if letters make most of an accuracy difference."""
    if endpoint.key != "accuracy" or detail is None or detail.explained is None:
        return endpoint
    shown = endpoint.word in ("better", "worse") and endpoint.difference
    letters = bool(shown) and detail.explained / (endpoint.difference or 1) > MOSTLY
    return endpoint.model_copy(update={"letters": letters})


def groups(one: Runs, two: Runs, category_of: Mapping[str, str]) -> list[GroupDifference]:
    """Returns the differences by category and by subject."""
    arm, baseline = (stacked(part, "credit").mean(axis=0) for part in (one, two))
    subjects = one[0].frame["subject"].astype(str)
    change = pd.DataFrame(
        {
            "arm": arm,
            "baseline": baseline,
            "change": arm - baseline,
            "square": (arm - baseline) ** 2,
        }
    )
    labels = {"category": subjects.map(dict(category_of)), "subject": subjects}
    differences: list[GroupDifference] = []
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        grouped = change.groupby(labels[kind])
        if len(grouped) < 2:
            continue
        sums, sizes = grouped.sum(), grouped.size().to_numpy().astype(np.float64)
        lost, won = st.pair_counts(sums["change"].to_numpy(), sums["square"].to_numpy())
        low, high = st.tango_interval(lost, won, sizes, st.LEVEL)
        numbers = (
            grouped[["arm", "baseline"]]
            .mean()
            .assign(
                n=sizes.astype(int),
                low=low,
                high=high,
                p=st.holm(st.no_difference(lost, won, sizes)),
            )
        )
        differences += [
            GroupDifference(kind=kind, name=str(name), **row)
            for name, row in numbers.to_dict("index").items()
        ]
    return differences

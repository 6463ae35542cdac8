"""What two arms answered: accuracies, probabilities of right answers, letters, groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from qlora_harness.compare import choices
from qlora_harness.compare import statistics as st
from qlora_harness.compare.arms import Arm
from qlora_harness.compare.endpoint import SPECS, Endpoint, Result, Spec, measured
from qlora_harness.results.answers import logprobs_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Frames = Sequence[pd.DataFrame]

_MOSTLY = 0.5  # of a difference, from which on its cause is named
_FEWEST_SUBJECTS = 10  # below which a standard error by subject says little


class Detail(Result):
    """What else the answers of two arms say; pairs are arm and baseline."""

    flips: float
    """Share of questions whose best choice differs, mean over pairs of runs."""
    flips_floor: float | None = None
    """The same between two seeds of one arm."""
    divergence: float
    """KL(baseline ‖ arm) of the choices, nats."""
    divergence_floor: float | None = None
    """The same between two seeds of one arm."""
    calibration: tuple[float, float]
    """Expected calibration error."""
    letters: tuple[list[float], list[float]] | None = None
    """How often each letter was chosen."""
    explained: float | None = None
    """Accuracy difference that the letter mixes alone would make, a share of the questions."""
    ties: tuple[float, float]
    """Share of questions with tied best choices."""
    tie_effect: float
    """Accuracy difference with the first tied choice counted, less that with fractions."""
    lost: int
    """Questions that only the baseline got right, first seeds."""
    won: int
    """Questions that only the arm got right, first seeds."""
    mcnemar_midp: float
    """Mid-p of McNemar's test of these."""


class GroupDifference(Result):
    """The accuracy of one subject or category, means over seeds."""

    kind: Literal["category", "subject"]
    """Which."""
    name: str
    """Of the group."""
    n: int
    """Questions."""
    arm: float
    """The arm's accuracy."""
    baseline: float
    """The baseline's."""
    low: float
    """95% interval of the difference over questions, uncorrected."""
    high: float
    """Upper end."""
    p: float
    """Two-sided, after Holm's correction over the groups of its kind."""


class Chance(Result):
    """Whether an arm's answers follow the questions at all."""

    arm: str
    """Its name."""
    centred: float
    """Letter-centred accuracy above that of its own letters, a share."""
    stderr: float
    """Its standard error over subjects, or questions where subjects are few, and seeds."""
    at_chance: bool
    """Whether it isn't shown to be above 0 (one-sided, 5%)."""


class Questions(NamedTuple):
    """What is compared: each question's subject, [n], the level, and which arms have no seed."""

    subjects: NDArray[np.intp]
    level: float
    fixed: tuple[bool, bool]


def scores(
    one: Frames, two: Frames, arms: tuple[Arm, Arm], task: str, level: float, margin: float
) -> list[Endpoint]:
    """Returns what the answers to the same questions say, arm less baseline.

    Args:
        one: The arm's answers, one frame a seed, aligned.
        two: The baseline's.
        arms: The arm and its baseline.
        task: What was scored.
        level: Two-sided, of the intervals.
        margin: Within which accuracies are the same, a share.
    """
    credits = [_table(part, lambda frame: frame["credit"].to_numpy()) for part in (one, two)]
    spec = _accuracy_spec(arms[0], task, margin, credits)
    asked = Questions(subject_codes(one[0]), level, (not arms[0].tuned, not arms[1].tuned))
    found = [paired("accuracy", credits, asked, spec, counts=spec.unit == "share")]
    if asked.subjects.max() > 0:
        found.append(_macro(credits, asked, spec))
    if not logprobs_of(one[0]).shape[1]:
        return found
    for key, values in (("nll", nll_of), ("brier", brier_of)):
        found.append(paired(key, [_table(part, values) for part in (one, two)], asked))
    centred = [centred_items(part) for part in (one, two)]
    if len(centred[0]) and len(centred[1]):
        spec = SPECS["letter_centred"]._replace(margin=margin)
        found.append(paired("letter_centred", centred, asked, spec))
    return found


def _accuracy_spec(arm: Arm, task: str, margin: float, credits: Sequence[Floats]) -> Spec:
    scored = arm.runs[0].scored[task]
    shares = all(c.min() >= 0 and c.max() <= 1 for c in credits)
    return Spec(
        "accuracy" if scored.metric == "acc" else scored.metric,
        "share" if shares else "metric",
        margin if shares else None,
        not scored.higher_is_better,
    )


def _table(frames: Frames, values: Callable[[pd.DataFrame], Floats]) -> Floats:
    return np.array([values(frame) for frame in frames])


def nll_of(frame: pd.DataFrame) -> Floats:
    """Returns the NLL of the right choice among the choices, nats, [n]."""
    return choices.nll_of(choices.probabilities(logprobs_of(frame)), frame["answer"].to_numpy())


def brier_of(frame: pd.DataFrame) -> Floats:
    """Returns the Brier score of the choices, [n]."""
    return choices.brier_of(choices.probabilities(logprobs_of(frame)), frame["answer"].to_numpy())


def subject_codes(frame: pd.DataFrame) -> NDArray[np.intp]:
    """Returns the number of each question's subject, in alphabetical order, [n]."""
    codes: NDArray[np.intp] = pd.factorize(frame["subject"].astype(str), sort=True)[0]
    return codes


def paired(
    key: str,
    tables: Sequence[Floats],
    asked: Questions,
    spec: Spec | None = None,
    *,
    counts: bool = False,
) -> Endpoint:
    """Compares a value a question and seed, [seeds, n]; all but accuracy with errors by subject."""
    one, two = tables
    differences = one.mean(axis=0) - two.mean(axis=0)
    difference, items = st.over_items(differences)
    groups = _by_subject(differences, asked.subjects)
    if counts and len(one) == len(two) == 1:
        estimate = st.paired_proportions(differences, level=asked.level)
    else:
        means = one.mean(axis=1), two.mean(axis=1)
        seeds = st.over_seeds(*means, blocks=False, fixed=asked.fixed)
        if counts:
            items = _never_zero(items, len(differences))
        over = items if key == "accuracy" or groups is None else groups
        estimate = st.combine(difference, over, seeds, level=asked.level)
    clustered = None if groups is None else math.sqrt(groups.value)
    return measured(key, (one, two), estimate, spec=spec, n=len(differences), clustered=clustered)


def _by_subject(values: Floats, subjects: NDArray[np.intp]) -> st.Variance | None:
    """The variance of their mean with questions of a subject depending on each other."""
    if subjects.max() < _FEWEST_SUBJECTS - 1:
        return None
    return st.over_items(values, clusters=subjects)[1]


def _never_zero(items: st.Variance, n: int) -> st.Variance:
    """Adds half a question to each cell, as Agresti and Min do: equal answers are no proof."""
    return st.Variance(items.value + 1 / n**2, items.freedom)


def _macro(tables: Sequence[Floats], asked: Questions, spec: Spec) -> Endpoint:
    sizes = np.bincount(asked.subjects)
    one, two = (
        np.array([(np.bincount(asked.subjects, weights=row) / sizes).mean() for row in table])
        for table in tables
    )
    change = tables[0].mean(axis=0) - tables[1].mean(axis=0)
    difference, items = st.over_strata(change, asked.subjects)
    seeds = st.over_seeds(one, two, blocks=False, fixed=asked.fixed)
    items = _never_zero(items, len(asked.subjects))
    estimate = st.combine(difference, items, seeds, level=asked.level)
    spec = spec._replace(name=f"macro {spec.name}")
    return measured("macro", (one, two), estimate, spec=spec, n=len(sizes))


def unpaired(arm: Arm, baseline: Arm, task: str, level: float, margin: float) -> Endpoint:
    """Returns the difference of two accuracies whose answers aren't recorded."""
    results = [[run.scored[task] for run in a.runs] for a in (arm, baseline)]
    one, two = (np.array([result.value for result in part]) for part in results)
    errors = [[r.stderr for r in part if r.stderr is not None] for part in results]
    estimate = st.unpaired(one, two, (errors[0], errors[1]), level)
    spec = _accuracy_spec(arm, task, margin, (one, two))
    reason = "unpaired: no answers by question"
    return measured("accuracy", (one, two), estimate, spec=spec, n=results[0][0].n, reason=reason)


def centred_items(frames: Frames) -> Floats:
    """Returns the letter-centred values of an arm's answers, [seeds, n].

    Empty where the questions have no choices, or not all the same number.
    """
    tables = [logprobs_of(frame) for frame in frames]
    if not all(table.shape[1] and np.isfinite(table).all() for table in tables):
        return np.zeros((0, 0))
    return _table(frames, lambda f: choices.letter_centred(logprobs_of(f), f["answer"].to_numpy()))


def chance(name: str, frames: Frames) -> Chance | None:
    """Tests whether an arm's answers follow the questions; None where that can't be told."""
    centred = centred_items(frames)
    if not len(centred):
        return None
    values = centred.mean(axis=0)
    mean, items = st.over_items(values)
    items = _by_subject(values, subject_codes(frames[0])) or items
    seeds = st.over_seeds(centred.mean(axis=1), np.zeros(1), blocks=False, fixed=(False, True))
    estimate = st.combine(mean, items, seeds)
    shown = estimate.p is not None and mean > 0 and estimate.p / 2 < st.LEVEL
    return Chance(arm=name, centred=mean, stderr=estimate.stderr or 0.0, at_chance=not shown)


def detail(one: Frames, two: Frames) -> Detail | None:
    """Returns what else the answers say; None where the questions have no choices."""
    answer = one[0]["answer"].to_numpy()
    tables = [[logprobs_of(f) for f in part] for part in (one, two)]
    if not tables[0][0].shape[1]:
        return None
    shares = [[choices.probabilities(t) for t in part] for part in tables]
    best = [[choices.best_choices(t) for t in part] for part in tables]
    picked = [[f["choice"].to_numpy() for f in part] for part in (one, two)]
    across = [((0, i), (1, j)) for i in range(len(one)) for j in range(len(two))]
    floor = [
        ((part, i), (part, j))
        for part, runs in enumerate((one, two))
        for i, j in combinations(range(len(runs)), 2)
    ]

    def flips(run: tuple[int, int], other: tuple[int, int]) -> float:
        return float((picked[run[0]][run[1]] != picked[other[0]][other[1]]).mean())

    def divergence(run: tuple[int, int], other: tuple[int, int]) -> float:
        return choices.divergence(shares[other[0]][other[1]], shares[run[0]][run[1]])

    scores = [np.mean(_table(part, lambda f: f["score"].to_numpy())) for part in (one, two)]
    credits = [np.mean(_table(part, lambda f: f["credit"].to_numpy())) for part in (one, two)]
    first, second = one[0]["score"].to_numpy() > 0, two[0]["score"].to_numpy() > 0
    won, lost = int((first & ~second).sum()), int((second & ~first).sum())
    errors = [float(np.mean([choices.calibration_error(s, answer) for s in p])) for p in shares]
    ties = [float(np.mean([(b > 0).sum(axis=1) > 1 for b in part])) for part in best]
    alike = all(np.isfinite(t).all() for part in tables for t in part)
    mixes = [np.mean([b.mean(axis=0) for b in part], axis=0) for part in best]
    right = np.bincount(answer, minlength=mixes[0].shape[0]) / len(answer)
    return Detail(
        flips=float(np.mean([flips(*pair) for pair in across])),
        flips_floor=float(np.mean([flips(*pair) for pair in floor])) if floor else None,
        divergence=float(np.mean([divergence(*pair) for pair in across])),
        divergence_floor=float(np.mean([divergence(*pair) for pair in floor])) if floor else None,
        calibration=(errors[0], errors[1]),
        letters=(mixes[0].tolist(), mixes[1].tolist()) if alike else None,
        explained=float((mixes[0] - mixes[1]) @ right) if alike else None,
        ties=(ties[0], ties[1]),
        tie_effect=float((scores[0] - scores[1]) - (credits[0] - credits[1])),
        won=won,
        lost=lost,
        mcnemar_midp=st.mcnemar_midp(lost, won),
    )


def mark_letters(endpoint: Endpoint, detail: Detail | None) -> Endpoint:
    """Returns an endpoint that says whether letters make most of a difference in accuracy."""
    if endpoint.key != "accuracy" or detail is None or detail.explained is None:
        return endpoint
    shown = endpoint.word in ("better", "worse") and endpoint.difference
    letters = bool(shown) and detail.explained / (endpoint.difference or 1) > _MOSTLY
    return endpoint.model_copy(update={"letters": letters})


def groups(one: Frames, two: Frames, category_of: Mapping[str, str]) -> list[GroupDifference]:
    """Returns categories and subjects, each with its interval; p corrected within their kind."""
    subjects = one[0]["subject"].astype(str)
    credits = [_table(part, lambda f: f["credit"].to_numpy()).mean(axis=0) for part in (one, two)]
    table = pd.DataFrame({"subject": subjects, "arm": credits[0], "baseline": credits[1]})
    table["difference"] = table["arm"] - table["baseline"]
    table["square"] = table["difference"] ** 2
    table["category"] = subjects.map(dict(category_of))
    found: list[GroupDifference] = []
    kinds: tuple[Literal["category", "subject"], ...] = ("category", "subject")
    for kind in kinds:
        grouped = table.groupby(kind)
        if len(grouped) < 2:
            continue
        means, sums = grouped.mean(numeric_only=True), grouped.sum(numeric_only=True)
        sizes = grouped.size().to_numpy().astype(np.float64)
        lost, won = st.pair_counts(sums["difference"].to_numpy(), sums["square"].to_numpy())
        low, high = st.tango_interval(lost, won, sizes, st.LEVEL)
        adjusted = st.holm(st.no_difference(lost, won, sizes))
        for place, (name, row) in enumerate(means.iterrows()):
            found.append(
                GroupDifference(
                    kind=kind, name=str(name), n=int(sizes[place]), arm=float(row["arm"]),
                    baseline=float(row["baseline"]), low=float(low[place]),
                    high=float(high[place]), p=float(adjusted[place]),
                )
            )  # fmt: skip
    return found

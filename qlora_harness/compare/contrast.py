"""`Contrast`: one arm against its baseline on every endpoint that the records have."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from qlora_harness.compare import scores as sc
from qlora_harness.compare import statistics as st
from qlora_harness.compare.arms import Arm
from qlora_harness.compare.costs import costs
from qlora_harness.compare.endpoint import Endpoint, Result
from qlora_harness.results.answers import logprobs_of


class Contrast(Result):
    """One arm against its baseline."""

    arm: str
    """Name of the arm."""
    baseline: str
    """Name of the baseline."""
    primary: bool
    """Whether it is the question that was asked."""
    seeds: tuple[int, int]
    """Runs of arm and baseline."""
    paired: bool
    """Whether answers were paired question by question."""
    endpoints: dict[str, Endpoint]
    """By key."""
    detail: sc.Detail | None = None
    """Of the answers, where the task has choices."""
    groups: list[sc.GroupDifference] = []
    """Subjects and categories."""

    def __getitem__(self, key: str) -> Endpoint:
        """Returns an endpoint by its key."""
        return self.endpoints[key]


def contrast(
    arm: Arm,
    baseline: Arm,
    answers: Mapping[str, pd.DataFrame],
    task: str | None,
    *,
    margin: float,
    tests: int = 1,
    primary: bool = True,
) -> Contrast:
    """Compares an arm with its baseline.

    Args:
        arm: The arm.
        baseline: What it is compared with.
        answers: Of each run by label, aligned; without runs whose answers aren't recorded.
        task: What was scored, or None.
        margin: Within which accuracies are the same, a share.
        tests: Primary arms of the comparison; intervals hold for all of them together.
        primary: Whether this is one of them.
    """
    level = st.LEVEL / (tests if primary else 1)
    endpoints = costs(arm, baseline, level)
    detail, groups = None, []
    runs = [*arm.runs, *baseline.runs]
    paired = task is not None and all(run.label in answers for run in runs)
    if task is not None and paired:
        one, two = ([answers[run.label] for run in a.runs] for a in (arm, baseline))
        endpoints += sc.scores(one, two, (arm, baseline), task, level, margin)
        if any((e.key, e.unit) == ("accuracy", "share") for e in endpoints):
            groups = sc.groups(one, two, arm.runs[0].scored[task].category_of)
        detail = sc.detail(one, two)
        endpoints = [sc.mark_letters(endpoint, detail) for endpoint in endpoints]
    elif task is not None and all(task in run.scored for run in runs):
        endpoints.append(sc.unpaired(arm, baseline, task, level, margin))
    if primary and tests > 1:  # Bonferroni's correction, which the intervals have as well
        endpoints = [
            one if one.p is None else one.model_copy(update={"p": min(1.0, tests * one.p)})
            for one in endpoints
        ]
    return Contrast(
        arm=arm.name,
        baseline=baseline.name,
        primary=primary,
        seeds=(len(arm.runs), len(baseline.runs)),
        paired=paired,
        endpoints={endpoint.key: endpoint for endpoint in endpoints},
        detail=detail,
        groups=groups,
    )


def interaction(
    tuned4: Arm, base4: Arm, tuned: Arm, base: Arm, answers: Mapping[str, pd.DataFrame]
) -> Contrast:
    """Returns how much more training gains in 4 bits: (tuned4 - base4) - (tuned - base)."""
    frames = [[answers[run.label] for run in arm.runs] for arm in (tuned4, base4, tuned, base)]
    endpoints = {}
    for key, values in (("accuracy", lambda f: f["credit"].to_numpy()), ("nll", sc.nll_of)):
        if key == "nll" and not logprobs_of(frames[0][0]).shape[1]:
            continue
        high4, low4, high, low = (np.array([values(f) for f in part]) for part in frames)
        gains = (high4 - low4.mean(axis=0), high - low.mean(axis=0))
        asked = sc.Questions(sc.subject_codes(frames[0][0]), st.LEVEL, (False, False))
        endpoints[key] = sc.paired(key, gains, asked)
    return Contrast(
        arm=f"gain in {tuned4.name}",
        baseline=f"gain in {tuned.name}",
        primary=False,
        seeds=(len(tuned4.runs), len(tuned.runs)),
        paired=True,
        endpoints=endpoints,
    )

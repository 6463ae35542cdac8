"""One arm against its baseline on every endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_harness.compare import scores as sc
from qlora_harness.compare import statistics as st
from qlora_harness.compare.arms import Arm
from qlora_harness.compare.choices import RunAnswers
from qlora_harness.compare.costs import costs
from qlora_harness.compare.measures import Measure
from qlora_harness.compare.record import Contrast

Answers = Mapping[str, RunAnswers]


def answers_of(arm: Arm, answers: Answers) -> list[RunAnswers]:
    """Returns the answers of an arm's runs that have them recorded."""
    return [answers[run.label] for run in arm.runs if run.label in answers]


def contrast(
    arm: Arm,
    baseline: Arm,
    answers: Answers,
    task: str | None,
    *,
    margin: float,
    measures: Sequence[Measure] = (),
    tests: int = 1,
    primary: bool = False,
) -> Contrast:
    """Compares an arm with its baseline on a task, and on other measures.

    `answers` are aligned, by label; `margin` is a share; intervals hold for `tests` contrasts.
    """
    level = st.LEVEL / tests
    endpoints = costs(arm, baseline, level)
    detail, groups = None, []
    runs = [*arm.runs, *baseline.runs]
    paired = task is not None and all(run.label in answers for run in runs)
    if task is not None and paired:
        one, two = answers_of(arm, answers), answers_of(baseline, answers)
        endpoints += sc.scores(one, two, (arm, baseline), task, level, margin)
        if any((e.key, e.unit) == ("accuracy", "share") for e in endpoints):
            groups = sc.groups(one, two, arm.runs[0].scored[task].category_of)
        detail = sc.detail(one, two)
        endpoints = [sc.mark_letters(endpoint, detail) for endpoint in endpoints]
    elif task is not None and all(task in run.scored for run in runs):
        first, second = ([run.scored[task] for run in part.runs] for part in (arm, baseline))
        endpoints.append(sc.unpaired("accuracy", first, second, level, margin))
    others = [sc.benchmark(one, (arm, baseline), level, margin) for one in measures]
    endpoints += [one for one in others if one is not None]
    if tests > 1:  # Bonferroni's correction, as in the intervals
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

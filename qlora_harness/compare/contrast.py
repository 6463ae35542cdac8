"""One arm against its baseline on every endpoint, and what training gains in 4 and 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_harness.compare import scores as sc
from qlora_harness.compare import statistics as st
from qlora_harness.compare.arms import Arm
from qlora_harness.compare.choices import RunAnswers, stacked
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

    `answers` are the aligned ones by label of the run. Accuracies within `margin`, a share, count
    as the same. `tests` is the number of contrasts for which intervals and p-values hold
    together.
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


def effects(
    arms: Sequence[Arm], answers: Answers, task: str | None, margin: float
) -> list[Contrast]:
    """Returns what training gains in 16 and in 4 bits, and the interaction.

    Empty unless there is exactly one base and one adapter of each, all with recorded answers.
    """
    by_kind: dict[tuple[bool, bool], list[Arm]] = {}
    for arm in arms:
        if arm.quant is not None:
            by_kind.setdefault((arm.quant != "bf16", arm.tuned), []).append(arm)
    if task is None or sorted(map(len, by_kind.values())) != [1, 1, 1, 1]:
        return []
    four = [by_kind[key][0] for key in ((False, False), (True, False), (False, True), (True, True))]
    runs = [run for arm in four for run in arm.runs]
    if any(run.label not in answers for run in runs) or len({run.model for run in runs}) > 1:
        return []
    base, base4, tuned, tuned4 = four
    gains = [
        contrast(a, b, answers, task, margin=margin) for a, b in ((tuned, base), (tuned4, base4))
    ]
    return [*gains, _interaction(tuned4, base4, tuned, base, answers)]


def _interaction(tuned4: Arm, base4: Arm, tuned: Arm, base: Arm, answers: Answers) -> Contrast:
    """How much more training gains in 4 bits: (tuned4 - base4) - (tuned - base)."""
    runs = [answers_of(arm, answers) for arm in (tuned4, base4, tuned, base)]
    design = sc.Design(runs[0][0].subjects, st.LEVEL, (False, False))
    endpoints = {}
    for key, name in (("accuracy", "credit"), ("nll", "nll")):
        if key == "accuracy" or runs[0][0].has_choices:
            high4, low4, high, low = (stacked(part, name) for part in runs)
            gains = (high4 - low4.mean(axis=0), high - low.mean(axis=0))
            endpoints[key] = sc.paired(key, *gains, design)
    return Contrast(
        arm=f"gain in {tuned4.name}",
        baseline=f"gain in {tuned.name}",
        primary=False,
        seeds=(len(tuned4.runs), len(tuned.runs)),
        paired=True,
        endpoints=endpoints,
    )

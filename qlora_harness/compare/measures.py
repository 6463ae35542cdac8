"""What is compared besides the first metric of the first task: other metrics, other tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from qlora_harness.compare import checks
from qlora_harness.compare.choices import RunAnswers
from qlora_harness.errors import ComparisonError, ResultsError
from qlora_harness.results.answers import align, read_answers
from qlora_harness.results.lm_eval_files import other_metrics
from qlora_harness.results.runs import Run
from qlora_harness.results.scored import Scored


@dataclass(frozen=True)
class Measure:
    """One metric of a task, with the results and the aligned answers of runs by label.

    The key of its endpoint is the task, unless it is another metric than the task's usual one.
    """

    key: str
    scored: Mapping[str, Scored]
    answers: Mapping[str, RunAnswers]

    @property
    def is_usual(self) -> bool:
        """Whether it is the usual metric of a task."""
        return all(one.task == self.key for one in self.scored.values())

    @property
    def name(self) -> str:
        """Task, metric and filter."""
        one = next(iter(self.scored.values()))
        return f"{one.task} {one.metric}{'' if one.filter == 'none' else f' ({one.filter})'}"


@dataclass(frozen=True)
class Permissions:
    """What the user allows to compare."""

    limit: bool
    intersect: bool


def results_on(runs: Sequence[Run], task: str | None) -> dict[str, Scored]:
    """Returns the result of each scored run; raises ComparisonError if two runs are one file."""
    scored = {
        run.label: run.scored[task] for run in runs if task is not None and task in run.scored
    }
    for (label, one), (name, other) in combinations(scored.items(), 2):
        if one.path.resolve() == other.path.resolve():
            raise ComparisonError(f"{label} and {name} are both {other.path}", "Name it once")
    return scored


def aligned_answers(
    scored: Mapping[str, Scored], allowed: Permissions, notes: list[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, int]]:
    """Returns the aligned answers of each run, and how many were dropped; adds to the notes.

    Raises ComparisonError if the runs answered different questions or not all of them.
    """
    notes += checks.check_limit(scored, allowed.limit, allowed.intersect)
    read = {label: read_answers(result) for label, result in scored.items()}
    frames = {label: frame for label, frame in read.items() if frame is not None}
    notes += checks.check_results(scored, list(frames), allowed.intersect)
    dropped: dict[str, int] = {}
    if len(frames) > 1:
        frames, dropped = align(frames, intersect=allowed.intersect)
    if any(dropped.values()):
        counts = ", ".join(f"{count:,} of {label}" for label, count in dropped.items() if count)
        notes.append(f"Compared on the questions that all runs answered; left out: {counts}.")
    return frames, dropped


def other_measures(
    runs: Sequence[Run],
    first: Mapping[str, Scored],
    allowed: Permissions,
    notes: list[str],
) -> list[Measure]:
    """Returns what two or more runs have beside `first`; a note says what can't be compared."""
    measures = []
    task = next((one.task for one in first.values()), None)
    for name in dict.fromkeys(name for run in runs for name in (task, *run.tasks) if name):
        if sum(name in run.scored for run in runs) < 2:
            continue
        key = name
        try:
            usual = None if name == task else results_on(runs, name)
            for key, scored in _metrics(name, usual, first):
                own: list[str] = []
                frames, _ = aligned_answers(scored, allowed, own)
                answers = {label: RunAnswers(frame) for label, frame in frames.items()}
                measures.append(Measure(key, scored, answers))
                if key == name:
                    notes += [f"{name}: {note}" for note in own]
        except (ComparisonError, ResultsError) as error:
            notes.append(f"{key} is not compared: {error.problem.rstrip('.')}.")
    return measures


def _metrics(
    task: str, usual: Mapping[str, Scored] | None, first: Mapping[str, Scored]
) -> Iterator[tuple[str, Mapping[str, Scored]]]:
    """The results of all runs by metric; without `usual` those beside `first`."""
    if usual is not None:
        yield task, usual
    others = [(label, other_metrics(one)) for label, one in (usual or first).items()]
    for metric in others[0][1]:
        if all(metric in other for _, other in others):
            yield f"{task} {metric}", {label: other[metric] for label, other in others}

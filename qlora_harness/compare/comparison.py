"""`compare`: from the paths of runs to a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from qlora_harness.compare import checks, page, text
from qlora_harness.compare.arms import by_dose, double_quant, group, pair
from qlora_harness.compare.choices import RunAnswers
from qlora_harness.compare.contrast import answers_of, contrast
from qlora_harness.compare.loss_curve import loss_curves
from qlora_harness.compare.measures import (
    Permissions,
    aligned_answers,
    other_measures,
    results_on,
)
from qlora_harness.compare.record import ComparisonRecord, RunInfo, Setting, Source
from qlora_harness.compare.scores import chance
from qlora_harness.compare.verdict import verdict
from qlora_harness.errors import ComparisonError, SettingsError
from qlora_harness.record import now, scrub, scrub_all
from qlora_harness.results.runs import Run, default_labels, load_run
from qlora_harness.results.scored import Scored

DEFAULT_MARGIN = 0.01


class Comparison(ComparisonRecord):
    """The result of `compare`; print it, or let a notebook show it."""

    @property
    def verdict(self) -> str:
        """The answer in sentences."""
        return verdict(self)

    def to_frame(self) -> pd.DataFrame:
        """Returns a row for each endpoint of each contrast."""
        return pd.DataFrame(
            [
                {"contrast": f"{item.arm} vs {item.baseline}", **endpoint.model_dump()}
                for item in self.contrasts
                for endpoint in item.endpoints.values()
            ]
        )

    def answers(self) -> pd.DataFrame:
        """Returns a row for each answer: run, arm, seed, task, subject, item, score and others."""
        info = {run.label: run for run in self.runs}
        parts = [
            frame.assign(run=label, arm=info[label].arm, seed=info[label].seed, task=self.task)
            for label, frame in self.source.frames.items()
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def __str__(self) -> str:
        """Returns the answer as the terminal shows it."""
        return text.answer(self)

    def _repr_html_(self) -> str:
        return page.head(self)


def compare(
    runs: Sequence[str | Path],
    *,
    baseline: str | None = None,
    task: str | None = None,
    metric: str | None = None,
    margin: float = DEFAULT_MARGIN,
    allow_limit: bool = False,
    allow_different_data: bool = False,
    intersect: bool = False,
) -> Comparison:
    """Compares runs from their files.

    Args:
        runs: Two or more run folders, results_*.json of lm_eval, or folders of those.
        baseline: Arm or run that all others are compared with; by default bf16.
        task: The one to compare first; by default mmlu_qlora_5shot, or another that all have.
        metric: Metric of other tasks, for example "acc_norm" or "exact_match,flexible-extract".
        margin: Accuracies within this share of the questions count as the same.
        allow_limit: Whether runs with the same --limit may be compared.
        allow_different_data: Whether runs on different data may be compared.
        intersect: Whether only the questions that all runs answered are compared.

    Raises:
        SettingsError: There is no such baseline, or the margin is no share.
        ResultsError: A file is unreadable, foreign, incomplete or contradicts another one.
        ComparisonError: The runs were not made under conditions that allow a comparison.

    Example:
        >>> import qlora_harness as qh
        >>> folder = "results/published/smollm2"
        >>> result = qh.compare([f"{folder}/4bit", f"{folder}/16bit"])
        >>> result.contrasts[0]["eval_loss"].word
        'worse'
    """
    if not 0 < margin < 1:
        raise SettingsError(f"margin {margin:g}", "Give a share above 0 and below 1")
    loaded = _load([Path(run) for run in runs], None)
    checks.check_substance(loaded)
    notes = checks.check_data(loaded, allow_different_data)
    task = checks.choose_task(loaded, task)
    allowed = Permissions(allow_limit, intersect)
    named = loaded if metric is None else _load([run.path for run in loaded], metric)
    scored = results_on(named, task)
    frames, dropped = aligned_answers(scored, allowed, notes)
    measures = other_measures(loaded, scored, allowed, notes)
    benchmarks = [one.key for one in measures if one.is_usual]
    loaded = [_on(run, scored.get(run.label), benchmarks) for run in loaded]
    arms = group(loaded)
    primary, secondary = map(by_dose, pair(arms, baseline))
    answers = {label: RunAnswers(frame) for label, frame in frames.items()}
    contrasts = [
        contrast(
            *(a, b, answers, task),
            margin=margin,
            measures=measures,
            tests=tests,
            primary=pairs is primary,
        )
        for pairs, tests in ((primary, len(primary)), (secondary, 1))
        for a, b in pairs
    ]
    arm_of = {run.label: arm.name for arm in arms for run in arm.runs}
    different, same = checks.differing(loaded, task)
    leading = [arm for arm in arms if any(arm in both for both in primary)]
    first = next(iter(scored.values()), None)
    sizes = [len(frame) for frame in frames.values()] or [s.n for s in scored.values()]
    chances = [chance(arm.name, answers_of(arm, answers)) for arm in arms]
    notes += checks.notes_on(loaded, task, frames)
    comparison = Comparison(
        created=now(),
        task=task,
        metric=None if first is None else first.metric,
        questions=sizes[0] if len(scored) > 1 else None,
        dropped=dropped,
        model=_common([run.model for run in loaded]),
        dataset=_common([run.training.data.dataset for run in loaded if run.training]),
        margin=margin,
        benchmarks=benchmarks,
        runs=[_info(run, arm_of[run.label], task, run.label in frames) for run in loaded],
        arms=[arm.name for arm in arms],
        contrasts=contrasts,
        chance=[result for result in chances if result is not None],
        curves=loss_curves(arms),
        besides=checks.besides_quantisation(leading, task),
        different=[Setting(**scrub_all(item.model_dump())) for item in different],
        same=[Setting(**scrub_all(item.model_dump())) for item in same],
        notes=[scrub(note) for note in notes],
    )
    comparison.attach(Source(loaded, frames))
    return comparison


def _load(paths: list[Path], metric: str | None) -> list[Run]:
    if len(paths) < 2:
        number = f"only {paths[0]}" if paths else "none"
        raise ComparisonError(
            f"a comparison needs two or more runs, and there is {number}",
            "Name them, for example qlora-harness compare results/4bit results/16bit",
        )
    for path, other in combinations(paths, 2):
        if path.resolve() == other.resolve():
            raise ComparisonError(f"the run {other} is named twice", "Name two different runs")
    # Folder names may hold any byte.
    names = [name.encode(errors="backslashreplace").decode() for name in default_labels(paths)]
    names = [" ".join(name.split()) for name in names]
    if len(set(names)) < len(names):  # they differ in white space
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return [load_run(p, label=n, metric=metric) for p, n in zip(paths, names, strict=True)]


def _on(run: Run, first: Scored | None, benchmarks: Sequence[str]) -> Run:
    """A run with its result on the first task, and with those on other tasks."""
    results = {} if first is None else {first.task: first}
    return replace(run, scored={**results, **run.on(*benchmarks).scored})


def _common(values: Sequence[str | None]) -> str | None:
    known = {value for value in values if value is not None}
    return scrub(" ".join(known.pop().split())) if len(known) == 1 else None


def _info(run: Run, arm: str, task: str | None, answers: bool) -> RunInfo:
    training, scored = run.training, run.scored.get(str(task))
    device: Any = (training.environment.device or {}).get("name") if training else None
    return RunInfo(
        label=run.label,
        path=scrub(str(run.path).encode(errors="backslashreplace").decode()),
        arm=arm,
        seed=run.seed,
        model=None if run.model is None else scrub(run.model),
        quant=run.quant,
        double_quant=double_quant(run),
        device=device if isinstance(device, str) else None,
        status=training.status if training else None,
        peak_bytes=training.peak_bytes if training else None,
        train_seconds=training.runtime.train_seconds if training else None,
        eval_loss=training.results.eval_loss if training else None,
        perplexity=training.results.perplexity if training else None,
        value=scored.value if scored else None,
        stderr=scored.stderr if scored else None,
        answers=answers,
        benchmarks={name: one.value for name, one in run.scored.items() if name != task},
    )

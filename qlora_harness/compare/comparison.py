"""`compare`: from the paths of runs to a Comparison, which every renderer reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, PrivateAttr

from qlora_harness.compare import checks
from qlora_harness.compare.arms import Arm, group, pair
from qlora_harness.compare.contrast import Contrast, contrast, interaction
from qlora_harness.compare.scores import Chance, chance
from qlora_harness.errors import ComparisonError, SettingsError
from qlora_harness.record import now, scrub, scrub_all
from qlora_harness.results.answers import align
from qlora_harness.results.runs import Run, default_labels, load_run

DEFAULT_MARGIN = 0.01


class RunInfo(BaseModel):
    """One run, in short."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    label: str
    """Its name."""
    path: str
    """As named, without the home folder."""
    arm: str
    """The arm that it belongs to."""
    seed: int | None
    """Of its training."""
    model: str | None
    """Base model."""
    quant: str | None
    """nf4, fp4, bf16 or another."""
    device: str | None
    """That it was trained on."""
    status: str | None
    """Of its training."""
    peak_bytes: float | None
    """Peak memory."""
    train_seconds: float | None
    """Training time."""
    eval_loss: float | None
    """Nats per token."""
    perplexity: float | None
    """exp(eval_loss)."""
    value: float | None
    """The metric as recorded."""
    stderr: float | None
    """Its standard error as recorded."""
    answers: bool
    """Whether its answers are known question by question."""


class Comparison(BaseModel):
    """What `compare` found; comparison.json holds exactly this."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    schema_version: Literal[2] = 2
    """Of this record."""
    kind: Literal["comparison"] = "comparison"
    """What the file is."""
    created: str
    """ISO 8601."""
    task: str | None
    """What was scored."""
    metric: str | None
    """And how."""
    questions: int | None
    """Compared questions."""
    dropped: dict[str, int]
    """With --intersect, questions of each run that others had not answered."""
    model: str | None
    """The base model, where all runs have one."""
    dataset: str | None
    """The training data, where all runs have one."""
    margin: float
    """Of equivalence, a share of the questions."""
    runs: list[RunInfo]
    """In the order given."""
    arms: list[str]
    """Names."""
    contrasts: list[Contrast]
    """Primary ones first."""
    effects: list[Contrast] = []
    """Base and adapter in 4 and 16 bits: what training gains, and the interaction."""
    chance: list[Chance]
    """One an arm."""
    besides: list[str]
    """What differs besides quantisation and seed."""
    different: list[checks.Setting]
    """Recorded settings that differ."""
    same: list[checks.Setting]
    """Recorded settings that agree."""
    notes: list[str]
    """What a reader has to know."""

    _runs: list[Run] = PrivateAttr(default_factory=list)
    _answers: dict[str, pd.DataFrame] = PrivateAttr(default_factory=dict)

    @property
    def primary(self) -> list[Contrast]:
        """The contrasts that answer the question."""
        return [item for item in self.contrasts if item.primary]

    @property
    def verdict(self) -> str:
        """The answer in sentences."""
        from qlora_harness.compare.verdict import verdict

        return verdict(self)

    def to_frame(self) -> pd.DataFrame:
        """Returns one row for each endpoint of each contrast."""
        return pd.DataFrame(
            [
                {"contrast": f"{item.arm} vs {item.baseline}", **endpoint.model_dump()}
                for item in (*self.contrasts, *self.effects)
                for endpoint in item.endpoints.values()
            ]
        )

    def answers(self) -> pd.DataFrame:
        """Returns every answer as a row: run, arm, seed, task, subject, item and the rest."""
        info = {run.label: run for run in self.runs}
        parts = [
            frame.assign(run=label, arm=info[label].arm, seed=info[label].seed, task=self.task)
            for label, frame in self._answers.items()
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def __str__(self) -> str:
        """Returns the answer as the terminal shows it."""
        from qlora_harness.compare.text import answer

        return answer(self)

    def _repr_html_(self) -> str:
        from qlora_harness.compare.page import head

        return head(self)


def compare(
    runs: Sequence[str | Path],
    *,
    labels: Sequence[str] | None = None,
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
        runs: Two or more: a run folder, a results_*.json of lm_eval, or a folder of those.
        labels: Their names; by default as much of the path as tells them apart.
        baseline: Arm or run that all others are compared with; by default bf16.
        task: By default mmlu_qlora_5shot, or the only task that all have.
        metric: Of other tasks, for example "acc_norm" or "exact_match,flexible-extract".
        margin: Within which accuracies count as the same, a share of the questions.
        allow_limit: Whether runs with the same --limit may be compared.
        allow_different_data: Whether runs on different data may be compared.
        intersect: Whether only the questions that all runs answered are compared.

    Raises:
        SettingsError: The labels don't fit the runs, or the baseline is none of them.
        ResultsError: A file is unreadable, foreign, incomplete or contradicts another one.
        ComparisonError: The runs were not made under conditions that allow a comparison.

    Example:
        >>> import qlora_harness as qh
        >>> folder = "results/published/smollm2"
        >>> result = qh.compare([f"{folder}/4bit", f"{folder}/16bit"])
        >>> result.contrasts[0]["eval_loss"].word
        'worse'
    """
    paths = [Path(run) for run in runs]
    _check_paths(paths)
    if not 0 < margin < 1:
        raise SettingsError(f"margin {margin:g}", "Give a share above 0 and below 1")
    names = default_labels(paths) if labels is None else _checked_labels(labels, len(paths))
    # A folder's name may hold any byte.
    names = [" ".join(name.encode(errors="backslashreplace").decode().split()) for name in names]
    loaded = [load_run(p, label=n, metric=metric) for p, n in zip(paths, names, strict=True)]
    checks.check_substance(loaded)
    notes = checks.check_data(loaded, allow_different_data)
    task = checks.choose_task(loaded, task)
    loaded = [run.on(task) for run in loaded]
    _check_sources(loaded)
    scored = {run.label: run.scored[task] for run in loaded if task in run.scored} if task else {}
    notes += checks.check_limit(scored, allow_limit, intersect)
    frames = {}
    for run in loaded:
        if run.label in scored and (frame := run.answers(str(task))) is not None:
            frames[run.label] = frame
    notes += checks.check_results(scored, list(frames), intersect)
    dropped: dict[str, int] = {}
    if len(frames) > 1:
        frames, dropped = align(frames, intersect=intersect)
    if any(dropped.values()):
        counts = ", ".join(f"{count:,} of {label}" for label, count in dropped.items() if count)
        notes.append(f"Compared on the questions that all answered; left out: {counts}.")
    arms = group(loaded, labelled=labels is not None)
    plan = pair(arms, baseline)
    contrasts = [
        contrast(a, b, frames, task, margin=margin, tests=len(plan.primary), primary=primary)
        for pairs, primary in ((plan.primary, True), (plan.secondary, False))
        for a, b in pairs
    ]
    arm_of = {run.label: arm.name for arm in arms for run in arm.runs}
    different, same = checks.differing(loaded, task)
    leading = [arm for arm in arms if any(arm in p for p in plan.primary)]
    first = next(iter(scored.values()), None)
    sizes = [len(frame) for frame in frames.values()] or [s.n for s in scored.values()]
    comparison = Comparison(
        created=now(),
        task=task,
        metric=None if first is None else first.metric,
        questions=sizes[0] if len(scored) > 1 else None,
        dropped=dropped,
        model=_common([run.model for run in loaded]),
        dataset=_common([run.training.data.dataset for run in loaded if run.training]),
        margin=margin,
        runs=[_info(run, arm_of[run.label], task, run.label in frames) for run in loaded],
        arms=[arm.name for arm in arms],
        contrasts=contrasts,
        effects=_effects(arms, frames, task, margin),
        chance=_chances(arms, frames),
        besides=checks.besides_quantisation(leading, task),
        different=[checks.Setting(**scrub_all(item.model_dump())) for item in different],
        same=[checks.Setting(**scrub_all(item.model_dump())) for item in same],
        notes=[scrub(note) for note in [*notes, *checks.notes_on(loaded, task, frames)]],
    )
    comparison._runs, comparison._answers = loaded, frames
    return comparison


def _check_paths(paths: Sequence[Path]) -> None:
    if len(paths) < 2:
        there = f"only {paths[0]}" if paths else "none"
        raise ComparisonError(
            f"a comparison needs two or more runs, and there is {there}",
            "Name them, for example qlora-harness compare results/4bit results/16bit",
        )
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ComparisonError(f"the run {path} is named twice", "Name two different runs")
        seen.add(path.resolve())


def _check_sources(runs: Sequence[Run]) -> None:
    """Refuses a result that is named twice, for example by its folder and by its file."""
    seen: dict[Path, str] = {}
    for run in runs:
        for scored in run.scored.values():
            path = scored.path.resolve()
            if path in seen:
                raise ComparisonError(
                    f"{seen[path]} and {run.label} are both {scored.path}", "Name it once"
                )
            seen[path] = run.label


def _checked_labels(labels: Sequence[str], runs: int) -> list[str]:
    names = [" ".join(label.split()) for label in labels]
    if len(names) != runs or len(set(names)) < runs or not all(names):
        raise SettingsError(
            f"--labels {','.join(labels)}: {len(names)} names for {runs} runs, or one is empty or "
            "repeated",
            "Give one name for each run, separated by commas",
        )
    return names


def _common(values: Sequence[str | None]) -> str | None:
    known = {value for value in values if value is not None}
    return scrub(" ".join(known.pop().split())) if len(known) == 1 else None


def _chances(arms: Sequence[Arm], frames: dict[str, pd.DataFrame]) -> list[Chance]:
    found = []
    for arm in arms:
        mine = [frames[run.label] for run in arm.runs if run.label in frames]
        result = chance(arm.name, mine)
        if result is not None:
            found.append(result)
    return found


def _effects(
    arms: Sequence[Arm], frames: dict[str, pd.DataFrame], task: str | None, margin: float
) -> list[Contrast]:
    """What training gains in 4 and in 16 bits, and the interaction, where all four are there."""
    places: dict[tuple[bool, bool], list[Arm]] = {}
    for arm in arms:
        if arm.quant is not None:
            places.setdefault((arm.quant != "bf16", arm.tuned), []).append(arm)
    if task is None or len(places) < 4 or any(len(there) > 1 for there in places.values()):
        return []
    if any(run.label not in frames for there in places.values() for run in there[0].runs):
        return []
    base, base4, tuned, tuned4 = (
        places[key][0] for key in ((False, False), (True, False), (False, True), (True, True))
    )
    if len({run.model for arm in (base, base4, tuned, tuned4) for run in arm.runs}) > 1:
        return []
    gains = [
        contrast(a, b, frames, task, margin=margin, primary=False)
        for a, b in ((tuned, base), (tuned4, base4))
    ]
    return [*gains, interaction(tuned4, base4, tuned, base, frames)]


def _info(run: Run, arm: str, task: str | None, answers: bool) -> RunInfo:
    training, scored = run.training, run.scored.get(str(task))
    device: Any = (training.environment.device or {}).get("name") if training else None
    results = training.results if training else None
    return RunInfo(
        label=run.label,
        path=scrub(str(run.path).encode(errors="backslashreplace").decode()),
        arm=arm,
        seed=training.seed if training else None,
        model=None if run.model is None else scrub(run.model),
        quant=run.quant,
        device=device if isinstance(device, str) else None,
        status=training.status if training else None,
        peak_bytes=training.peak_bytes if training else None,
        train_seconds=training.runtime.train_seconds if training else None,
        eval_loss=results.eval_loss if results else None,
        perplexity=results.perplexity if results else None,
        value=None if scored is None else scored.value,
        stderr=None if scored is None else scored.stderr,
        answers=answers,
    )

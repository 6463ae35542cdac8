"""Whether runs may be compared, what differs between them, and notes for the reader."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NoReturn

from qlora_harness.compare.arms import Arm
from qlora_harness.compare.record import Setting
from qlora_harness.errors import ComparisonError
from qlora_harness.results.runs import Run
from qlora_harness.results.scored import DEFAULT_TASK, DEMO_TASK, Scored
from qlora_harness.settings import NOTABLE_SHARE

if TYPE_CHECKING:
    import pandas as pd

# Settings that only name the run, follow from others, or don't affect numbers.
_FOLLOWS = re.compile(
    r"\.(arm|output_dir|results_dir|peft|adapter_sha256|peft_sha|model_num_parameters|verify|"
    r"unquantised_share|settings\.model|gguf|environment\.device\.id|(parameter_dtypes|gguf|memory|plan)\..+)$"
)
# Settings in which arms and their seeds are meant to differ.
_INTENDED = ("quant", "double_quant", "seed", "expanded_once")
_NOTABLE_TIES = 0.001
_SAME_QUESTIONS = "Score all runs with the same task, data folder and template"
_INTERSECT = "--intersect to compare the questions that all runs answered"


def choose_task(runs: Sequence[Run], name: str | None) -> str | None:
    """Returns the task to compare first: the named one, or one that all scored runs have, or None.

    Raises ComparisonError if a run lacks the named task, or the runs have none in common.
    """
    if name is not None:
        for run in runs:
            if name not in run.scored:
                _refuse_task(runs, f"--task {name}: {run.path} has no such result")
        return name
    scored = [run for run in runs if run.scored]
    if not scored:
        return None
    # Parts of a group are compared only when named.
    common = [task for task in scored[0].tasks if all(task in run.tasks for run in scored)]
    if DEFAULT_TASK in common:
        return DEFAULT_TASK
    if common:
        return common[0]
    _refuse_task(runs, "the runs have no task in common")


def _refuse_task(runs: Sequence[Run], problem: str) -> NoReturn:
    tasks = "; ".join(f"{run.path}: {', '.join(run.tasks[:4]) or 'none'}" for run in runs[:4])
    raise ComparisonError(
        f"{problem} (scored tasks: {tasks})",
        "Score every run with the same task, or name one that all runs have with --task",
    )


def check_substance(runs: Sequence[Run]) -> None:
    """Raises ComparisonError unless two runs were trained or two were scored."""
    trained = sum(run.training is not None for run in runs)
    if trained < 2 and sum(bool(run.scored) for run in runs) < 2:
        kinds = "; ".join(f"{r.path}: {'training' if r.training else 'scores'} only" for r in runs)
        raise ComparisonError(
            f"the runs have no numbers of the same kind ({kinds})", "Score the trained run"
        )


def check_data(runs: Sequence[Run], allow_different: bool) -> list[str]:
    """Returns notes on data; raises ComparisonError for different data unless allowed."""
    notes = []
    for part in ("train", "eval"):
        splits = {r.label: getattr(r.training.data, part) for r in runs if r.training is not None}
        prints = {label: s.fingerprint for label, s in splits.items() if s and s.fingerprint}
        if len(set(prints.values())) < 2:
            continue
        values = ", ".join(f"{label} {_short_hash(value)}" for label, value in prints.items())
        if not allow_different:
            raise ComparisonError(
                f"different data: data.{part}.fingerprint is {values}",
                "Train on the same data, or pass --allow-different-data to compare them anyway",
            )
        notes.append(f"Different data (data.{part}.fingerprint: {values}).")
    return notes


def check_limit(scored: Mapping[str, Scored], allow: bool, intersect: bool) -> list[str]:
    """Returns a note on limited runs; ComparisonError if that isn't allowed or limits differ."""
    limited = [(label, item) for label, item in scored.items() if item.limited]
    if not limited:
        return []
    label, item = limited[0]
    part = f"{item.n:,} of {item.n_total:,} questions of {item.task}"
    if not allow and not intersect:
        raise ComparisonError(
            f"{label} answered only {part} (--limit or single subjects; {item.path})",
            "Score all questions, or pass --allow-limit if all runs have the same limit, or "
            f"{_INTERSECT}",
        )
    if not intersect and len({(other.n, other.n_total) for other in scored.values()}) > 1:
        counts = ", ".join(f"{name} {s.n:,} of {s.n_total:,}" for name, s in scored.items())
        raise ComparisonError(
            f"the runs have different limits: {counts}",
            f"Score all runs with the same --limit, or pass {_INTERSECT}",
        )
    return [f"Only {part} were answered: this is not a result on {item.task}."]


def check_results(
    scored: Mapping[str, Scored], paired: Sequence[str], intersect: bool
) -> list[str]:
    """Returns notes on runs that can't be paired by question; `paired` have recorded answers.

    Raises ComparisonError if metric, version, shots, prompts or numbers of questions differ.
    """
    labels, notes = list(scored), []
    for label in labels[1:]:
        first = labels[0]
        both = f"{first} and {label}"
        _check_same_task(both, scored[first], scored[label], intersect)
        if first in paired and label in paired:
            continue
        if intersect:
            raise ComparisonError(
                f"--intersect: which questions {both} answered is not recorded",
                "Score again with lm_eval --log_samples",
            )
        one, other = (
            {name: part.n for name, part in scored[run].subjects.items()} for run in (first, label)
        )
        if one != other:
            raise ComparisonError(
                f"{both} answered different questions: their subjects differ in number or size",
                f"{_SAME_QUESTIONS}; with logged samples of both, --intersect compares a part",
            )
        notes.append(
            f"{both} are compared unpaired, which is conservative: not all answers are recorded."
        )
    return notes


def _check_same_task(both: str, one: Scored, other: Scored, intersect: bool) -> None:
    facts: dict[str, tuple[object, object]] = {
        name: (version, other.versions.get(name, version)) for name, version in one.versions.items()
    }
    facts["higher_is_better"] = (one.higher_is_better, other.higher_is_better)
    if one.prompts_sha256 and other.prompts_sha256 and not intersect:
        hashes = _short_hash(one.prompts_sha256), _short_hash(other.prompts_sha256)
        facts["prompts_sha256"] = hashes
    if (one.metric, one.filter) != (other.metric, other.filter):
        raise ComparisonError(
            f"{both} have different metrics of {one.task}: {one.metric},{one.filter} and "
            f"{other.metric},{other.filter}",
            "Choose one that both have with --metric",
        )
    for name, (first, second) in facts.items():
        if first != second:
            raise ComparisonError(
                f"{both} answered different questions: {name} is {first} and {second}",
                _SAME_QUESTIONS,
            )


def differing(runs: Sequence[Run], task: str | None) -> tuple[list[Setting], list[Setting]]:
    """Returns the recorded settings that differ between runs, and those that agree."""
    conditions = [run.conditions(task) for run in runs]
    parts = [{name.partition(".")[0] for name in one} for one in conditions]
    different: list[Setting] = []
    same: list[Setting] = []
    seen: set[str] = set()
    for name in dict.fromkeys(name for one in conditions for name in one):
        recorded = [
            one.get(name)
            for one, known in zip(conditions, parts, strict=True)
            if name.partition(".")[0] in known
        ]
        if all(value == recorded[0] for value in recorded):
            repeated = not name.startswith(("training.", "evaluation."))
            if recorded[0] is not None and len(recorded) > 1 and not repeated:
                same.append(Setting(name=name, values=recorded[:1]))
            continue
        values = [one.get(name) for one in conditions]
        # Sections of a record repeat `quant` and others.
        echo = repr((name.rpartition(".")[2], values))
        if echo not in seen and not _FOLLOWS.search(name):
            different.append(Setting(name=name, values=values))
        seen.add(echo)
    return different, same


def besides_quantisation(arms: Sequence[Arm], task: str | None) -> list[str]:
    """Returns short names of what differs between arms besides quantisation and seed."""
    different, _ = differing([run for arm in arms for run in arm.runs], task)
    names = [_short_name(setting.name.split(".")) for setting in different]
    seeds = [set(arm.seeds) - {None} for arm in arms if arm.tuned]
    if not all(one <= other or other <= one for one, other in combinations(seeds, 2)):
        names.append("seeds")
    return [name for name in dict.fromkeys(names) if name not in _INTENDED]


def _short_name(parts: Sequence[str]) -> str:
    if "versions" in parts:
        return f"{parts[-1]} version"
    if parts[1] in ("data", "model"):
        return parts[-1] if parts[-1] in _INTENDED else parts[1]
    return "environment" if parts[1] == "environment" else parts[-1]


def notes_on(
    runs: Sequence[Run], task: str | None, answers: Mapping[str, pd.DataFrame]
) -> list[str]:
    """Returns what to know about the runs before quoting numbers."""
    notes = []
    for run in runs:
        remarks = _notes_on_training(run)
        if run.random_weights:
            remarks.append("random weights: loss and accuracy say nothing")
        if run.unquantised_share > NOTABLE_SHARE:
            percent = f"{100 * run.unquantised_share:.0f}%"
            remarks.append(f"{percent} of the weights of its layers stay in 16 bits")
        for name, scored in run.scored.items():
            first = name == task
            about = _notes_on_scores(scored, answers.get(run.label) if first else None)
            remarks += [note if first else f"{name}: {note}" for note in about]
        notes += [f"{run.label}: {remark}." for remark in remarks]
    if types := dict.fromkeys(name for run in runs for name in run.gguf_types):
        notes.append(
            f"The base was expanded from {', '.join(types)}: what a quantisation costs is measured "
            "on weights that had been quantised once already."
        )
    demo = any(r.training is not None and r.training.data.dataset == "demo" for r in runs)
    if task == DEMO_TASK or demo:
        notes.append("The embedded demo set is small and made for this project: not a benchmark.")
    missing = [run.label for run in runs if task is not None and task not in run.scored]
    if missing:
        notes.append(f"Not scored on {task}: {', '.join(missing)}.")
    return notes


def _notes_on_training(run: Run) -> list[str]:
    training, notes = run.training, []
    if training is None:
        return []
    if training.in_fp8:
        notes.append("trained with FP8 products (--compute fp8), which are less exact than bf16")
    if training.status == "interrupted":
        notes.append("training was interrupted: its numbers are those up to that step")
    paged = str(training.settings.get("optimizer")).startswith("paged")
    if training.memory.device_type == "cpu":
        notes.append("trained on the CPU: not a GPU measurement")
    elif paged and training.memory.peak_managed_bytes is None:
        notes.append("its peak memory leaves out the managed memory of its paged optimizer")
    return notes


def _notes_on_scores(scored: Scored, frame: pd.DataFrame | None) -> list[str]:
    notes = list(scored.notes)
    if scored.in_fp8:
        notes.append("scored with FP8 products (compute=fp8), which are less exact than bf16")
    shared = 0.0 if frame is None else float((frame["credit"] - frame["score"]).mean())
    if abs(shared) > _NOTABLE_TIES:
        notes.append(
            f"{scored.metric} as recorded counts the first of tied choices "
            f"({100 * scored.value:.2f}%); here ties share the credit ({100 * shared:+.2f})"
        )
    if scored.truncated:
        notes.append(f"{scored.truncated:,} prompts were truncated to fit the model")
    return notes


def _short_hash(digest: str) -> str:
    """The first 12 digits of a hash, with its kind."""
    kind, _, digits = digest.rpartition(":")
    return f"{kind}:{digits[:12]}" if kind else digits[:12]

"""One run: its training record, step log and scores, checked against each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_harness.errors import ComparisonError, ResultsError
from qlora_harness.record import EVALUATION_FILE, LOGS_FILE, SUMMARY_FILE
from qlora_harness.results.lm_eval_files import HarnessFile, newest, read_file, read_scored
from qlora_harness.results.scored import Scored, read_evaluation
from qlora_harness.schema.scoring_records import EvaluatedModel
from qlora_harness.schema.section import flatten, read_record
from qlora_harness.schema.training_records import TrainingLog, TrainingSummary, read_summary

if TYPE_CHECKING:
    import pandas as pd

# Both files hold the same sum, so only the last digits of a double may differ.
_AGREEMENT = 1e-9


@dataclass(frozen=True)
class Run:
    """One run; `path` is its folder or results file, `tasks` has groups instead of their parts.

    `scored` holds the results of both by task, each read on first use.
    """

    path: Path
    label: str
    training: TrainingSummary | None
    log: TrainingLog | None
    tasks: tuple[str, ...]
    scored: Mapping[str, Scored]

    def on(self, *tasks: str) -> Run:
        """Returns the run with its results on some tasks only."""
        return replace(self, scored={t: self.scored[t] for t in tasks if t in self.scored})

    def answers(self, task: str) -> pd.DataFrame | None:
        """Reads the answers to a task's questions; None if they aren't recorded. Raises ResultsError."""
        from qlora_harness.results.answers import read_answers

        return read_answers(self.scored[task])

    @property
    def seed(self) -> int | None:
        """Seed of the training, if recorded."""
        return None if self.training is None else self.training.seed

    @property
    def quant(self) -> str | None:
        """nf4, fp4, bf16 or another, if recorded."""
        trained = self.training.quant if self.training else None
        return trained or next((m.quant for m in self._scored_models if m.quant), None)

    @property
    def tuned(self) -> bool:
        """Whether the run has an adapter."""
        return self.training is not None or any(s.tuned for s in self.scored.values())

    @property
    def model(self) -> str | None:
        """Name of the base model, if recorded."""
        trained = self.training.model.name if self.training else None
        return trained or next((m.base for m in self._scored_models if m.base), None)

    @property
    def random_weights(self) -> bool:
        """Whether a record says that the base was never trained."""
        trained = self.training is not None and self.training.model.random_weights
        return trained or any(model.random_weights for model in self._scored_models)

    @property
    def unquantised_share(self) -> float:
        """Largest recorded share of the layers' weights that 4 bits left in 16."""
        trained = self.training.quantization.unquantised_share if self.training else None
        shares = [model.unquantised_share for model in self._scored_models]
        return max(share or 0.0 for share in (*shares, trained))

    @property
    def gguf_types(self) -> list[str]:
        """Types of the base's quantised weights in the GGUF file that it came from, if any."""
        trained = self.training.model.gguf if self.training else None
        files = [trained, *(model.gguf for model in self._scored_models)]
        return next((file.quantised_types for file in files if file is not None), [])

    @property
    def _scored_models(self) -> list[EvaluatedModel]:
        return [scored.model for scored in self.scored.values()]

    def conditions(self, task: str | None) -> dict[str, object]:
        """Returns every recorded setting by dotted name; other tasks' begin with their names."""
        conditions: dict[str, object] = {}
        if self.training is not None:
            record = self.training.model_dump(
                include={"arm", "quant", "model", "quantization", "settings", "computation",
                         "data", "environment"}
            )  # fmt: skip
            # The command line names the output folder and differs between any two runs.
            record["environment"].pop("command", None)
            conditions |= flatten(record, "training")
        for name, scored in self.scored.items():
            for condition, value in scored.conditions.items():
                own = name if name != task else "evaluation"
                conditions[condition.replace("evaluation", own, 1)] = value
        return conditions


class _LazyResults(Mapping[str, Scored]):
    """Results by task, each read on first use."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Scored]) -> None:
        self._names, self._read = names, cache(read)

    def __getitem__(self, task: str) -> Scored:
        if task not in self._names:
            raise KeyError(task)
        return self._read(task)

    def __contains__(self, task: object) -> bool:
        return task in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_run(path: str | Path, *, label: str | None = None, metric: str | None = None) -> Run:
    """Loads one run from its files.

    Args:
        path: A run folder such as results/4bit, a results_*.json of lm_eval, or a folder of those.
        label: Its name; by default that of the folder.
        metric: Metric of lm_eval's results; by default each task's usual one.

    Raises:
        ResultsError: A file is unreadable, foreign, incomplete, or contradicts another one.
        ComparisonError: The folder holds no run, or the training has failed or not ended.

    Example:
        >>> import qlora_harness as qh
        >>> run = qh.load_run("results/published/smollm2/4bit")
        >>> run.quant, run.training.results.steps
        ('nf4', 150)
    """
    path = Path(path)
    if not path.exists():
        raise ResultsError(f"{path} does not exist", "Name the folder of a run")
    training, log = None, None
    ours: dict[str, Scored] = {}
    if path.is_file():
        files = [read_file(path)]
    else:
        training = read_summary(path)
        if training is not None:
            _check_status(training, path / SUMMARY_FILE)
            log = _read_log(path / LOGS_FILE, training)
        if os.path.lexists(path / EVALUATION_FILE):
            ours = read_evaluation(path / EVALUATION_FILE)
        if training is None and not ours:
            _refuse_parent_folder(path)
        files = [read_file(p) for p in sorted(path.rglob("results_*.json")) if p.is_file()]
    if training is None and not ours and not any(file.tasks for file in files):
        raise ComparisonError(
            f"{path} holds no {SUMMARY_FILE}, no {EVALUATION_FILE} and no result of lm_eval",
            "Name the folder of a run, for example results/4bit",
        )
    tasks = tuple(dict.fromkeys([*ours, *(task for file in files for task in file.roots)]))
    names = list(dict.fromkeys([*tasks, *(task for file in files for task in file.tasks)]))

    def read(task: str) -> Scored:
        file = newest(files, task, one_model=training is None and task not in ours)
        scored = _join(ours.get(task), file, task, metric)
        rivals = sum(task in other.tasks for other in files)
        if file is None or not scored.samples or rivals == 1:
            return scored
        note = f"{file.path} is the newest of {rivals} lm_eval files with {task}: used"
        return replace(scored, notes=(*scored.notes, note))

    label = label or path.resolve().name
    return Run(path, label, training, log, tasks, _LazyResults(names, read))


def _check_status(training: TrainingSummary, path: Path) -> None:
    if training.status == "failed":
        reason = (training.failure or {}).get("problem") or "no reason recorded"
        raise ComparisonError(
            f'{path}: status is "failed": {reason}', "Fix the cause and train again"
        )
    if training.status == "running":
        raise ComparisonError(
            f'{path}: status is "running": the training has not ended, or was killed',
            "Wait for it, or finish it with --resume auto",
        )


def _read_log(path: Path, training: TrainingSummary) -> TrainingLog | None:
    """A run's step log, which must fit the summary; None without one."""
    if not os.path.lexists(path):
        return None
    log = read_record(path, TrainingLog)
    steps, rows = training.results.steps, len(log.steps)
    # The log of a resumed run may begin after its checkpoint.
    wrong = steps is not None and (rows > steps or (rows < steps and not training.runtime.resumed))
    if training.status == "completed" and wrong:
        raise ResultsError(
            f"{path}: steps has {rows} rows, but the summary says {steps} steps",
            "Restore the file, or train again",
        )
    loss = training.results.eval_loss
    if log.evaluation.nll and loss is not None and abs(log.evaluation.loss - loss) > 1e-4:
        raise ResultsError(
            f"{path}: evaluation.nll gives a loss of {log.evaluation.loss:.4f}, but the summary "
            f"says {loss:.4f}",
            "The files belong to different runs; restore them",
        )
    return log


def _refuse_parent_folder(path: Path) -> None:
    runs = sorted(
        {f.parent.name for name in (SUMMARY_FILE, EVALUATION_FILE) for f in path.glob(f"*/{name}")}
    )
    if runs:
        raise ComparisonError(
            f"{path} is not a run but holds {len(runs)}: {', '.join(runs)}",
            f"Name the runs themselves, for example {path / runs[0]}",
        )


def _join(ours: Scored | None, file: HarnessFile | None, task: str, metric: str | None) -> Scored:
    """Joins our record of a task with lm_eval's; one of them may be missing."""
    if ours is not None and metric not in (None, "acc", "acc,none"):
        raise ResultsError(
            f"{ours.path}: {task} has no metric {metric}, only acc", "Leave --metric out"
        )
    if file is None:
        assert ours is not None
        return ours
    theirs = read_scored(file, task, metric)
    if ours is None:
        return theirs
    same = ours.n == theirs.n and ours.subjects.keys() == theirs.subjects.keys()
    if same and abs(ours.value - theirs.value) <= _AGREEMENT:
        joined = {**theirs.conditions, **ours.conditions}
        notes = (*ours.notes, *theirs.notes)
        return replace(ours, conditions=joined, notes=notes, samples=theirs.samples)
    if ours.ended is None or theirs.ended is None or theirs.ended >= ours.ended:
        raise ResultsError(
            f"{ours.path} and {theirs.path} contradict each other on {task}: acc {ours.value:.6f} "
            f"of {ours.n} questions, and acc {theirs.value:.6f} of {theirs.n}",
            "Remove the one that is out of date, or score again",
        )
    note = f"{theirs.path} is older than {ours.path} and contradicts it: the newer one is used"
    return replace(ours, notes=(*ours.notes, note))


def find_runs(folder: str | Path = "results") -> list[Path]:
    """Returns the run folders below a folder, in the order of their paths; ResultsError if none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultsError(f"{folder} does not exist", "Name the folder that holds the runs")
    names = (SUMMARY_FILE, EVALUATION_FILE)
    runs = sorted({path.parent for name in names for path in folder.rglob(name)})
    if not runs:
        raise ResultsError(
            f"{folder} holds no run (no {' or '.join(names)})",
            "Train one with `accelerate launch launch/train.py`, or name another folder",
        )
    return runs


def default_labels(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest end of each path that tells it from the others."""
    parts = [
        (path.parent if path.suffix == ".json" else path).resolve().parts[1:] or ("/",)
        for path in paths
    ]
    if len(set(parts)) < len(parts):
        parts = [path.resolve().parts[1:] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in paths]

"""One run: its training record, its log, and what it scored, made to agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_harness.results.harness import newest, read_file, read_scored
from qlora_harness.results.scored import HarnessFile, Scored, read_evaluation
from qlora_harness.errors import ComparisonError, ResultsError
from qlora_harness.record import EVALUATION_FILE, LOGS_FILE, SUMMARY_FILE
from qlora_harness.schema.section import flatten, read_record
from qlora_harness.schema.training import TrainingLog, TrainingSummary

if TYPE_CHECKING:
    import pandas as pd

# Both files hold the same sum, so only the last digits of a double may differ.
_AGREEMENT = 1e-9


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: The folder or results file, as named.
        label: Its name.
        training: Its training summary, if it was trained here.
        log: Its step log, if there is one.
        tasks: What it was scored on; groups stand for their parts.
        scored: Results by task, also by the parts of groups; each is read when it is asked for.
        files: Results files of lm_eval.
    """

    path: Path
    label: str
    training: TrainingSummary | None
    log: TrainingLog | None
    tasks: tuple[str, ...]
    scored: Mapping[str, Scored]
    files: Sequence[HarnessFile] = ()

    def on(self, task: str | None) -> Run:
        """Returns the run with the result on one task alone, which then says what was scored."""
        scored = {task: self.scored[task]} if task is not None and task in self.scored else {}
        return replace(self, scored=scored)

    def answers(self, task: str) -> pd.DataFrame | None:
        """Reads the answers to the questions of a task; None where they aren't recorded.

        Raises:
            ResultsError: The files are broken, or not those of the result.
        """
        from qlora_harness.results.answers import read_logged, read_progress

        scored, frame = self.scored[task], None
        if scored.path.name == EVALUATION_FILE:
            frame = read_progress(scored)
        if frame is None and scored.harness is not None:
            frame = read_logged(scored.harness, scored)
        return frame

    @property
    def quant(self) -> str | None:
        """nf4, fp4, bf16 or another, if recorded."""
        if self.training is not None and self.training.quant is not None:
            return self.training.quant
        return next((s.quant for s in self.scored.values() if s.quant is not None), None)

    @property
    def tuned(self) -> bool:
        """Whether the run has an adapter."""
        return self.training is not None or any(s.tuned for s in self.scored.values())

    @property
    def model(self) -> str | None:
        """Name of the base model, if recorded."""
        if self.training is not None and self.training.model.name is not None:
            return self.training.model.name
        return next((s.base for s in self.scored.values() if s.base is not None), None)

    @property
    def random_weights(self) -> bool:
        """Whether a record says that the base was never trained."""
        trained = self.training is not None and self.training.model.random_weights
        return trained or any(s.random_weights for s in self.scored.values())

    @property
    def unquantised_share(self) -> float:
        """Largest recorded share of the layers' weights that 4 bits left in 16."""
        shares = [s.unquantised_share for s in self.scored.values()]
        if self.training is not None:
            shares.append(self.training.quantization.unquantised_share)
        return max((share for share in shares if share is not None), default=0.0)

    def conditions(self, task: str | None) -> dict[str, object]:
        """Returns every recorded setting by dotted name."""
        found: dict[str, object] = {}
        if self.training is not None:
            record = self.training.model_dump(
                include={"arm", "quant", "model", "quantization", "settings", "computation",
                         "data", "environment"}
            )  # fmt: skip
            # The command line names the output folder and differs between any two runs.
            record["environment"].pop("command", None)
            found |= flatten(record, "training")
        if task in self.scored:
            found |= self.scored[str(task)].conditions
        return found


def load_run(path: str | Path, *, label: str | None = None, metric: str | None = None) -> Run:
    """Loads one run from its files.

    Args:
        path: A run folder such as results/4bit, a results_*.json of lm_eval, or a folder of those.
        label: Its name; by default that of the folder.
        metric: Of lm_eval's results; by default each task's usual one.

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
    label = label or path.resolve().name
    if not path.exists():
        raise ResultsError(f"{path} does not exist", "Name the folder of a run")
    training, log = None, None
    ours: dict[str, Scored] = {}
    if path.is_file():
        files = [read_file(path)]
    else:
        if os.path.lexists(path / SUMMARY_FILE):
            training = read_record(path / SUMMARY_FILE, TrainingSummary)
            _check_status(training, path / SUMMARY_FILE)
            log = read_log(path / LOGS_FILE, training)
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
    names = dict.fromkeys([*tasks, *(task for file in files for task in file.tasks)])
    read = partial(_read_scored, ours, files, metric=metric, known=training is not None)
    return Run(path, label, training, log, tasks, _Lazy(names, read), files)


class _Lazy(Mapping[str, Scored]):
    """Results by task, each read when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Scored]) -> None:
        self._names, self._read = list(names), read
        self._known: dict[str, Scored] = {}

    def __getitem__(self, task: str) -> Scored:
        if task not in self._names:
            raise KeyError(task)
        if task not in self._known:
            self._known[task] = self._read(task)
        return self._known[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_scored(
    ours: Mapping[str, Scored],
    files: Sequence[HarnessFile],
    task: str,
    *,
    metric: str | None,
    known: bool,
) -> Scored:
    file = newest(files, task, one_model=not known and task not in ours)
    scored = _join(ours.get(task), file, task, metric)
    rivals = sum(task in other.tasks for other in files)
    if file is None or scored.harness is None or rivals == 1:
        return scored
    note = f"{file.path} is the newest of {rivals} lm_eval files with {task}: used"
    return replace(scored, notes=(*scored.notes, note))


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


def read_log(path: Path, training: TrainingSummary) -> TrainingLog | None:
    """Reads a run's step log; None without one.

    Raises:
        ResultsError: The file is broken, has not all steps of a completed run, or another
            evaluation loss than the summary.
    """
    if not os.path.lexists(path):
        return None
    log = read_record(path, TrainingLog)
    steps, found = training.results.steps, len(log.steps)
    # An interrupted run may lack the rows after the last that was written, a resumed one those
    # before its checkpoint.
    wrong = steps is not None and (
        found > steps or (found < steps and not training.runtime.resumed)
    )
    if training.status == "completed" and wrong:
        raise ResultsError(
            f"{path}: steps has {found} rows, but the summary says {steps} steps",
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


def _join(
    ours: Scored | None, file: HarnessFile | None, task: str, metric: str | None
) -> Scored:
    """Joins our record of a task with lm_eval's."""
    if ours is not None and metric not in (None, "acc", "acc,none"):
        raise ResultsError(
            f"{ours.path}: {task} has no metric {metric}, only acc", "Leave --metric out"
        )
    if file is None:
        assert ours is not None  # the task came from one of the two
        return ours
    theirs = read_scored(file, task, metric)
    if ours is None:
        return theirs
    same = ours.n == theirs.n and ours.subjects.keys() == theirs.subjects.keys()
    if same and abs(ours.value - theirs.value) <= _AGREEMENT:
        joined = {**theirs.conditions, **ours.conditions}
        notes = (*ours.notes, *theirs.notes)
        return replace(ours, conditions=joined, notes=notes, harness=file)
    if ours.ended is None or theirs.ended is None or theirs.ended >= ours.ended:
        raise ResultsError(
            f"{ours.path} and {theirs.path} contradict each other on {task}: acc {ours.value:.6f} "
            f"of {ours.n} questions, and acc {theirs.value:.6f} of {theirs.n}",
            "Remove the one that is out of date, or score again",
        )
    note = f"{theirs.path} is older than {ours.path} and says otherwise: the newer one is used"
    return replace(ours, notes=(*ours.notes, note))


def find_runs(folder: str | Path = "results") -> list[Path]:
    """Returns the run folders below a folder, in the order of their paths.

    Args:
        folder: For example results.

    Raises:
        ResultsError: It does not exist, or holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultsError(f"{folder} does not exist", "Name the folder that holds the runs")
    names = (SUMMARY_FILE, EVALUATION_FILE)
    found = sorted({path.parent for name in names for path in folder.rglob(name)})
    if not found:
        raise ResultsError(
            f"{folder} holds no run (no {' or '.join(names)})",
            "Train one with `accelerate launch launch/train.py`, or name another folder",
        )
    return found


def default_labels(paths: Sequence[Path]) -> list[str]:
    """Returns for each run the shortest end of its path that tells it from the others."""
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

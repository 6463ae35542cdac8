"""One run: its training summary, its evaluations and the harness's own files, made to agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_harness.compare import fields
from qlora_harness.compare.answers import RecordedAnswers
from qlora_harness.compare.evaluation import Evaluation, read_evaluations
from qlora_harness.compare.harness_results import (
    HarnessFile,
    find_files,
    newest,
    read_evaluation,
    read_file,
)
from qlora_harness.compare.harness_samples import read_answers
from qlora_harness.compare.mmlu_progress import read_progress
from qlora_harness.errors import ComparisonError, ResultsError
from qlora_harness.record import EVALUATION_FILE, SUMMARY_FILE, nested

# Both files hold the same sum, so only the last digits of a double may differ.
_AGREEMENT = 1e-9


@dataclass(frozen=True)
class TrainingSummary:
    """What training_summary.json says, as far as the comparison needs it.

    Attributes:
        path: The file.
        status: "completed" or "interrupted"; other runs are refused.
        resumed: Whether the run continued from a checkpoint.
        arm: For example "4bit", if recorded.
        quant: "nf4", "fp4" or "bf16", if recorded.
        model: Name of the base model, if recorded.
        random_weights: Whether the base model was never trained.
        dataset: Name of the training data, if recorded.
        device_type: "cuda" or "cpu", if recorded.
        device_name: For example "NVIDIA H100 80GB HBM3", if recorded.
        train_fingerprint: Hash of the token ids trained on; None only if interrupted.
        eval_fingerprint: Hash of the token ids of the evaluation split, if there is one.
        host: What tells the machine from others, if recorded.
        device_id: What tells the device from others, if recorded.
        cpu_threads: Threads that computed on the CPU, if recorded.
        started: When the run began, ISO 8601, if recorded.
        finished: When it ended, ISO 8601, if recorded.
        unquantised_share: Share of the layers' weights that 4 bits left in 16; None for bf16.
        peak_allocated_bytes: Peak GPU memory held by tensors, bytes.
        peak_managed_bytes: Managed memory of a paged optimizer at the peak, bytes.
        other_processes: Most other processes seen on the GPU.
        other_bytes: Most memory of the GPU that others held, bytes.
        peak_reserved_bytes: Peak GPU memory held by the allocator, bytes.
        peak_device_used_bytes: Peak GPU memory in use as the driver sees it, bytes: that of all
            processes on the device.
        cpu_peak_rss_bytes: Peak resident memory of the process, bytes.
        train_seconds: Training time without loading and evaluation, seconds.
        tokens_per_second: Tokens trained on per second.
        steps: Optimizer steps of the whole run, if recorded.
        final_train_loss: Loss of the last logged step, nats per supervised token.
        eval_loss: Loss on the evaluation split, nats per supervised token.
        perplexity: exp of the evaluation loss.
        conditions: Every recorded setting, by dotted name.
    """

    path: Path
    status: str
    resumed: bool
    arm: str | None
    quant: str | None
    model: str | None
    random_weights: bool
    dataset: str | None
    device_type: str | None
    device_name: str | None
    train_fingerprint: str | None
    eval_fingerprint: str | None
    host: str | None
    device_id: str | None
    cpu_threads: int | None
    started: str | None
    finished: str | None
    unquantised_share: float | None
    peak_allocated_bytes: float | None
    peak_managed_bytes: float | None
    other_processes: float | None
    other_bytes: float | None
    peak_reserved_bytes: float | None
    peak_device_used_bytes: float | None
    cpu_peak_rss_bytes: float | None
    train_seconds: float | None
    tokens_per_second: float | None
    steps: int | None
    final_train_loss: float | None
    eval_loss: float | None
    perplexity: float | None
    conditions: Mapping[str, object]

    @property
    def paged(self) -> bool:
        """Whether the optimizer keeps its state in managed memory."""
        return str(self.conditions.get("training.settings.optimizer")).startswith("paged")


@dataclass(frozen=True)
class Run:
    """One run to compare.

    Attributes:
        path: The folder or results file as the user named it.
        label: Its name in tables.
        training: Its training summary, if it was trained here.
        evaluations: Its evaluations by task family.
        harness: The harness file behind an evaluation, by task family, where there is one.
    """

    path: Path
    label: str
    training: TrainingSummary | None
    evaluations: Mapping[str, Evaluation]
    harness: Mapping[str, HarnessFile]

    def answers(self, family: str, *, rescore: bool = False) -> RecordedAnswers | None:
        """Reads the answers to the questions of one family; None where they are not recorded.

        They are those of lm_eval's logged samples, or else, for what evaluation_results.json
        holds, those of the mmlu_progress file beside it.

        Args:
            family: For example mmlu_qlora_5shot.
            rescore: Whether each sample is checked against its log-probabilities; rows of an
                mmlu_progress file always are.

        Raises:
            ResultsError: The samples or the mmlu_progress file are broken or not those of the
                evaluation.
        """
        file, evaluation = self.harness.get(family), self.evaluations[family]
        samples = None if file is None else read_answers(file, evaluation, rescore=rescore)
        if samples is not None:
            return RecordedAnswers("samples", samples)
        if evaluation.path.name != EVALUATION_FILE:
            return None
        rows = read_progress(evaluation)
        return None if rows is None else RecordedAnswers("mmlu_progress", rows)


def load_run(path: Path, label: str) -> Run:
    """Loads one run from its files.

    Args:
        path: A run folder such as results/4bit, a results_*.json of lm_eval, or a folder of those.
        label: Its name in tables.

    Raises:
        ResultsError: A file is unreadable, foreign, incomplete, or contradicts another one.
        ComparisonError: There is nothing to compare in the folder, or the training has failed or
            not ended.
    """
    if not path.exists():
        raise ResultsError(f"{path} does not exist", "Name the folder of a run")
    if path.is_file():
        files = [read_file(path)]
        return _join_run(path, label, None, {}, files)
    training = None
    ours: dict[str, Evaluation] = {}
    if (path / SUMMARY_FILE).exists():
        training = read_training(path / SUMMARY_FILE)
    if (path / EVALUATION_FILE).exists():
        ours = read_evaluations(path / EVALUATION_FILE)
    if training is None and not ours:
        _refuse_parent_folder(path)
    files = [read_file(file) for file in find_files(path)]
    return _join_run(path, label, training, ours, files)


def read_training(path: Path) -> TrainingSummary:
    """Reads training_summary.json.

    Args:
        path: The file.

    Raises:
        ResultsError: It is unreadable, foreign, or lacks a metric that a completed run has.
        ComparisonError: The training has failed or not ended.
    """
    record = fields.read_record(path, "training_summary")
    status = _read_status(record, path)
    # An interrupted run may have stopped before the first step; a completed one has its numbers.
    completed = status == "completed"
    number = fields.number if completed else fields.optional_number
    amount = fields.amount if completed else fields.optional_amount
    text = fields.text if completed else fields.optional_text
    memory = {
        name: fields.optional_amount(record, path, "memory", name)
        for name in (
            "peak_allocated_bytes",
            "peak_managed_bytes",
            "other_processes",
            "other_bytes",
            "peak_reserved_bytes",
            "peak_device_used_bytes",
            "cpu_peak_rss_bytes",
        )
    }
    return TrainingSummary(
        path=path,
        status=status,
        resumed=nested(record, "runtime", "resumed") is True,
        arm=fields.optional_text(record, path, "arm"),
        quant=fields.optional_text(record, path, "quant"),
        model=fields.optional_text(record, path, "model", "name"),
        random_weights=nested(record, "model", "random_weights") is True,
        dataset=_read_dataset(record, path),
        device_type=fields.optional_text(record, path, "memory", "device_type"),
        device_name=fields.optional_text(record, path, "environment", "device", "name"),
        train_fingerprint=text(record, path, "data", "train", "fingerprint"),
        eval_fingerprint=fields.optional_text(record, path, "data", "eval", "fingerprint"),
        host=fields.optional_text(record, path, "process", "host"),
        device_id=fields.optional_text(record, path, "environment", "device", "id"),
        cpu_threads=fields.optional_count(record, path, "environment", "cpu_threads"),
        started=fields.optional_text(record, path, "started"),
        finished=fields.optional_text(record, path, "finished"),
        unquantised_share=fields.optional_amount(record, path, "quantization", "unquantised_share"),
        **memory,
        train_seconds=amount(record, path, "runtime", "train_seconds"),
        tokens_per_second=amount(record, path, "throughput", "tokens_per_second"),
        steps=fields.optional_count(record, path, "results", "steps"),
        final_train_loss=number(record, path, "results", "final_train_loss"),
        eval_loss=fields.optional_number(record, path, "results", "eval_loss"),
        perplexity=fields.optional_number(record, path, "results", "perplexity"),
        conditions=_training_conditions(record, path),
    )


def _read_status(record: Mapping[str, Any], path: Path) -> str:
    status = fields.optional_text(record, path, "status")
    if status in ("completed", "interrupted"):
        return status
    if status == "failed":
        reason = nested(record, "failure", "problem") or "no reason recorded"
        raise ComparisonError(
            f'{path}: status is "failed": {reason}', "Mend the cause and train again"
        )
    if status == "running":
        raise ComparisonError(
            f'{path}: status is "running": the training has not ended, or was killed',
            "Wait for it, or finish it with --resume auto",
        )
    raise fields.field_error(
        path, ("status",), f"is {status!r}, not running, completed, interrupted or failed"
    )


def _read_dataset(record: Mapping[str, Any], path: Path) -> str | None:
    return fields.optional_text(record, path, "data", "dataset") or fields.optional_text(
        record, path, "settings", "dataset"
    )


def _training_conditions(record: Mapping[str, Any], path: Path) -> dict[str, object]:
    environment = dict(fields.optional_mapping(record, path, "environment"))
    # The command line names the output folder and differs between any two runs.
    environment.pop("command", None)
    conditions: dict[str, object] = {}
    for name in ("arm", "quant", "model", "quantization", "settings", "computation", "data"):
        conditions.update(fields.flatten(record.get(name), f"training.{name}"))
    conditions.update(fields.flatten(environment, "training.environment"))
    return conditions


def _refuse_parent_folder(path: Path) -> None:
    runs = sorted(
        {
            file.parent.name
            for name in (SUMMARY_FILE, EVALUATION_FILE)
            for file in path.glob(f"*/{name}")
        }
    )
    if runs:
        raise ComparisonError(
            f"{path} is not a run but holds {len(runs)}: {', '.join(runs)}",
            f"Name the runs themselves, for example {path / runs[0]}",
        )


def _join_run(
    path: Path,
    label: str,
    training: TrainingSummary | None,
    ours: Mapping[str, Evaluation],
    files: Sequence[HarnessFile],
) -> Run:
    evaluations: dict[str, Evaluation] = {}
    harness: dict[str, HarnessFile] = {}
    families = [*ours, *(family for file in files for family in file.families)]
    for family in dict.fromkeys(families):
        file = newest(files, family)
        evaluation, used = _join_evaluation(family, ours.get(family), file)
        if file is not None and used:
            harness[family] = file
            evaluation = _note_choice(evaluation, file, files)
        evaluations[family] = evaluation
    if training is None and not evaluations:
        raise _nothing_found(path, files)
    return Run(path, label, training, evaluations, harness)


def _join_evaluation(
    family: str, ours: Evaluation | None, file: HarnessFile | None
) -> tuple[Evaluation, bool]:
    """Joins our record of a family with the harness's.

    Returns:
        The evaluation, and whether the harness's file is a part of it.
    """
    if file is None:
        assert ours is not None  # the family came from one of the two
        return ours, False
    theirs = read_evaluation(file, family)
    if ours is None:
        return theirs, True
    if (
        abs(ours.acc - theirs.acc) <= _AGREEMENT
        and ours.n == theirs.n
        and ours.subjects.keys() == theirs.subjects.keys()
    ):
        joined = replace(
            ours,
            conditions={**theirs.conditions, **ours.conditions},
            notes=(*ours.notes, *theirs.notes),
        )
        return joined, True
    if ours.ended is None or theirs.ended is None or theirs.ended >= ours.ended:
        raise ResultsError(
            f"{ours.path} and {theirs.path} contradict each other on {family}: acc {ours.acc:.6f} "
            f"of {ours.n} questions in {len(ours.subjects)} subjects, and acc {theirs.acc:.6f} of "
            f"{theirs.n} in {len(theirs.subjects)}",
            "Remove the one that is out of date, or score again",
        )
    note = f"{theirs.path} is older than {ours.path} and says otherwise: the newer one is used"
    return replace(ours, notes=(*ours.notes, note)), False


def _note_choice(
    evaluation: Evaluation, file: HarnessFile, files: Sequence[HarnessFile]
) -> Evaluation:
    rivals = sum(evaluation.family in other.families for other in files)
    if rivals == 1:
        return evaluation
    note = f"{file.path} is the newest of {rivals} harness files with {evaluation.family}: used"
    return replace(evaluation, notes=(*evaluation.notes, note))


def _nothing_found(path: Path, files: Sequence[HarnessFile]) -> ComparisonError:
    if not files:
        return ComparisonError(
            f"{path} holds no {SUMMARY_FILE}, no {EVALUATION_FILE} and no results_*.json",
            "Name the folder of a run, for example results/4bit",
        )
    tasks = sorted({task for file in files for task in file.record["results"]})
    shown = ", ".join(tasks[:3]) + (", …" if len(tasks) > 3 else "")
    return ComparisonError(
        f"{files[0].path} holds no whole MMLU family of this project, only {shown or 'no task'}",
        "Score it with --tasks mmlu_qlora_5shot",
    )

"""training_summary.json and training_logs.json."""

# ruff: noqa: RUF012  # pydantic copies mutable defaults
from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from qlora_harness.record import SUMMARY_FILE
from qlora_harness.schema.section import (
    Amount,
    Count,
    Environment,
    GgufFile,
    Header,
    Number,
    Section,
    Share,
    read_record,
)


class TrainedModel(Section):
    """The base model and its adapter."""

    name: str | None = None
    """Hub id, folder, name of the GGUF file, or "smollm2"."""
    revision: str | None = None
    commit: str | None = None
    """Commit on the Hub, if the model came from there."""
    random_weights: bool = False
    weights_fingerprint: str | None = None
    gguf: GgufFile | None = None
    """The file that the base was expanded from, if it came as one."""
    trainable_parameters: Count | None = None
    attention: str | None = None


class Quantization(Section):
    """How the base's weights were held."""

    quant: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None
    parameter_dtypes: dict[str, Count] = {}
    unquantised_share: Share | None = None

    @property
    def is_float16(self) -> bool:
        """Whether a base without quantisation is held in float16 instead of bfloat16."""
        return self.quant == "bf16" and self.compute_dtype == "float16"


class DataSplit(Section):
    """The training or the evaluation conversations."""

    conversations: Count | None = None
    tokens: Count | None = None
    supervised_tokens: Count | None = None
    fingerprint: str | None = None
    """Hash of the token ids and of the mask."""


class DataReport(Section):
    """The data, as counted when it was read."""

    dataset: str | None = None
    """A name, or a mixture such as oasst1:0.7,alpaca:0.3."""
    form: str = "oasst"
    """Of the rows: oasst, as in all older records, alpaca, sharegpt, messages, …"""
    commit: str | None = None
    """Commit of the data set on the Hub, if it came from there."""
    mixture: list[dict[str, Any]] = []
    """The weight and the counts of each data set of a mixture."""
    train: DataSplit = DataSplit()
    eval: DataSplit | None = None


class Process(Section):
    """The main process, by which a later run can tell whether it is still alive."""

    id: int | None = None
    host: str | None = None
    """Hash of what tells the machine from others."""
    started: Number | None = None


class PhaseMemory(Section):
    """Peaks of one phase, bytes; allocated memory is that in live tensors on the GPU."""

    peak_allocated_bytes: Amount | None = None
    peak_reserved_bytes: Amount | None = None
    peak_device_used_bytes: Amount | None = None
    """In use on the whole device, as the driver counts it."""
    peak_managed_bytes: Amount | None = None
    peak_needed_bytes: Amount | None = None
    """Most allocated and managed memory together."""
    cpu_peak_rss_bytes: Amount | None = None
    """Resident memory of the process; measured on CPU runs only."""
    other_processes: Count | None = None
    """Most other processes seen on the device."""
    other_bytes: Amount | None = None
    """Most memory of the device that others used."""


class Memory(PhaseMemory):
    """Peaks of the training phase over all processes, and of every phase."""

    device_type: str | None = None
    phases: list[dict[str, Any]] = []


class Runtime(Section):
    """Seconds; `train_seconds` covers all segments of a resumed run."""

    train_seconds: Amount | None = None
    load_seconds: Amount | None = None
    data_seconds: Amount | None = None
    eval_seconds: Amount | None = None
    total_seconds: Amount | None = None
    resumed: bool = False
    graph_passes: Count = 0
    """Training passes that ran as CUDA graphs, without those before a resume."""


class Throughput(Section):
    """Speed without the first steps, in which kernels are chosen."""

    tokens_per_second: Amount | None = None


class Results(Section):
    """Losses, nats per supervised token."""

    steps: Count | None = None
    final_train_loss: Number | None = None
    eval_loss: Number | None = None
    """On the held-out conversations, weighted by token."""
    perplexity: Amount | None = None
    eval_tokens: Count | None = None
    eval_loss_before: Number | None = None
    """On the held-out conversations before the first step."""


# Settings that older records lack, with what they were then.
_LATER_SETTINGS = {
    "compute": "bf16",
    "eval_seed": 0,
    "format": "auto",
    "init_lora_weights": "default",
    "rope_scaling": None,
    "use_dora": False,
    "use_rslora": False,
}


class TrainingSummary(Header):
    """training_summary.json: one training run."""

    kind: Literal["training_summary"] = "training_summary"
    """What the file is."""
    status: Literal["running", "completed", "interrupted", "failed"]
    """Killed runs stay "running"."""
    arm: str | None = None
    """Short name of the quantisation: 4bit, 4bit_fp4, 4bit_hqq, 8bit or 16bit."""
    quant: str | None = None
    """nf4, fp4, int8, hqq or bf16."""
    started: str | None = None
    """ISO 8601."""
    finished: str | None = None
    """ISO 8601."""
    model: TrainedModel = TrainedModel()
    """Base and adapter."""
    quantization: Quantization = Quantization()
    """How the base is held."""
    computation: dict[str, Any] = {}
    """What --memory and the kind of model decide about a step."""
    plan: dict[str, Any] | None = None
    """Predicted memory, bytes."""
    settings: dict[str, Any]
    """Every flag."""
    data: DataReport = DataReport()
    """What was trained and evaluated on."""
    process: Process = Process()
    """Which process wrote this."""
    environment: Environment = Environment()
    """Versions and hardware."""
    failure: dict[str, Any] | None = None
    """What ended the run, if it failed."""
    results: Results = Results()
    """Losses."""
    memory: Memory = Memory()
    """Peaks."""
    runtime: Runtime = Runtime()
    """Times."""
    throughput: Throughput = Throughput()
    """Speed."""

    @model_validator(mode="after")
    def _settings_of_older_records_are_complete(self) -> TrainingSummary:
        for name, value in _LATER_SETTINGS.items():
            self.settings.setdefault(name, value)
        return self

    @model_validator(mode="after")
    def _completed_runs_have_their_numbers(self) -> TrainingSummary:
        needed = {
            "data.train.fingerprint": self.data.train.fingerprint,
            "results.final_train_loss": self.results.final_train_loss,
            "runtime.train_seconds": self.runtime.train_seconds,
            "throughput.tokens_per_second": self.throughput.tokens_per_second,
        }
        missing = [name for name, value in needed.items() if value is None]
        if self.status == "completed" and missing:
            raise ValueError(f"{missing[0]} is missing in a completed run")
        return self

    @property
    def in_fp8(self) -> bool:
        """Whether products with the base were in FP8."""
        return bool(self.settings["compute"] == "fp8")

    @property
    def peak_bytes(self) -> float | None:
        """Peak memory that the run needed, of the GPU or else of the process, bytes."""
        memory = self.memory
        needed = memory.peak_needed_bytes or memory.peak_allocated_bytes
        return memory.cpu_peak_rss_bytes if needed is None else needed

    @property
    def seed(self) -> int | None:
        """Seed of the adapter's weights, dropout and order of the data."""
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def read_summary(run_dir: Path) -> TrainingSummary | None:
    """Reads the training summary of a run folder; None without one. Raises ResultsError."""
    path = run_dir / SUMMARY_FILE
    return read_record(path, TrainingSummary) if path.exists() or path.is_symlink() else None


class StepRow(Section):
    """One optimizer step."""

    step: Count
    loss: Number
    """Nats per supervised token."""
    tokens: Count = 0
    supervised_tokens: Count = 0
    seconds: Amount | None = None
    """From the end of the step before to the end of this one."""


class EvaluationPoint(Section):
    """The held-out conversations after one step."""

    step: Count
    nll: list[Number]
    """Summed loss of each conversation, nats."""


class EvaluationLosses(Section):
    """The held-out conversations, one value for each, in their order."""

    nll: list[Number] = []
    """Summed loss after training, nats."""
    tokens: list[Count] = []
    nll_before: list[Number] = []
    """Summed loss before the first step, nats; empty if not evaluated then."""
    during: list[EvaluationPoint] = []
    """With --eval-steps: after steps between the first and the last."""

    @model_validator(mode="after")
    def _values_belong_together(self) -> EvaluationLosses:
        n = len(self.tokens)
        if len(self.nll) not in (0, n) or len(self.nll_before) not in (0, n):
            raise ValueError(
                f"{len(self.nll)} and {len(self.nll_before)} losses for {n} conversations"
            )
        for point in self.during:
            if len(point.nll) != n:
                raise ValueError(
                    f"{len(point.nll)} losses after step {point.step} for {n} conversations"
                )
        steps = [point.step for point in self.during]
        if steps != sorted(set(steps)):
            raise ValueError(f"the steps of the evaluations are not in order: {steps}")
        if min(self.tokens, default=1) < 1:
            raise ValueError("a conversation without a supervised token")
        return self

    @property
    def loss(self) -> float:
        """Loss after training, nats per token."""
        return self.mean(self.nll)

    @property
    def loss_before(self) -> float:
        """Loss before the first step, nats per token."""
        return self.mean(self.nll_before)

    def mean(self, nll: list[float]) -> float:
        """Returns the loss of one evaluation, nats per token, from its summed losses."""
        return math.fsum(nll) / sum(self.tokens)


class TrainingLog(Header):
    """training_logs.json: every step, and the held-out conversations."""

    kind: Literal["training_logs"] = "training_logs"
    """What the file is."""
    steps: list[StepRow]
    """In their order."""
    evaluation: EvaluationLosses = EvaluationLosses()
    """Before, during and after training."""

    @property
    def curve(self) -> list[EvaluationPoint]:
        """Every evaluation in its order: step 0, those during training, the last step."""
        evaluation = self.evaluation
        points = [*evaluation.during]
        if evaluation.nll_before:
            points.insert(0, EvaluationPoint(step=0, nll=evaluation.nll_before))
        if evaluation.nll and self.steps:
            points.append(EvaluationPoint(step=self.steps[-1].step, nll=evaluation.nll))
        return points

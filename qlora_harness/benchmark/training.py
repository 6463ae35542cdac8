"""Times optimizer steps of several ways to train: same base, same data, same Trainer.

Peers (`peers`) run one after the other in processes of their own, each with the device to itself.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback

from qlora_harness.benchmark.peers import PEER_WAYS, run_peer
from qlora_harness.benchmark.record import TrainingBenchmark, TrainingMeasurement, training_row
from qlora_harness.data.chat import Example
from qlora_harness.data.corpus import load_chosen_data
from qlora_harness.errors import SettingsError, TrainingError
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.base import (
    BaseSource,
    find_base,
    is_out_of_memory,
    load_base,
    load_tokenizer,
)
from qlora_harness.record import environment, write_json
from qlora_harness.settings import Settings, build_settings
from qlora_harness.train.arguments import attach_adapter, training_arguments
from qlora_harness.train.batches import ExampleSet, pack_batch, pad_batch, padding_id
from qlora_harness.train.memory import MemoryMeter
from qlora_harness.train.trainer import CountingTrainer, StepLog

_SHARED: dict[str, Any] = {
    "batch_size": 16,
    "grad_accum": 1,
    "lora_dropout": 0.0,
    "optimizer": "adamw_torch",
    "group_by_length": False,
}
_ONE_PASS: dict[str, Any] = {"batch_size": 16, "grad_accum": 1, "optimizer": "adamw_torch"}
_LEAN: dict[str, Any] = {"optimizer": "paged_adamw_8bit", "adapter_dtype": "bfloat16"}
# What each way changes of the published recipe, which is all defaults.
WAYS: dict[str, dict[str, Any]] = {
    "published": {"kernels": "none"},
    "published-fused": {},
    # The recipe with --memory fast and --memory balanced.
    "published-fast": _ONE_PASS | {"checkpointing": "none"},
    "published-balanced": _ONE_PASS | {"checkpointing": "selective"},
    "peft-full": _SHARED | {"kernels": "none", "checkpointing": "full"},
    "peft-none": _SHARED | {"kernels": "none", "checkpointing": "none"},
    "fused-none": _SHARED | {"checkpointing": "none"},
    "fused-selective": _SHARED | {"checkpointing": "selective"},
    "fused-full": _SHARED | {"checkpointing": "full"},
    "fused-offload": _SHARED | {"checkpointing": "offload"},
    "fused-lean": _SHARED | _LEAN | {"checkpointing": "offload"},
    "fused-lean-1": _SHARED | _LEAN | {"batch_size": 1, "checkpointing": "full"},
} | {
    name: _SHARED | {"kernels": "none", "checkpointing": way.checkpointing}
    for name, way in PEER_WAYS.items()
}


@dataclass(frozen=True)
class Plan:
    """What `qlora-harness benchmark-training` was told to measure."""

    model: str
    quants: Sequence[str]
    ways: Sequence[str]
    """Names in `WAYS`, each with @N for a batch size of N."""
    dataset: str
    max_length: int
    compute_dtype: str
    steps: int
    """Timed steps of a way; `warm_up` steps come before them."""
    warm_up: int
    changes: Mapping[str, Any]
    """Settings that every way gets."""
    peer_paths: Mapping[str, Path]
    """By peer, a folder that comes first on its import path."""
    peer_timeout: float
    """Seconds for one way of a peer, loading and compiling included."""
    output: Path | None


def measure_training(plan: Plan) -> str:
    """Measures every way on every base and returns the table.

    Each row is printed as it comes. `plan.output` is rewritten after each, so that a benchmark that
    is cut short keeps what it has measured. Raises HarnessError if a name is unknown, or the model
    or the data can't be read.
    """
    changes = {way: changed_settings(way, plan.changes) for way in plan.ways}
    shared = {
        "model": plan.model,
        "dataset": plan.dataset,
        "languages": "all",
        "max_length": plan.max_length,
        "compute_dtype": plan.compute_dtype,
    }
    # Every way is checked before the first is measured.
    settings = {
        (quant, way): build_settings(shared | {"quant": quant} | changes[way])
        for quant in plan.quants
        for way in plan.ways
    }
    bench = _Bench(plan, build_settings(shared | dict(plan.changes)))
    for quant in plan.quants:
        for way in plan.ways:
            measured = TrainingMeasurement(way=way, quant=quant, changes=changes[way])
            bench.measure(measured, settings[quant, way])
        bench.release_base()
    return bench.record().table()


def changed_settings(way: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a way. A batch size behind "@" wins over `changes`."""
    name, at, size = way.partition("@")
    if name not in WAYS or (at and (not size.isdecimal() or int(size) == 0)):
        raise SettingsError(
            f"--ways: {way!r} is not known",
            f"Known are {', '.join(WAYS)}, each with @N for a batch size of N",
        )
    return WAYS[name] | dict(changes) | ({"batch_size": int(size)} if at else {})


class _Bench:
    """Base, data and device that all ways share, and what has been measured with them."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.plan = plan
        self.source: BaseSource = find_base(plan.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device_name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        tokenizer = load_tokenizer(self.source)
        self.examples: Sequence[Example] = load_chosen_data(tokenizer, settings.data).train
        self.pad_id = padding_id(tokenizer)
        self.measurements: list[TrainingMeasurement] = []
        self._base: Any = None

    def record(self) -> TrainingBenchmark:
        random_weights = ", random weights" if self.source.random_weights else ""
        title = (
            f"{self.source.name}{random_weights}, {self.plan.compute_dtype}, {self.plan.dataset}, "
            f"at most {self.plan.max_length} tokens, {self.device_name}"
        )
        return TrainingBenchmark(
            title=title,
            measurements=self.measurements,
            environment=environment() | {"device": self.device_name},
        )

    def measure(self, measured: TrainingMeasurement, settings: Settings) -> None:
        peer = PEER_WAYS.get(measured.way.partition("@")[0])
        timed, warm_up = self.plan.steps, self.plan.warm_up
        if settings.optimization.grad_accum > 1:
            timed, warm_up = min(2, timed), 1  # a step of many passes is long enough
        if peer is None:
            self._measure_own(measured, settings, timed, warm_up)
        else:
            self.release_base()
            answer = run_peer(
                peer,
                settings,
                self.source,
                self.examples,
                steps=timed + warm_up,
                path=self.plan.peer_paths.get(peer.peer),
                timeout=self.plan.peer_timeout,
            )
            measured.failure = answer.get("failure")
            if measured.failure is None:
                measured.versions = answer["versions"]
                peaks = answer["peak_allocated_bytes"], answer["peak_reserved_bytes"]
                _fill(measured, answer["steps"], warm_up, *peaks)
        if measured.failure is None:
            same_base = [m for m in self.measurements if m.quant == measured.quant]
            baseline = next((m for m in same_base if m.failure is None), measured)
            measured.ratio = measured.tokens_per_second / baseline.tokens_per_second
        self.measurements.append(measured)
        print(training_row(measured), flush=True)
        if self.plan.output is not None:
            write_json(self.plan.output, self.record().model_dump())

    def release_base(self) -> None:
        self._base = None
        self._collect()

    def _measure_own(
        self, measured: TrainingMeasurement, settings: Settings, timed: int, warm_up: int
    ) -> None:
        if self._base is None:
            self._base = load_base(
                self.source,
                quant=settings.quant,
                double_quant=settings.model.double_quant,
                compute_dtype=settings.model.compute_dtype,
                device=self.device,
            )
        try:
            self._train(measured, settings, timed, warm_up)
        except TrainingError as error:
            measured.failure = error.problem
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            measured.failure = "out of memory"
        self._collect()  # only now is the trainer out of reach

    def _train(
        self, measured: TrainingMeasurement, settings: Settings, timed: int, warm_up: int
    ) -> None:
        optimization = settings.optimization
        model = attach_adapter(self._base, settings)
        decoder: FusedDecoder | None = None
        if optimization.kernels == "auto" and FusedDecoder.reason_against(model) is None:
            decoder = FusedDecoder.attach(model, optimization.checkpointing)
        fused = decoder is not None
        try:
            with tempfile.TemporaryDirectory() as folder:
                arguments = training_arguments(
                    optimization,
                    checkpoint_dir=Path(folder) / "checkpoints",
                    steps=timed + warm_up,
                    save_steps=10**9,
                    report_to="none",
                    compute_dtype=settings.model.compute_dtype,
                    use_cpu=self.device.type == "cpu",
                    fused=fused,
                    changes={"save_strategy": "no", "disable_tqdm": True},
                )
                meter = MemoryMeter(self.device, 0)
                log = StepLog(Path(folder), meter, [])
                trainer = CountingTrainer(
                    model=model,
                    args=arguments,
                    train_dataset=ExampleSet(self.examples),
                    data_collator=pack_batch if fused else partial(pad_batch, pad_id=self.pad_id),
                    callbacks=[log],
                )
                log.trainer = trainer
                trainer.remove_callback(PrinterCallback)
                with meter.phase("train"):
                    trainer.train()
            phase = meter.phases[-1]
            _fill(
                measured, log.rows, warm_up, phase.peak_allocated_bytes, phase.peak_reserved_bytes
            )
        finally:
            if decoder is not None:
                decoder.detach()
            elif optimization.checkpointing == "full":
                # transformers 5.2x renames gradient_checkpointing to activation_checkpointing.
                newer = hasattr(self._base, "activation_checkpointing_disable")
                kind = "activation" if newer else "gradient"
                getattr(self._base, f"{kind}_checkpointing_disable")()
                model.disable_input_require_grads()
            model.unload()
            del model
            self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _fill(
    measured: TrainingMeasurement,
    steps: Sequence[Mapping[str, Any]],
    warm_up: int,
    peak_allocated_bytes: int | None,
    peak_reserved_bytes: int | None,
) -> None:
    measured.losses = [step["loss"] for step in steps]
    measured.peak_allocated_bytes = peak_allocated_bytes
    measured.peak_reserved_bytes = peak_reserved_bytes
    timed = steps[warm_up:]
    measured.steps = len(timed)
    measured.tokens = sum(step["tokens"] for step in timed)
    measured.seconds = sum(step["seconds"] for step in timed)
    measured.tokens_per_second = measured.tokens / measured.seconds
    measured.median_tokens_per_second = statistics.median(
        step["tokens"] / step["seconds"] for step in timed
    )

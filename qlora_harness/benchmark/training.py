"""Times optimizer steps of several ways to train on the same base, data and Trainer.

Peers (see `peers`) run in their own processes, one after the other, with the device to themselves.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.trainer_callback import PrinterCallback

from qlora_harness.benchmark.peers import PEER_WAYS, run_peer
from qlora_harness.benchmark.record import TrainingBenchmark, TrainingMeasurement, training_row
from qlora_harness.data.corpus import load_training_data
from qlora_harness.data.examples import Example, lengths_of
from qlora_harness.errors import SettingsError, TrainingError
from qlora_harness.fused import fp8
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.base import load_base
from qlora_harness.model.facts import is_out_of_memory
from qlora_harness.model.source import BaseSource, find_base, load_tokenizer
from qlora_harness.settings import Settings
from qlora_harness.settings_checks import build_settings, check_can_run, check_can_shard
from qlora_harness.train.adapter import attach_adapter
from qlora_harness.train.arguments import training_arguments
from qlora_harness.train.batches import ExampleSet, pack_batch, pad_batch, padding_id
from qlora_harness.train.memory_meter import MemoryMeter
from qlora_harness.train.memory_plan import (
    Ranks,
    largest_pass,
    measure_shape,
    predict_memory,
)
from qlora_harness.train.ranks import device_of, say, shards_base, start_processes, watched
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
# The changes of each way from the published recipe, which is all defaults.
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
_FP8_ENDING = "-fp8"


@dataclass(frozen=True)
class TrainingPlan:
    """The flags of `qlora-harness benchmark-training`."""

    model: str
    quants: Sequence[str]
    ways: Sequence[str]
    dataset: str
    max_length: int
    compute_dtype: str
    steps: int
    warm_up: int
    engine: Literal["ddp", "fsdp2"]
    changes: Mapping[str, Any]  # --batch-size and --lora-r
    peer_paths: Mapping[str, Path]
    peer_timeout: float
    output: Path | None


def measure_training(plan: TrainingPlan) -> str:
    """Measures every way on every base and returns the table.

    Prints each row as it comes and rewrites `plan.output` after each, so that an interrupted
    benchmark keeps its measurements. Raises HarnessError if a name is unknown, or the model or the
    data can't be read.
    """
    changes = {way: changed_settings(way, plan.changes) for way in plan.ways}
    shared = {
        "model": plan.model,
        "dataset": plan.dataset,
        "languages": "all",
        "max_length": plan.max_length,
        "compute_dtype": plan.compute_dtype,
    }
    # Checks every way before it measures the first.
    settings = {
        (quant, way): build_settings(shared | {"quant": quant} | changes[way])
        for quant in plan.quants
        for way in plan.ways
    }
    state = start_processes(fsdp=plan.engine == "fsdp2")
    device = device_of(state)
    if state.num_processes > 1 and any(way.partition("@")[0] in PEER_WAYS for way in plan.ways):
        raise SettingsError("--ways: peers train in one process", "Leave trl and unsloth out")
    for each in settings.values():
        check_can_run(each)
        if shards_base(state):
            check_can_shard(each)
        reason = fp8.why_unavailable(device) if each.model.compute == "fp8" else None
        if reason is not None:
            raise SettingsError(f"--ways: -fp8 is impossible: {reason}", "Leave these ways out")
    bench = _TrainingBench(plan, build_settings(shared | dict(plan.changes)), state)
    with watched(state):
        for quant in plan.quants:
            for way in plan.ways:
                measured = TrainingMeasurement(way=way, quant=quant, changes=changes[way])
                bench.measure(measured, settings[quant, way])
            bench.release_base()
    return bench.record().table()


def changed_settings(way: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a way, in FP8 if it ends so.

    A batch size after "@" overrides that of `changes`.
    """
    name, at, size = way.partition("@")
    ours, ending, more = name.partition(_FP8_ENDING)
    if ending and not more and ours not in PEER_WAYS:
        name, changes = ours, dict(changes) | {"compute": "fp8"}
    if name not in WAYS or (at and (not size.isdecimal() or int(size) == 0)):
        raise SettingsError(
            f"--ways: {way!r} is unknown",
            f"Use {', '.join(WAYS)}; -fp8 after a name of fused layers computes in FP8, @N sets "
            "the batch size to N",
        )
    return WAYS[name] | dict(changes) | ({"batch_size": int(size)} if at else {})


class _TrainingBench:
    """The base, data and device that all ways share, and the measurements so far."""

    def __init__(self, plan: TrainingPlan, settings: Settings, state: PartialState) -> None:
        self.plan = plan
        self.state = state
        self.source: BaseSource = find_base(plan.model)
        self.device = device_of(state)
        self.device_name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        tokenizer = load_tokenizer(self.source)
        with state.main_process_first():  # it fills the cache that the others read
            data = load_training_data(tokenizer, settings.data)
        self.examples: Sequence[Example] = data.train
        self.pad_id = padding_id(tokenizer)
        self.measurements: list[TrainingMeasurement] = []
        self._base: Any = None

    def record(self) -> TrainingBenchmark:
        random_weights = ", random weights" if self.source.random_weights else ""
        count = self.state.num_processes
        devices = self.device_name if count == 1 else f"{count} × {self.device_name}"
        title = (
            f"{self.source.name}{random_weights}, {self.plan.compute_dtype}, {self.plan.dataset}, "
            f"at most {self.plan.max_length} tokens, {devices}"
        )
        record = TrainingBenchmark.of(title, self.measurements, self.device_name)
        record.processes = count
        if count > 1:
            record.engine = "fsdp2" if shards_base(self.state) else "ddp"
        return record

    def measure(self, measured: TrainingMeasurement, settings: Settings) -> None:
        peer = PEER_WAYS.get(measured.way.partition("@")[0])
        timed, warm_up = self.plan.steps, self.plan.warm_up
        if settings.optimization.grad_accum > 1:
            timed, warm_up = min(2, timed), 1  # a step of many passes takes long
        if peer is None:
            result = self._run_own(settings, timed + warm_up)
        else:
            self.release_base()
            result = run_peer(
                peer,
                settings,
                self.source,
                self.examples,
                steps=timed + warm_up,
                path=self.plan.peer_paths.get(peer.peer),
                timeout=self.plan.peer_timeout,
            )
        measured.failure = result.get("failure")
        if measured.failure is None:
            _fill(measured, result, warm_up)
            same_base = [m for m in self.measurements if m.quant == measured.quant]
            baseline = next((m for m in same_base if m.failure is None), measured)
            measured.ratio = measured.tokens_per_second / baseline.tokens_per_second
        self.measurements.append(measured)
        say(self.state, training_row(measured))
        if self.plan.output is not None and self.state.is_main_process:
            self.record().write(self.plan.output)

    def release_base(self) -> None:
        self._base = None
        self._collect()

    def _run_own(self, settings: Settings, steps: int) -> dict[str, Any]:
        """Trains with our code; returns what `run_peer` does, without `versions`."""
        if self._base is None:
            self._base = load_base(
                self.source,
                quant=settings.quant,
                double_quant=settings.model.double_quant,
                compute_dtype=settings.model.compute_dtype,
                device=self.device,
                sharded=shards_base(self.state),
            )
        try:
            result = self._train(settings, steps)
        except TrainingError as error:
            result = {"failure": error.problem}
        except Exception as error:
            if not is_out_of_memory(error) or self.state.num_processes > 1:
                raise  # the other processes wait for this one
            result = {"failure": "out of memory"}
        self._collect()  # nothing refers to the trainer any more
        return result

    def _train(self, settings: Settings, steps: int) -> dict[str, Any]:
        optimization = settings.optimization
        model = attach_adapter(self._base, settings)
        decoder: FusedDecoder | None = None
        compute = settings.model.compute
        reason = FusedDecoder.reason_against_fp8(model) if compute == "fp8" else None
        if reason is not None:
            raise TrainingError(f"-fp8 is impossible: {reason}", "Leave this way out")
        if optimization.kernels == "auto" and FusedDecoder.reason_against(model) is None:
            longest = largest_pass(lengths_of(self.examples), settings, fused=True)
            decoder = FusedDecoder.attach(
                *(model, optimization.checkpointing, longest), compute=compute
            )
        fused = decoder is not None
        try:
            with tempfile.TemporaryDirectory() as folder:
                arguments = training_arguments(
                    optimization,
                    checkpoint_dir=Path(folder) / "checkpoints",
                    steps=steps,
                    save_steps=10**9,
                    report_to="none",
                    compute_dtype=settings.model.compute_dtype,
                    use_cpu=self.device.type == "cpu",
                    fused=fused,
                    changes={"save_strategy": "no", "disable_tqdm": True},
                )
                meter = MemoryMeter(self.device, self.state.process_index)
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
            phases = gather_object([meter.phases[-1]])
            result: dict[str, Any] = {"steps": log.rows}
            for name in ("allocated", "reserved"):
                values = [getattr(phase, f"peak_{name}_bytes") for phase in phases]
                on_gpu = self.device.type == "cuda"
                result[f"peak_{name}_bytes"] = max(values) if on_gpu else None
                result[f"peaks_{name}_bytes"] = values if on_gpu else []
            if fused:
                result["planned_peak_bytes"] = self._planned_peak(settings)
            return result
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

    def _planned_peak(self, settings: Settings) -> int:
        shape = measure_shape(self.source.path, None, settings.lora.lora_targets)
        tokens = largest_pass(lengths_of(self.examples), settings, fused=True)
        ranks = Ranks(self.state.num_processes, shards_base(self.state))
        return predict_memory(shape, settings, tokens, ranks).peak

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _fill(measured: TrainingMeasurement, result: Mapping[str, Any], warm_up: int) -> None:
    measured.losses = [step["loss"] for step in result["steps"]]
    measured.peak_allocated_bytes = result["peak_allocated_bytes"]
    measured.peak_reserved_bytes = result["peak_reserved_bytes"]
    measured.peaks_allocated_bytes = result.get("peaks_allocated_bytes", [])
    measured.planned_peak_bytes = result.get("planned_peak_bytes")
    measured.versions = result.get("versions", {})
    timed = result["steps"][warm_up:]
    measured.steps = len(timed)
    measured.tokens = sum(step["tokens"] for step in timed)
    measured.seconds = sum(step["seconds"] for step in timed)
    measured.tokens_per_second = measured.tokens / measured.seconds
    measured.median_tokens_per_second = statistics.median(
        step["tokens"] / step["seconds"] for step in timed
    )

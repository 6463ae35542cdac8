"""training_summary.json, from the beginning of a run to whatever ends it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from qlora_harness.data.corpus import TrainingData
from qlora_harness.errors import HarnessError
from qlora_harness.model.base import unquantised_share
from qlora_harness.model.facts import attention_of, base_of, parameter_dtypes
from qlora_harness.model.source import BaseSource
from qlora_harness.record import SUMMARY_FILE, environment, nested, now, scrub_all, write_json
from qlora_harness.schema.section import Environment
from qlora_harness.schema.training_records import (
    DataReport,
    Memory,
    Process,
    Quantization,
    Results,
    Runtime,
    Throughput,
    TrainedModel,
    TrainingSummary,
)
from qlora_harness.settings import Settings
from qlora_harness.train.evaluation import ConversationLosses
from qlora_harness.train.memory_meter import MemoryMeter, largest_peaks
from qlora_harness.train.process import host_id, short_hash, this_process
from qlora_harness.train.ranks import shards_base

# Not counted in the throughput: these steps choose kernels and map memory.
_WARM_UP_STEPS = 3


class RunRecord:
    """The summary of a run, which the main process writes; `previous` is that of a resumed run."""

    def __init__(
        self,
        settings: Settings,
        state: PartialState,
        device: torch.device,
        memory: MemoryMeter,
        previous: Mapping[str, Any] | None,
    ) -> None:
        self._settings, self._state, self._device = settings, state, device
        self._memory, self._previous = memory, previous
        self.graph_passes = 0  # so far
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()
        self._summary = TrainingSummary(
            status="running",
            arm=settings.quant.arm,
            quant=settings.quant.value,
            started=now(),
            finished=None,
            settings=settings.flat() | {"output_dir": str(settings.run_dir)},
        )

    @property
    def content(self) -> dict[str, Any]:
        """The summary as JSON, without values that aren't known yet."""
        content: dict[str, Any] = scrub_all(self._summary.content())
        return content

    def begin(
        self,
        source: BaseSource,
        model: Any,
        data: TrainingData,
        *,
        fingerprint: str | None,
        computation: Mapping[str, Any],
        plan: Mapping[str, Any] | None,
    ) -> None:
        """Describes the run and writes the summary for the first time.

        `model` has its adapter; the weights' `fingerprint` is None for a base without safetensors.
        """
        settings, quant = self._settings, self._settings.quant
        self._summary.model = TrainedModel(
            **source.record(),
            weights_fingerprint=fingerprint,
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            attention=attention_of(base_of(model)),
        )
        self._summary.quantization = Quantization(
            quant=quant.value,
            double_quant=settings.model.double_quant if quant.is_4bit else None,
            compute_dtype=settings.model.compute_dtype,
            parameter_dtypes=parameter_dtypes(model),
            unquantised_share=unquantised_share(model),
        )
        self._summary.computation = dict(computation)
        self._summary.plan = None if plan is None else dict(plan)
        self._summary.data = DataReport.model_validate(data.report)
        self._summary.process = Process(**this_process())
        self._summary.environment = Environment(
            **environment(),
            device=_device_record(self._device),
            cpu_threads=torch.get_num_threads(),
            world_size=self._state.num_processes,
            sharded_base=shards_base(self._state),
        )
        self._summary.failure = None
        self.write()

    def trained(
        self, rows: Sequence[Mapping[str, Any]], steps: int, loss_before: float | None
    ) -> None:
        """Records steps, last loss, and the evaluation loss before training, in nats per token."""
        self._summary.results = Results(
            steps=steps,
            final_train_loss=rows[-1]["loss"] if rows else None,
            eval_loss=None,
            perplexity=None,
            eval_tokens=None,
            eval_loss_before=loss_before,
        )

    def evaluated(self, evaluation: ConversationLosses) -> None:
        """Records the evaluation after training; call `trained` first."""
        results = self._summary.results
        results.eval_loss, results.perplexity = evaluation.loss, evaluation.perplexity
        results.eval_tokens = sum(evaluation.tokens)

    def finish(
        self,
        status: Literal["completed", "interrupted"],
        rows: Sequence[Mapping[str, Any]],
        earlier: Sequence[Mapping[str, Any]],
    ) -> None:
        """Records the end of a run; every process must call it.

        `earlier` are the rows before the checkpoint of a resumed run.
        """
        phases = self._phases()
        if self._state.num_processes > 1:
            from accelerate.utils import gather_object

            phases = gather_object(phases)
        # A killed run has no runtime, but its step log has the seconds of its steps.
        recorded = nested(self._previous or {}, "runtime", "train_seconds") or 0.0
        before = max(recorded, sum(row["seconds"] for row in earlier))
        seconds = self._seconds
        self._summary.status, self._summary.finished = status, now()
        self._summary.memory = Memory(**largest_peaks(phases, self._device.type))
        self._summary.runtime = Runtime(
            train_seconds=seconds.get("train", 0.0) + before,
            load_seconds=seconds.get("load"),
            data_seconds=seconds.get("data"),
            eval_seconds=seconds.get("eval"),
            total_seconds=time.perf_counter() - self._began,
            resumed=self._previous is not None,
            graph_passes=self.graph_passes,
        )
        self._summary.throughput = Throughput(tokens_per_second=_tokens_per_second(rows))
        self.write()

    def fail(self, error: BaseException) -> None:
        """Records what ended the run, unless it hasn't begun or was recorded as interrupted."""
        if self._summary.status != "running" or not self._summary.computation:
            return
        text = str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
        interrupted = isinstance(error, KeyboardInterrupt)
        self._summary.status = "interrupted" if interrupted else "failed"
        self._summary.finished = now()
        self._summary.memory = Memory(**largest_peaks(self._phases(), self._device.type))
        self._summary.failure = {"problem": text.splitlines()[0] if text else "stopped"}
        self.write()

    def _phases(self) -> list[dict[str, Any]]:
        return [vars(peak) for peak in self._memory.phases]

    def write(self) -> None:
        """Writes the summary (main process only)."""
        if self._state.is_main_process:
            write_json(Path(self._settings.run_dir) / SUMMARY_FILE, self.content)

    @contextmanager
    def timed(self, name: Literal["data", "load", "train", "eval"]) -> Iterator[None]:
        """Adds a `with` block's time, device work included, without the blocks timed inside it."""
        began, before = time.perf_counter(), sum(self._seconds.values())
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            inside = sum(self._seconds.values()) - before
            seconds = time.perf_counter() - began - inside
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def _device_record(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        unknown = {"total_memory_bytes": None, "count": 0}
        return {"name": device.type, "type": device.type, "id": host_id(), **unknown}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "type": "cuda",
        "id": short_hash(str(properties.uuid)),
        "total_memory_bytes": properties.total_memory,
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _tokens_per_second(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Speed without the first steps, if there are enough others; None without any step."""
    steady = rows[_WARM_UP_STEPS:] if len(rows) > 2 * _WARM_UP_STEPS else rows
    seconds = sum(row["seconds"] for row in steady)
    return sum(row["tokens"] for row in steady) / seconds if seconds else None

"""Measures training steps of several ways: same base, same data, same Trainer.

Peers (`train.peers`) run in processes of their own, one after the other, with nothing beside them.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import PrinterCallback

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
from qlora_harness.record import write_measurements
from qlora_harness.settings import Settings, build_settings
from qlora_harness.train.adapter import attach_adapter
from qlora_harness.train.arguments import training_arguments
from qlora_harness.train.batches import ExampleSet, pack_batch, pad_batch, padding_id
from qlora_harness.train.benchmark_table import StepMeasurement, report, row
from qlora_harness.train.memory import MemoryMeter
from qlora_harness.train.peers import PEER_WAYS, PeerOptions, PeerWay, run_peer
from qlora_harness.train.trainer import CountingTrainer, StepLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARED: dict[str, Any] = {
    "batch_size": 16,
    "grad_accum": 1,
    "lora_dropout": 0.0,
    "optimizer": "adamw_torch",
    "group_by_length": False,
}
_ONE_PASS: dict[str, Any] = {"batch_size": 16, "grad_accum": 1, "optimizer": "adamw_torch"}
# What is changed from the published recipe, which is all defaults.
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
    "fused-lean": _SHARED
    | {"checkpointing": "offload", "optimizer": "paged_adamw_8bit", "adapter_dtype": "bfloat16"},
    "fused-lean-1": _SHARED
    | {
        "batch_size": 1,
        "checkpointing": "full",
        "optimizer": "paged_adamw_8bit",
        "adapter_dtype": "bfloat16",
    },
} | {
    name: _SHARED | {"kernels": "none", "checkpointing": way.checkpointing}
    for name, way in PEER_WAYS.items()
}


def run(
    *,
    model: str,
    quants: Sequence[str],
    ways: Sequence[str],
    dataset: str,
    max_length: int,
    compute_dtype: str,
    steps: int,
    warm_up: int,
    changes: dict[str, Any],
    peers: PeerOptions,
    output: Path | None,
) -> str:
    """Measures and returns the table.

    Args:
        model: Base model.
        quants: Of "nf4", "fp4", "bf16".
        ways: Of `WAYS`.
        dataset: As the launcher's --dataset; all languages are kept.
        max_length: Longest example, tokens.
        compute_dtype: "bfloat16" or "float32".
        steps: Timed optimizer steps of each way.
        warm_up: Optimizer steps before them.
        changes: Settings that every way gets.
        peers: How processes of peers are run.
        output: JSON file to write, or None; it holds what is known after each way.

    Raises:
        HarnessError: A name is not known, or the model or the data can't be read.
    """
    changed = {way: _changes(way, changes) for way in ways}
    shared = {
        "model": model,
        "dataset": dataset,
        "languages": "all",
        "max_length": max_length,
        "compute_dtype": compute_dtype,
    }
    common = build_settings(shared | changes)
    # All of them before the first is measured: a wrong name among the last is told at once.
    settings = {
        (quant, way): build_settings(shared | {"quant": quant} | changed[way])
        for quant in quants
        for way in ways
    }
    source = find_base(model)
    setup = _prepare(source, common, steps, warm_up, peers)
    base = _HeldBase(source, setup.device)
    found: list[StepMeasurement] = []
    for quant in quants:
        first = len(found)
        for way in ways:
            measured = StepMeasurement(way, quant, changed[way])
            peer = PEER_WAYS.get(way.partition("@")[0])
            if peer is None:
                _measure_own(measured, settings[quant, way], setup, base)
            else:
                base.release()  # a peer has the device to itself
                _measure_peer(measured, settings[quant, way], setup, peer)
            _relate(measured, found[first:])
            found.append(measured)
            _record(found, setup, output)
        base.release()
    return report(found, setup.title)


def _changes(way: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What a name of `WAYS` changes, what all change, and the batch size behind an "@"."""
    name, at, size = way.partition("@")
    if name not in WAYS or (at and (not size.isdecimal() or int(size) == 0)):
        raise SettingsError(
            f"--ways: {way!r} is not known",
            f"Known are {', '.join(WAYS)}, each with @N for a batch size of N",
        )
    return WAYS[name] | dict(changes) | ({"batch_size": int(size)} if at else {})


@dataclass(frozen=True)
class _Setup:
    """What all measurements of a benchmark have in common.

    Attributes:
        source: The base model.
        examples: What every way trains on.
        pad_id: What our own ways pad with.
        steps: Timed optimizer steps of a way.
        warm_up: Optimizer steps before them.
        peers: How processes of peers are run.
        device: What our own ways run on.
        device_name: Its name for people.
        title: What is measured, on which device.
    """

    source: BaseSource
    examples: Sequence[Example]
    pad_id: int
    steps: int
    warm_up: int
    peers: PeerOptions
    device: torch.device
    device_name: str
    title: str


def _prepare(
    source: BaseSource, settings: Settings, steps: int, warm_up: int, peers: PeerOptions
) -> _Setup:
    """Loads the data; `settings` are those that all ways share."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    tokenizer = load_tokenizer(source)
    data = load_chosen_data(tokenizer, settings.data)
    random_weights = ", random weights" if source.random_weights else ""
    title = (
        f"{source.name}{random_weights}, {settings.model.compute_dtype}, "
        f"{settings.data.dataset}, at most {settings.data.max_length} tokens, {name}"
    )
    pad_id = padding_id(tokenizer)
    return _Setup(source, data.train, pad_id, steps, warm_up, peers, device, name, title)


class _HeldBase:
    """The base that our own ways stand on: loaded for one of them, held for those after it.

    Args:
        source: The base model.
        device: Where it goes.
    """

    def __init__(self, source: BaseSource, device: torch.device) -> None:
        self._source = source
        self._device = device
        self._model: PreTrainedModel | None = None

    def load(self, settings: Settings) -> PreTrainedModel:
        """Returns the base, which stays the same until it is released.

        Args:
            settings: Of a way.
        """
        if self._model is None:
            self._model = load_base(
                self._source,
                quant=settings.quant,
                double_quant=settings.model.double_quant,
                compute_dtype=settings.model.compute_dtype,
                device=self._device,
            )
        return self._model

    def release(self) -> None:
        """Gives its memory back."""
        self._model = None
        _release(self._device)


def _step_counts(settings: Settings, setup: _Setup) -> tuple[int, int]:
    """Optimizer steps that are timed, and those before them."""
    if settings.optimization.grad_accum > 1:
        return min(2, setup.steps), 1  # a step of many passes is long enough to be timed twice
    return setup.steps, setup.warm_up


def _measure_own(
    measured: StepMeasurement, settings: Settings, setup: _Setup, base: _HeldBase
) -> None:
    model = base.load(settings)
    try:
        _train(measured, settings, setup, model)
    except TrainingError as error:
        measured.failure = error.problem
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        measured.failure = "out of memory"
    # Only now is the trainer of this way out of reach.
    _release(setup.device)


def _measure_peer(
    measured: StepMeasurement, settings: Settings, setup: _Setup, peer: PeerWay
) -> None:
    timed, warm_up = _step_counts(settings, setup)
    steps = timed + warm_up
    answer = run_peer(
        peer, settings, setup.source, setup.examples, steps=steps, options=setup.peers
    )
    measured.failure = answer.get("failure")
    if measured.failure is None:
        peaks = answer["peak_allocated_bytes"], answer["peak_reserved_bytes"]
        _fill(measured, answer["steps"], warm_up, *peaks)
        measured.versions = answer["versions"]


def _train(
    measured: StepMeasurement, settings: Settings, setup: _Setup, base: PreTrainedModel
) -> None:
    timed, warm_up = _step_counts(settings, setup)
    device = next(base.parameters()).device
    optimization = settings.optimization
    model = attach_adapter(base, settings)
    fused = optimization.kernels == "auto" and FusedDecoder.reason_against(model) is None
    decoder = None
    try:
        if fused:
            decoder = FusedDecoder.attach(model, optimization.checkpointing)
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(
                optimization,
                checkpoint_dir=Path(folder) / "checkpoints",
                steps=timed + warm_up,
                save_steps=10**9,
                report_to="none",
                compute_dtype=settings.model.compute_dtype,
                use_cpu=device.type == "cpu",
                fused=fused,
                changes={"save_strategy": "no", "disable_tqdm": True},
            )
            meter = MemoryMeter(device, 0)
            log = StepLog(Path(folder), meter, [])
            trainer = CountingTrainer(
                model=model,
                args=arguments,
                train_dataset=ExampleSet(setup.examples),
                data_collator=pack_batch if fused else partial(pad_batch, pad_id=setup.pad_id),
                callbacks=[log],
            )
            log.trainer = trainer
            trainer.remove_callback(PrinterCallback)
            with meter.phase("train"):
                trainer.train()
        peaks = meter.phases[-1]
        _fill(measured, log.rows, warm_up, peaks.peak_allocated_bytes, peaks.peak_reserved_bytes)
    finally:
        if decoder is not None:
            decoder.detach()
        if not fused and optimization.checkpointing == "full":
            # transformers 5.2x renames gradient_checkpointing to activation_checkpointing.
            newer = hasattr(base, "activation_checkpointing_disable")
            kind = "activation" if newer else "gradient"
            getattr(base, f"{kind}_checkpointing_disable")()
            model.disable_input_require_grads()
        model.unload()
        del model
        _release(device)


def _fill(
    measured: StepMeasurement,
    steps: list[dict[str, Any]],
    warm_up: int,
    peak_allocated_bytes: int | None,
    peak_reserved_bytes: int | None,
) -> None:
    measured.losses = [row["loss"] for row in steps]
    measured.peak_allocated_bytes = peak_allocated_bytes
    measured.peak_reserved_bytes = peak_reserved_bytes
    rows = steps[warm_up:]
    measured.steps = len(rows)
    measured.tokens = sum(row["tokens"] for row in rows)
    measured.seconds = sum(row["seconds"] for row in rows)
    measured.tokens_per_second = measured.tokens / measured.seconds
    measured.median_tokens_per_second = statistics.median(
        row["tokens"] / row["seconds"] for row in rows
    )


def _relate(measured: StepMeasurement, earlier: Sequence[StepMeasurement]) -> None:
    """Sets the ratio to the first way with numbers; `earlier` are those with the same quant."""
    if measured.failure is None:
        baseline = next((m for m in earlier if m.failure is None), measured)
        measured.ratio = measured.tokens_per_second / baseline.tokens_per_second


def _record(found: Sequence[StepMeasurement], setup: _Setup, output: Path | None) -> None:
    """Prints the newest measurement, and writes all that are known."""
    print(row(found[-1]), flush=True)
    if output is not None:
        write_measurements(
            output, "training_benchmark", 1, setup.title, map(asdict, found), setup.device_name
        )


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

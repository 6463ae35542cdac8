"""The model of a run: its memory plan, the base with its adapter, and fused layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from qlora_harness.data.corpus import TrainingData
from qlora_harness.errors import SettingsError
from qlora_harness.fused.host_memory import memory_of_a_process
from qlora_harness.fused.model import FusedDecoder, reason_against_config
from qlora_harness.model.base import weights_fingerprint
from qlora_harness.model.lora import public_name
from qlora_harness.model.shared_base import take_base
from qlora_harness.model.source import BaseSource, read_config
from qlora_harness.settings import Settings
from qlora_harness.settings_checks import check_combination
from qlora_harness.train.adapter import (
    attach_adapter,
    eva_batches,
    restart_adapter,
    start_adapter,
)
from qlora_harness.train.memory_plan import (
    Ranks,
    choose_memory_plan,
    largest_pass,
    measure_shape,
)
from qlora_harness.train.plan_text import describe, host_shortage
from qlora_harness.train.ranks import device_of, say, shards_base


@dataclass(frozen=True)
class RunModel:
    """A base with the adapter of a run; `fused` are its fused layers, if it has them."""

    model: Any
    base_fingerprint: str | None
    fused: FusedDecoder | None

    def computation(self, settings: Settings) -> dict[str, Any]:
        """Returns how a step is computed, as the record of a run has it."""
        optimization = settings.optimization
        return {
            "fused_layers": self.fused is not None,
            "padding": "right" if self.fused is None else "none",
            "checkpointing": optimization.checkpointing,
            "optimizer": optimization.optimizer,
            "adapter_dtype": settings.lora.adapter_dtype,
            "batch_size": optimization.batch_size,
            "grad_accum": optimization.grad_accum,
        }


def refuse_fp8(reason: str | None) -> None:
    """Raises SettingsError with the reason against FP8 products, if there is one."""
    if reason is not None:
        raise SettingsError(f"--compute fp8: {reason}", "Use --compute bf16")


def plan_memory(
    settings: Settings, state: PartialState, source: BaseSource, lengths: Sequence[int]
) -> tuple[Settings, dict[str, Any] | None]:
    """Applies --memory and prints the planned peak; returns the settings and the plan, if any.

    `lengths` are the tokens of each training example. Raises SettingsError if nothing fits.
    """
    if shards_base(state):
        config = read_config(source, settings.model.rope_scaling)
        _check_sharded(source, reason_against_config(config))
    if device_of(state).type != "cuda" and settings.optimization.memory is None:
        return settings, None
    shape = measure_shape(source.path, source.revision, settings.lora.lora_targets)
    if settings.model.compute == "fp8" and not shape.fused:
        refuse_fp8(f"{source.name} has no fused layers")
    ranks = Ranks(state.num_processes, shards_base(state))
    chosen, plan, tokens = choose_memory_plan(shape, settings, lengths, ranks)
    check_combination(chosen)
    lines = [describe(plan, tokens), host_shortage(plan, memory_of_a_process())]
    say(state, "\n".join(line for line in lines if line is not None))
    return chosen, plan.record() | {"tokens_per_pass": tokens}


def load_model(
    settings: Settings,
    state: PartialState,
    source: BaseSource,
    data: TrainingData,
    checkpoint: Path | None,
) -> RunModel:
    """Loads the base and attaches the adapter; the weights of a checkpoint are loaded later."""
    batches = eva_batches(data.train, settings) if checkpoint is None else []
    model: Any = take_base(
        source,
        quant=settings.quant,
        double_quant=settings.model.double_quant,
        compute_dtype=settings.model.compute_dtype,
        device=device_of(state),
        rope_scaling=settings.model.rope_scaling,
        shared=settings.lora.init_lora_weights != "pissa",  # which changes the base
        sharded=shards_base(state),
    )
    fingerprint = weights_fingerprint(model)
    model = attach_adapter(model, settings, resumed=checkpoint is not None)
    if checkpoint is None:
        start_adapter(model, settings, source, batches)
    else:
        restart_adapter(model, settings, checkpoint)
    # PEFT writes this name into every adapter folder. Users upload those: no local path.
    model.peft_config["default"].base_model_name_or_path = public_name(source.name)
    model.config.name_or_path = public_name(source.name)
    # The vocabulary never grows, and "auto" would query the Hub at every checkpoint.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    # Otherwise PEFT replaces bfloat16 parameters, and fused layers hold on to the old ones.
    model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)
    fused = _fuse(settings, state, source, model, data.train.lengths)
    return RunModel(model, fingerprint, fused)


def _fuse(
    settings: Settings, state: PartialState, source: BaseSource, model: Any, lengths: Sequence[int]
) -> FusedDecoder | None:
    """Attaches fused layers if the settings and the model allow."""
    optimization, compute = settings.optimization, settings.model.compute
    auto = optimization.kernels == "auto"
    reason = FusedDecoder.reason_against(model) if auto else "--kernels none"
    if compute == "fp8":
        refuse_fp8(FusedDecoder.reason_against_fp8(model))
    if reason is None:
        longest = largest_pass(lengths, settings, fused=True)
        return FusedDecoder.attach(model, optimization.checkpointing, longest, compute=compute)
    if optimization.checkpointing in ("selective", "offload"):
        raise SettingsError(
            f"--checkpointing {optimization.checkpointing} needs fused layers, and "
            f"{settings.model.model} has none: {reason}",
            "Use --checkpointing full or none",
        )
    if shards_base(state):
        _check_sharded(source, reason)
    if auto:
        say(state, f"PEFT's own modules and padded batches: {reason}")
    return None


def _check_sharded(source: BaseSource, reason: str | None) -> None:
    if reason is not None:
        raise SettingsError(
            f"FSDP spreads the base over the processes, for fused layers, and {source.name} has "
            f"none: {reason}",
            "Launch without FSDP",
        )

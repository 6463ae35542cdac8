"""`--memory`: the way to save memory that fits, of a ladder from the fastest to the leanest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from qlora_harness.errors import SettingsError
from qlora_harness.model.shape import Shape
from qlora_harness.settings import Settings
from qlora_harness.train.memory_prediction import GIB, MemoryPlan, largest_pass, predict
from qlora_harness.train.model_shape import uses_fused

# From the fastest to the leanest.
LADDER: tuple[dict[str, str], ...] = (
    {"checkpointing": "none"},
    {"checkpointing": "selective"},
    {"checkpointing": "full"},
    {"checkpointing": "offload"},
    {"checkpointing": "offload", "optimizer": "paged_adamw_8bit", "adapter_dtype": "bfloat16"},
)
_PRESETS = {"fast": 0, "balanced": 1, "lean": -1}


def choose_memory_plan(
    shape: Shape, settings: Settings, lengths: Sequence[int]
) -> tuple[Settings, MemoryPlan, int]:
    """Applies `--memory`: returns the settings to run with, their plan, and its tokens a pass.

    Rows without padding may hold all examples of a step without changing what is learned. So
    "fast" and "balanced" compute a step in one pass, and a number of GiB is first sought for few
    passes, then for little recomputation; "lean" leaves the passes as they are. `lengths` are the
    tokens of each training example. Raises SettingsError if nothing fits into so many GiB.
    """
    fused = uses_fused(shape, settings)

    def planned(changed: Settings) -> tuple[Settings, MemoryPlan, int]:
        tokens = largest_pass(lengths, changed, fused=fused)
        return changed, predict(shape, changed, tokens), tokens

    memory = settings.optimization.memory
    if memory is None:
        return planned(settings)
    rungs = rungs_of(fused)
    if not fused:
        rungs.append(LADDER[-1] | {"checkpointing": "full"})
    accumulated = settings.optimization.grad_accum
    # Padding would change with the batch.
    passes = [n for n in range(1, accumulated + 1) if accumulated % n == 0] if fused else []
    passes = passes or [accumulated]
    if memory in _PRESETS:
        number = passes[-1] if memory == "lean" else passes[0]
        return planned(_in_passes(with_rung(settings, rungs[_PRESETS[memory]]), number))
    plans = []
    for number in passes:
        for rung in rungs:
            plans.append(planned(_in_passes(with_rung(settings, rung), number)))
            if plans[-1][1].peak <= float(memory) * GIB:
                return plans[-1]
    _, least, tokens = min(plans, key=lambda item: item[1].peak)
    raise SettingsError(
        f"--memory {memory}: the leanest way takes {least.peak / GIB:.1f} GiB at {tokens:,} tokens "
        "a pass",
        "Lower --batch-size (and raise --grad-accum), --max-length or --lora-r, or use --quant nf4",
    )


def rungs_of(fused: bool) -> list[dict[str, str]]:
    """Returns the rungs of the ladder that a model with or without fused layers can take."""
    return [rung for rung in LADDER if fused or rung["checkpointing"] in ("none", "full")]


def with_rung(settings: Settings, rung: Mapping[str, str]) -> Settings:
    """Returns settings with a rung of the ladder in place of their own.

    Where a rung leaves the optimizer as it is, paged AdamW in 32 bits becomes torch's: the update
    is the same, and what fits needs no paging, for which bitsandbytes waits at each parameter.
    """
    optimization, lora = settings.optimization, settings.lora
    optimization = dataclasses.replace(
        optimization,
        checkpointing=rung.get("checkpointing", optimization.checkpointing),
        optimizer=rung.get("optimizer", _unpaged(settings)),
    )
    lora = dataclasses.replace(lora, adapter_dtype=rung.get("adapter_dtype", lora.adapter_dtype))
    return dataclasses.replace(settings, optimization=optimization, lora=lora)


def _unpaged(settings: Settings) -> str:
    """The optimizer without paging, where that has its states in 32 bits as well."""
    optimizer = settings.optimization.optimizer
    if optimizer == "paged_adamw_32bit" and settings.lora.adapter_dtype == "float32":
        return "adamw_torch"
    return optimizer


def _in_passes(settings: Settings, number: int) -> Settings:
    """The same step in so many forward passes."""
    optimization = settings.optimization
    whole = optimization.batch_size * optimization.grad_accum
    optimization = dataclasses.replace(optimization, batch_size=whole // number, grad_accum=number)
    return dataclasses.replace(settings, optimization=optimization)

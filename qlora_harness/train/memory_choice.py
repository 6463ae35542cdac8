"""`--memory`: the way to save memory that fits, of a ladder from the fastest to the leanest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from qlora_harness.errors import SettingsError
from qlora_harness.settings import Settings
from qlora_harness.train.memory_prediction import GIB, MemoryPlan, largest_pass, predict
from qlora_harness.train.model_shape import Shape, uses_fused

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
    """Applies `--memory`: a way to save memory, and how much of a step goes into one pass.

    Rows without padding may hold all examples of a step without changing what is learned. So
    "fast" and "balanced" compute a step in one pass, and so many GiB are first sought for few
    passes, then for little recomputation; "lean" leaves the passes as they are.

    Args:
        shape: From `measure_shape`.
        settings: As the user gave them.
        lengths: Tokens of each training example.

    Returns:
        The settings to run with, their plan, and the tokens of the largest pass.

    Raises:
        SettingsError: Nothing fits into so many GiB.
    """
    fused = uses_fused(shape, settings)

    def planned(changed: Settings) -> tuple[Settings, MemoryPlan, int]:
        tokens = largest_pass(lengths, changed, fused=fused)
        return changed, predict(shape, changed, tokens), tokens

    asked = settings.optimization.memory
    if asked is None:
        return planned(settings)
    rungs = rungs_of(fused)
    if not fused:
        rungs.append(LADDER[-1] | {"checkpointing": "full"})
    passes = _divisors(settings.optimization.grad_accum)
    if not fused:
        passes = passes[-1:]  # padding would change with the batch
    if asked in _PRESETS:
        number = passes[-1] if asked == "lean" else passes[0]
        return planned(_in_passes(with_rung(settings, rungs[_PRESETS[asked]]), number))
    found = []
    for number in passes:
        for rung in rungs:
            found.append(planned(_in_passes(with_rung(settings, rung), number)))
            if found[-1][1].peak <= float(asked) * GIB:
                return found[-1]
    _, least, tokens = min(found, key=lambda item: item[1].peak)
    raise SettingsError(
        f"--memory {asked}: the leanest way takes {least.peak / GIB:.1f} GiB at {tokens:,} tokens "
        "a pass",
        "Lower --batch-size (and raise --grad-accum), --max-length or --lora-r, or use --quant nf4",
    )


def rungs_of(fused: bool) -> list[dict[str, str]]:
    """Returns those of the ladder that a model can take.

    Args:
        fused: Whether it has fused layers.
    """
    return [rung for rung in LADDER if fused or rung["checkpointing"] in ("none", "full")]


def with_rung(settings: Settings, rung: Mapping[str, str]) -> Settings:
    """Returns settings with a rung of the ladder in place of their own.

    Where a rung leaves the optimizer as it is, paged AdamW in 32 bits becomes torch's: the same
    update, and what fits needs no paging, for which bitsandbytes waits at each parameter.

    Args:
        settings: As the user gave them.
        rung: Of `LADDER`.
    """
    optimization, lora = settings.optimization, settings.lora
    return dataclasses.replace(
        settings,
        optimization=dataclasses.replace(
            optimization,
            checkpointing=rung.get("checkpointing", optimization.checkpointing),
            optimizer=rung.get("optimizer", _unpaged(settings)),
        ),
        lora=dataclasses.replace(lora, adapter_dtype=rung.get("adapter_dtype", lora.adapter_dtype)),
    )


def _unpaged(settings: Settings) -> str:
    """The optimizer without paging, where that has its states in 32 bits as well."""
    optimizer = settings.optimization.optimizer
    if optimizer == "paged_adamw_32bit" and settings.lora.adapter_dtype == "float32":
        return "adamw_torch"
    return optimizer


def _divisors(number: int) -> list[int]:
    """From 1 up."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _in_passes(settings: Settings, number: int) -> Settings:
    """The same step in so many forward passes."""
    optimization = settings.optimization
    whole = optimization.batch_size * optimization.grad_accum
    return dataclasses.replace(
        settings,
        optimization=dataclasses.replace(
            optimization, batch_size=whole // number, grad_accum=number
        ),
    )

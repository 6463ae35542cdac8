"""Memory plans as text: one plan in a line, and a table of every way to save memory."""

from __future__ import annotations

from qlora_harness.model.shape import Shape
from qlora_harness.settings import Settings
from qlora_harness.train.memory_plan import (
    CONTEXT,
    GIB,
    ONE_GPU,
    MemoryPlan,
    Ranks,
    predict_memory,
    rungs_of,
    uses_fused,
    with_rung,
)

_DEVICES_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 141)


def _parts(plan: MemoryPlan) -> dict[str, int]:
    return {
        "weights": plan.weights,
        "adapter": plan.adapter,
        "optimizer": plan.states,
        "gradients": plan.gradients,
        "activations": plan.activations,
        "work": plan.work,
    }


def describe(plan: MemoryPlan, tokens: int) -> str:
    """Returns a line about a plan for passes of `tokens`."""
    listed = ", ".join(f"{name} {value / GIB:.2f}" for name, value in _parts(plan).items())
    host = f", and {plan.host / GIB:.1f} GiB of the host's memory" if plan.host else ""
    return (
        f"planned peak {plan.peak / GIB:.1f} GiB on {_gpus(plan)}{host}, at {tokens:,} "
        f"tokens a pass, checkpointing {plan.checkpointing}"
        f"{', CUDA graphs' if plan.graphs else ''} ({listed})"
    )


def _gpus(plan: MemoryPlan) -> str:
    engine = "FSDP2" if plan.sharded else "DDP"
    return "a GPU" if plan.processes == 1 else f"each of {plan.processes} GPUs ({engine})"


def host_shortage(plan: MemoryPlan, free: int) -> str | None:
    """Returns what happens if a plan exceeds the `free` bytes of the host, or None if it fits."""
    has = f"the host has {free / GIB:.1f} GiB free for it"
    if plan.checkpointing == "selective" and plan.host > free // 4:
        return f"{has}; a quarter of that is used, and the rest is recomputed"
    if plan.checkpointing == "offload" and plan.host > free:
        return f"{has}, which is not enough: use --checkpointing full, or a smaller --batch-size"
    return None


def table(
    shape: Shape, settings: Settings, chosen: Settings, tokens: int, ranks: Ranks = ONE_GPU
) -> str:
    """Returns the plan of every rung, and the GPUs it fits, for passes of `tokens`.

    The row of `chosen`, the settings from `choose_memory_plan`, comes first and is marked.
    """
    fused = uses_fused(shape, settings)
    first = {
        "checkpointing": chosen.optimization.checkpointing,
        "optimizer": chosen.optimization.optimizer,
        "adapter_dtype": chosen.lora.adapter_dtype,
    }
    plans: dict[tuple[str, str, str], MemoryPlan] = {}
    for rung in (first, *rungs_of(fused)):
        plan = predict_memory(shape, with_rung(settings, rung), tokens, ranks)
        plans.setdefault((plan.checkpointing, plan.optimizer, plan.adapter_dtype), plan)
    kind = "fused layers" if fused else "PEFT's own modules: an estimate"
    dtype = settings.model.compute_dtype.replace("auto", "bfloat16")
    rows = [_plan_row(plan, " *" if n == 0 else "") for n, plan in enumerate(plans.values())]
    heads = [*_parts(next(iter(plans.values()))), "peak", "host"]
    return "\n".join(
        [
            f"{settings.model.model}, {settings.quant.value}, {dtype}, "
            f"rank {settings.lora.lora_r}, {tokens:,} tokens a pass; {kind}; "
            f"GiB on {_gpus(next(iter(plans.values())))}",
            f"{'checkpointing':<15}{'optimizer':<20}{'adapter':<10}"
            + "".join(f"{head:>12}" for head in heads)
            + "  fits GPUs of",
            *rows,
            f"* {_why_marked(chosen)}; the others are the steps of --memory, from the fastest; "
            "host: pinned memory of the host, for each process",
        ]
    )


def _plan_row(plan: MemoryPlan, mark: str) -> str:
    fits = [d for d in _DEVICES_GIB if plan.peak + CONTEXT <= d * GIB]
    return (
        f"{plan.checkpointing + mark:<15}{plan.optimizer:<20}{plan.adapter_dtype:<10}"
        + "".join(f"{v / GIB:>12.2f}" for v in (*_parts(plan).values(), plan.peak, plan.host))
        + (f"  {fits[0]} GiB and more" if fits else "  none listed")
    )


def _why_marked(settings: Settings) -> str:
    optimization = settings.optimization
    if optimization.memory is None:
        return "as the settings say"
    passes = optimization.grad_accum
    return (
        f"what --memory {optimization.memory} chooses if every example has "
        f"{settings.data.max_length:,} tokens, with {passes} {'pass' if passes == 1 else 'passes'} "
        f"a step"
    )

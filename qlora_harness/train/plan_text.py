"""Memory plans as a person reads them: one in a line, those of every way in a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qlora_harness.model.shape import Shape
from qlora_harness.settings import Settings
from qlora_harness.train.memory_choice import choose_memory_plan, rungs_of, with_rung
from qlora_harness.train.memory_prediction import GIB, MemoryPlan, predict
from qlora_harness.train.model_shape import uses_fused

_CONTEXT = 0.6 * GIB  # CUDA context and libraries, beside what the allocator counts
_MARGIN = 1.05  # of what is free: the plan is no measurement, and the allocator needs room
_DEVICES_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 141)


def describe(plan: MemoryPlan, tokens: int) -> str:
    """Returns in one line a plan that was made for so many tokens a pass."""
    parts = {
        "weights": plan.weights,
        "adapter": plan.adapter,
        "optimizer": plan.states,
        "gradients": plan.gradients,
        "activations": plan.kept,
        "work": plan.work,
    }
    listed = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
    beside = f", and {plan.host / GIB:.1f} GiB of the host's memory" if plan.host else ""
    return (
        f"planned peak {plan.peak / GIB:.1f} GiB on a GPU{beside}, at {tokens:,} tokens a pass, "
        f"checkpointing {plan.checkpointing} ({listed})"
    )


def host_shortage(plan: MemoryPlan, free: int) -> str | None:
    """Returns what happens if a plan needs more of the host's `free` bytes, or None if it fits."""
    has = f"the host has {free / GIB:.1f} GiB free for it"
    if plan.checkpointing == "selective" and plan.host > free // 4:
        return f"{has}, of which a quarter is used: what does not fit there is computed again"
    if plan.checkpointing == "offload" and plan.host > free:
        return f"{has}, which is not enough: use --checkpointing full, or a smaller --batch-size"
    return None


def one_pass(shape: Shape, settings: Settings, lengths: Sequence[int], free: int) -> str | None:
    """Returns a line on the `--memory` that would compute a step of several passes in one, or None.

    `lengths` are the tokens of each training example, `free` the free bytes of the GPU's memory.
    """
    optimization = settings.optimization
    if optimization.memory or optimization.grad_accum == 1 or not uses_fused(shape, settings):
        return None
    for word in ("fast", "balanced"):
        preset = dataclasses.replace(
            settings, optimization=dataclasses.replace(optimization, memory=word)
        )
        _, plan, _ = choose_memory_plan(shape, preset, lengths)
        if plan.peak * _MARGIN <= free:
            return (
                f"{optimization.grad_accum} passes a step; --memory {word} computes the same "
                f"steps in one, which is faster, at a planned peak of {plan.peak / GIB:.1f} GiB "
                "(for a comparison give it to both arms)"
            )
    return None


def table(shape: Shape, settings: Settings, chosen: Settings, tokens: int) -> str:
    """Returns every rung's plan as a table, and the GPUs that each fits.

    `chosen` are the settings from `choose_memory_plan`, whose rung is marked; `tokens` are those of
    the largest pass.
    """
    fused = uses_fused(shape, settings)
    heads = ("weights", "adapter", "optimizer", "gradients", "activations", "work", "peak", "host")
    own = {
        "checkpointing": chosen.optimization.checkpointing,
        "optimizer": chosen.optimization.optimizer,
        "adapter_dtype": chosen.lora.adapter_dtype,
    }
    plans: dict[tuple[str, str, str], MemoryPlan] = {}
    for rung in (own, *rungs_of(fused)):
        plan = predict(shape, with_rung(settings, rung), tokens)
        plans.setdefault((plan.checkpointing, plan.optimizer, plan.adapter_dtype), plan)
    kind = "fused layers" if fused else "PEFT's own modules: an estimate"
    dtype = settings.model.compute_dtype.replace("auto", "bfloat16")
    lines = [
        f"{settings.model.model}, {settings.quant.value}, {dtype}, "
        f"rank {settings.lora.lora_r}, {tokens:,} tokens a pass; {kind}; GiB",
        f"{'checkpointing':<15}{'optimizer':<20}{'adapter':<10}"
        + "".join(f"{head:>12}" for head in heads)
        + "  fits GPUs of",
        *(_plan_row(plan, " *" if n == 0 else "") for n, plan in enumerate(plans.values())),
        f"* {_why_marked(chosen)}; the others are the steps of --memory, from the fastest; host: "
        "pinned memory of the host, for each process",
    ]
    return "\n".join(lines)


def _plan_row(plan: MemoryPlan, mark: str) -> str:
    parts = (plan.weights, plan.adapter, plan.states, plan.gradients, plan.kept, plan.work)
    fits = [d for d in _DEVICES_GIB if plan.peak + _CONTEXT <= d * GIB]
    return (
        f"{plan.checkpointing + mark:<15}{plan.optimizer:<20}{plan.adapter_dtype:<10}"
        + "".join(f"{value / GIB:>12.2f}" for value in (*parts, plan.peak, plan.host))
        + (f"  {fits[0]} GiB and more" if fits else "  none listed")
    )


def _why_marked(settings: Settings) -> str:
    optimization = settings.optimization
    if optimization.memory is None:
        return "as the settings say"
    passes = optimization.grad_accum
    return (
        f"what --memory {optimization.memory} chooses where every example has "
        f"{settings.data.max_length:,} tokens, with {passes} {'pass' if passes == 1 else 'passes'} "
        f"a step"
    )

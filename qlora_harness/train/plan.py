"""The memory peak of a training run, predicted from shapes: what `--memory` chooses by.

The peak of a step on one GPU, without the CUDA context. (States of a paged optimizer are on the GPU
while there is room, but torch's allocator does not count them.)

    weights + adapter + optimizer states
    + max(kept activations + work of one layer, gradients + work of one layer)

Gradients appear layer by layer in the backward pass, as the kept activations of the layers
disappear, so only the larger of the two counts. For fused layers the terms follow from what
`fused.layer` keeps; for PEFT's own modules they are an estimate.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_harness.errors import SettingsError
from qlora_harness.settings import Settings

GIB = 2**30
_CONTEXT = 0.6 * GIB  # CUDA context and libraries, beside what the allocator counts
_DEVICES_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 141)

# From the fastest to the leanest.
LADDER: tuple[dict[str, str], ...] = (
    {"checkpointing": "none"},
    {"checkpointing": "selective"},
    {"checkpointing": "full"},
    {"checkpointing": "offload"},
    {"checkpointing": "offload", "optimizer": "paged_adamw_8bit", "adapter_dtype": "bfloat16"},
)
_PRESETS = {"fast": 0, "balanced": 1, "lean": -1}


@dataclass(frozen=True)
class Shape:
    """What of a model the memory depends on.

    Attributes:
        hidden: Hidden size.
        inner: Size of the MLP.
        queries: Query heads times head size.
        keys: Key heads times head size.
        layers: Decoder layers.
        vocabulary: Rows of the output head.
        linear: Parameters of the linear layers, which a 4-bit base holds in 4 bits.
        largest: Parameters of the largest of them.
        others: All other parameters.
        sides: In- and output sizes of the linear layers that get an adapter, summed.
        adapted: Adapters in a layer.
        fused: Whether it can have fused layers.
        head_norms: Whether heads of queries and keys are normalised, which keeps both twice.
    """

    hidden: int
    inner: int
    queries: int
    keys: int
    layers: int
    vocabulary: int
    linear: int
    largest: int
    others: int
    sides: int
    adapted: float
    fused: bool
    head_norms: bool


@dataclass(frozen=True)
class MemoryPlan:
    """A predicted peak, in bytes.

    Attributes:
        checkpointing: What is kept for the backward pass.
        optimizer: The optimizer.
        adapter_dtype: dtype of the adapter.
        weights: The base.
        adapter: Its adapter.
        states: Of the optimizer.
        gradients: Of the adapter.
        kept: Activations that wait for the backward pass.
        work: Of the layer at work, of the loss, and what full-precision weights grow by when
            adapters stand beside them.
    """

    checkpointing: str
    optimizer: str
    adapter_dtype: str
    weights: int
    adapter: int
    states: int
    gradients: int
    kept: int
    work: int

    @property
    def peak(self) -> int:
        """The predicted peak."""
        return (
            self.weights + self.adapter + self.states + max(self.kept, self.gradients) + self.work
        )

    def record(self) -> dict[str, Any]:
        """Returns the plan as it is stored."""
        return dataclasses.asdict(self) | {"peak": self.peak}


def measure_shape(path: str, revision: str | None, targets: str) -> Shape:
    """Reads a model's configuration and counts its parameters, without its weights.

    Args:
        path: A folder or a Hub id.
        revision: Branch, tag or commit, or None.
        targets: As `--lora-targets`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_harness.fused.model import why_config_not_fused
    from qlora_harness.model.base import head_size

    config = AutoConfig.from_pretrained(path, revision=revision or "main")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    every = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    linear = {name: module for name, module in every.items() if module is not head}
    names = None if targets == "all-linear" else {t.strip() for t in targets.split(",")}
    adapted = {
        name: module.weight
        for name, module in (linear if names is None else every).items()
        if names is None or name.rsplit(".", 1)[-1] in names
    }
    sizes = [module.weight.numel() for module in linear.values()]
    heads = config.num_attention_heads
    size = head_size(config)
    keys = getattr(config, "num_key_value_heads", None) or heads
    layers = config.num_hidden_layers
    return Shape(
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        queries=heads * size,
        keys=keys * size,
        layers=layers,
        vocabulary=head.weight.shape[0],
        linear=sum(sizes),
        largest=max(sizes),
        others=sum(p.numel() for p in model.parameters()) - sum(sizes),
        sides=sum(sum(weight.shape) for weight in adapted.values()),
        adapted=len(adapted) / layers,
        fused=why_config_not_fused(config) is None
        and all(name.startswith("model.layers.") for name in adapted),
        head_norms=config.model_type == "qwen3",
    )


def predict(shape: Shape, settings: Settings, tokens: int) -> MemoryPlan:
    """Predicts the peak of a step.

    Args:
        shape: From `measure_shape`.
        settings: Of the run.
        tokens: Of the largest forward pass; with padding where there is any.
    """
    optimization, lora = settings.optimization, settings.lora
    half = settings.model.compute_dtype == "bfloat16"
    size = 2 if half else 4
    quant = settings.quant
    if quant.is_4bit:
        # A scale for 64 weights; with double quantisation a byte, and a scale for 256 of them.
        scale = (1 + 4 / 256) / 64 if settings.model.double_quant else 4 / 64
        weights = int(shape.linear * (0.5 + scale)) + shape.others * size
    else:
        weights = (shape.linear + shape.others) * size
    parameters = lora.lora_r * shape.sides
    width = 2 if lora.adapter_dtype == "bfloat16" else 4
    # Two states each; in 8 bits with a scale for 256 of them.
    state = 2 * (1 + 4 / 256) if "8bit" in optimization.optimizer else 2.0 * width
    if optimization.optimizer == "paged_adamw_32bit":
        state = 8.0
    fused = _uses_fused(shape, settings)
    kept, work = (_fused if fused else _plain)(shape, settings, tokens, size)
    if fused:
        matrices = _bordered(shape, lora.lora_r)
        if quant.is_4bit:
            work += max(matrices) * size  # the group that was just expanded
        else:
            work += (sum(matrices) - shape.linear // shape.layers) * size * shape.layers
    elif quant.is_4bit:
        work += shape.largest * size  # the weight that was just expanded
    return MemoryPlan(
        optimization.checkpointing,
        optimization.optimizer,
        lora.adapter_dtype,
        weights,
        parameters * width,
        int(parameters * state),
        parameters * width,
        kept,
        work,
    )


def _fused(shape: Shape, settings: Settings, tokens: int, size: int) -> tuple[int, int]:
    """Activations that fused layers keep, and those of the layer at work."""
    hidden, inner, rank = shape.hidden, shape.inner, settings.lora.lora_r * shape.adapted
    first = 2 * hidden + 2 * shape.queries + 2 * shape.keys + rank * 4 / 7
    first += (shape.queries + shape.keys) * shape.head_norms
    second = 2 * inner + rank * 3 / 7
    kept = {
        "none": first + second,
        "selective": first,
        "full": hidden,
        "offload": 0,
    }[settings.optimization.checkpointing]
    # The product of the MLP, which its gradient replaces; what the norms and the stream take.
    work = float(inner + 4 * hidden)
    work += {
        "none": 0,
        "selective": second + 2 * inner,  # gates of another layer come back from the host
        "full": first + second,
        "offload": first + second + hidden,  # the input of the layer below comes back
    }[settings.optimization.checkpointing]
    return int(kept * size * tokens * shape.layers), int(work * size * tokens)


def _bordered(shape: Shape, rank: int) -> list[int]:
    """Elements of a layer's matrices with their adapters around them (`fused.bordered`)."""
    groups = [
        (shape.queries + 2 * shape.keys, shape.hidden, 3),
        (shape.hidden, shape.queries, 1),
        (2 * shape.inner, shape.hidden, 2),
        (shape.hidden, shape.inner, 1),
    ]
    from qlora_harness.fused.bordered import aligned

    share = rank * shape.adapted / 7
    return [int(n + share * count) * aligned(int(k + share * count)) for n, k, count in groups]


def _plain(shape: Shape, settings: Settings, tokens: int, size: int) -> tuple[int, int]:
    """An estimate for PEFT's modules: the logits whole, and activations in several copies."""
    hidden, inner, rank = shape.hidden, shape.inner, settings.lora.lora_r * shape.adapted
    layer = 8 * hidden + 4 * inner + shape.queries + 2 * shape.keys + 2 * rank
    logits = shape.vocabulary * (size + 8)
    if settings.optimization.checkpointing == "none":
        return int(layer * size * tokens * shape.layers), int(logits * tokens)
    work = max(layer * size, logits)
    return int(hidden * size * tokens * shape.layers), int(work * tokens)


def choose(
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
    fused = _uses_fused(shape, settings)

    def planned(changed: Settings) -> tuple[Settings, MemoryPlan, int]:
        tokens = largest_pass(lengths, changed, fused=fused)
        return changed, predict(shape, changed, tokens), tokens

    asked = settings.optimization.memory
    if asked is None:
        return planned(settings)
    rungs = _rungs(fused)
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


def _uses_fused(shape: Shape, settings: Settings) -> bool:
    return shape.fused and settings.optimization.kernels == "auto"


def _rungs(fused: bool) -> list[dict[str, str]]:
    """Those of the ladder that a model can take."""
    return [rung for rung in LADDER if fused or rung["checkpointing"] in ("none", "full")]


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


def with_rung(settings: Settings, rung: Mapping[str, str]) -> Settings:
    """Returns settings with a rung of the ladder in place of their own.

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
            optimizer=rung.get("optimizer", optimization.optimizer),
        ),
        lora=dataclasses.replace(lora, adapter_dtype=rung.get("adapter_dtype", lora.adapter_dtype)),
    )


def largest_pass(lengths: Sequence[int], settings: Settings, *, fused: bool) -> int:
    """Returns the tokens of the largest forward pass that a run is likely to have.

    Args:
        lengths: Tokens of each training example.
        settings: Of the run.
        fused: Whether fused layers take rows without padding.
    """
    count = min(settings.optimization.batch_size, len(lengths))
    longest = sorted(lengths, reverse=True)[:count]
    if not fused:
        return count * longest[0]  # padded
    if settings.optimization.group_by_length:
        return sum(longest)
    # A sum of random lengths: three standard deviations above its mean.
    mean, deviation = statistics.fmean(lengths), statistics.pstdev(lengths)
    return min(sum(longest), int(count * mean + 3 * deviation * math.sqrt(count)))


def describe(plan: MemoryPlan, tokens: int) -> str:
    """Returns a plan in one line.

    Args:
        plan: From `predict` or `choose`.
        tokens: It was made for.
    """
    parts = {
        "weights": plan.weights,
        "adapter": plan.adapter,
        "optimizer": plan.states,
        "gradients": plan.gradients,
        "activations": plan.kept,
        "work": plan.work,
    }
    listed = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
    return (
        f"planned peak {plan.peak / GIB:.1f} GiB on a GPU, at {tokens:,} tokens a pass, "
        f"checkpointing {plan.checkpointing} ({listed})"
    )


def table(shape: Shape, settings: Settings, tokens: int) -> str:
    """Returns every rung's plan as a table, and the GPUs that each fits.

    Args:
        shape: From `measure_shape`.
        settings: As the user gave them.
        tokens: As in `predict`.
    """
    fused = _uses_fused(shape, settings)
    heads = ("weights", "adapter", "optimizer", "gradients", "activations", "work", "peak")
    lines = [
        f"{'checkpointing':<15}{'optimizer':<20}{'adapter':<10}"
        + "".join(f"{head:>12}" for head in heads)
        + "  fits GPUs of"
    ]
    own = {
        "checkpointing": settings.optimization.checkpointing,
        "optimizer": settings.optimization.optimizer,
        "adapter_dtype": settings.lora.adapter_dtype,
    }
    rungs = [own, *_rungs(fused)]
    seen = set()
    for rung in rungs:
        plan = predict(shape, with_rung(settings, rung), tokens)
        key = (plan.checkpointing, plan.optimizer, plan.adapter_dtype)
        if key in seen:
            continue
        seen.add(key)
        values = (
            plan.weights, plan.adapter, plan.states, plan.gradients, plan.kept, plan.work, plan.peak
        )  # fmt: skip
        fits = [d for d in _DEVICES_GIB if plan.peak + _CONTEXT <= d * GIB]
        mark = " *" if len(seen) == 1 else ""
        lines.append(
            f"{plan.checkpointing + mark:<15}{plan.optimizer:<20}{plan.adapter_dtype:<10}"
            + "".join(f"{value / GIB:>12.2f}" for value in values)
            + f"  {fits[0]} GiB and more" * bool(fits)
            + "  none listed" * (not fits)
        )
    kind = "fused layers" if fused else "PEFT's own modules: an estimate"
    return "\n".join(
        [
            f"{settings.model.model}, {settings.quant.value}, {settings.model.compute_dtype}, "
            f"rank {settings.lora.lora_r}, {tokens:,} tokens a pass; {kind}; GiB",
            *lines,
            "* as the settings say; the others are the steps of --memory, from the fastest",
        ]
    )

"""The memory peak of a training run, predicted from shapes; and `--memory`, which chooses by it.

The peak of a step on one GPU, without the CUDA context:

    weights + adapter + optimizer states
    + max(stored activations + work of one layer, gradients + work of one layer)

The backward pass frees a layer's activations as it adds the layer's gradients, so only the larger
of the two counts; CUDA graphs hold the memory of both, and so do several processes, whose buckets
of gradients are always there. Of a base that is spread over processes, each has embedding, head,
its part of the layers, and two whole layers. Paged optimizer states are on the GPU while there is
room, but torch's allocator does not count them. The bytes per layer are computed beside
the layers: in `fused.layer`, `fused.bordered`, `fused.graphs` and `fused.model`, in `model.lora`
for PEFT's own modules, and in `model.base`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_harness.errors import SettingsError
from qlora_harness.model.shape import Shape
from qlora_harness.settings import Settings

GIB = 2**30
CONTEXT = 0.6 * GIB  # CUDA context and libraries, which the allocator does not count

# The ways to save memory, from the fastest to the leanest.
LADDER: tuple[dict[str, str], ...] = (
    {"checkpointing": "none"},
    {"checkpointing": "selective"},
    {"checkpointing": "full"},
    {"checkpointing": "offload"},
    {"checkpointing": "offload", "optimizer": "paged_adamw_8bit", "adapter_dtype": "bfloat16"},
)
_PRESETS = {"fast": 0, "balanced": 1, "lean": -1}


@dataclass(frozen=True)
class Ranks:
    """How many processes train, each on a GPU, and whether the base is spread over them."""

    count: int = 1
    sharded: bool = False


ONE_GPU = Ranks()


@dataclass(frozen=True)
class MemoryPlan:
    """A predicted peak in bytes, and the settings that it belongs to."""

    checkpointing: str
    optimizer: str
    adapter_dtype: str
    weights: int  # the base
    adapter: int
    states: int  # of the optimizer
    gradients: int  # of the adapter
    activations: int  # stored for the backward pass
    work: int  # of the current layer, the loss, and expanded weights
    host: int  # pinned host memory for activations, at most; not part of the peak
    graphs: bool  # whether passes run as CUDA graphs on one GPU
    processes: int = 1  # each with a GPU of its own; the plan is that of each
    sharded: bool = False  # whether the base is spread over them

    @property
    def peak(self) -> int:
        """The predicted peak."""
        held = self.weights + self.adapter + self.states
        both = self.activations, self.gradients
        return held + (sum(both) if self.graphs or self.processes > 1 else max(both)) + self.work

    def record(self) -> dict[str, Any]:
        """Returns the plan as training_summary.json holds it."""
        values = dataclasses.asdict(self) | {"peak": self.peak}
        return {"kept" if name == "activations" else name: v for name, v in values.items()}


def measure_shape(path: str, revision: str | None, targets: str) -> Shape:
    """Counts the parameters of a model's configuration, and those adapted by `targets`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_harness.fused.model import reason_against_config
    from qlora_harness.model.facts import head_size

    config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    every = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    linear = {name: module for name, module in every.items() if module is not head}
    adapted = linear
    if targets != "all-linear":
        names = {target.strip() for target in targets.split(",")}
        adapted = {name: m for name, m in every.items() if name.rsplit(".", 1)[-1] in names}
    sizes = [module.weight.numel() for module in linear.values()]
    heads, layers, size = config.num_attention_heads, config.num_hidden_layers, head_size(config)
    return Shape(
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        queries=heads * size,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
        layers=layers,
        vocabulary=head.weight.shape[0],
        linear=sum(sizes),
        rows=sum(_outputs(module) for module in linear.values()),
        largest=max(sizes),
        others=sum(p.numel() for p in model.parameters()) - sum(sizes),
        sides=sum(sum(module.weight.shape) for module in adapted.values()),
        outputs=sum(_outputs(module) for module in adapted.values()),
        adapted=len(adapted) / layers,
        fused=reason_against_config(config) is None
        and all(name.startswith("model.layers.") for name in adapted),
        head_norms=config.model_type == "qwen3",
    )


def _outputs(module: Any) -> int:
    """Outputs of a Linear or, with its weight transposed, a Conv1D."""
    return int(module.weight.shape[0 if hasattr(module, "out_features") else 1])


def uses_fused(shape: Shape, settings: Settings) -> bool:
    """Returns whether a run trains through fused layers."""
    return shape.fused and settings.allows_fused and settings.optimization.kernels == "auto"


def predict_memory(
    shape: Shape, settings: Settings, tokens: int, ranks: Ranks = ONE_GPU
) -> MemoryPlan:
    """Predicts each process's peak in a step whose largest pass has `tokens`, with padding."""
    from qlora_harness.fused import bordered, fp8_weights, graphs, layer, model
    from qlora_harness.model.base import expansion_bytes, weight_bytes
    from qlora_harness.model.lora import dora_activation_bytes, peft_activation_bytes

    optimization, lora, rank = settings.optimization, settings.lora, settings.lora.lora_r
    checkpointing, quant = optimization.checkpointing, settings.quant
    size = 2 if settings.model.compute_dtype != "float32" else 4
    parameters = rank * shape.sides + lora.use_dora * shape.outputs
    width = 2 if lora.adapter_dtype == "bfloat16" else 4
    host, uses_graphs = 0, False
    if uses_fused(shape, settings):
        in_bf16 = settings.model.compute == "bf16"
        planned = graphs.planned(shape, checkpointing, tokens, size)
        uses_graphs = in_bf16 and planned and ranks.count == 1
        if uses_graphs:
            tokens = graphs.padded(tokens)
        activations, work = layer.fused_activation_bytes(
            *(shape, rank),
            has_dropout=bool(lora.lora_dropout),
            checkpointing=checkpointing,
            tokens=tokens,
            size=size,
        )
        if uses_graphs:  # the last layer works in memory of its own
            work += work + graphs.buffer_bytes(shape, tokens, size)
        if in_bf16:
            shared = quant.is_4bit or ranks.sharded
            work += bordered.matrix_bytes(shape, rank, size, shared=shared)
        else:
            work += fp8_weights.working_bytes(shape, rank, tokens)
        host = model.host_bytes(shape, checkpointing, tokens, size)
    else:
        activations, work = peft_activation_bytes(shape, rank, checkpointing, tokens, size)
        work += expansion_bytes(shape, quant, size)
    if lora.use_dora:
        expanded = quant.is_quantised and lora.lora_dropout > 0
        more = dora_activation_bytes(shape, checkpointing, tokens, size, expanded=expanded)
        activations, work = activations + more[0], work + more[1]
    weights = weight_bytes(shape, quant, double_quant=settings.model.double_quant, size=size)
    if ranks.sharded:
        layers = weights - shape.others * size
        weights += layers // ranks.count + 2 * layers // shape.layers - layers
    return MemoryPlan(
        checkpointing=checkpointing,
        optimizer=optimization.optimizer,
        adapter_dtype=lora.adapter_dtype,
        weights=weights,
        adapter=parameters * width,
        states=int(parameters * _state_bytes(optimization.optimizer, width)),
        # DDP's buckets take those of the last pass; the sum of the passes before is beside them.
        gradients=parameters
        * width
        * (2 if ranks.count > 1 and optimization.grad_accum > 1 else 1),
        activations=activations,
        work=work,
        host=host,
        graphs=uses_graphs,
        processes=ranks.count,
        sharded=ranks.sharded,
    )


def _state_bytes(optimizer: str, width: int) -> float:
    """Bytes of the two states of a parameter of `width` bytes; 8-bit states share scales by 256."""
    if optimizer == "paged_adamw_32bit":
        return 8.0
    return 2 * (1 + 4 / 256) if "8bit" in optimizer else 2.0 * width


def largest_pass(lengths: Sequence[int], settings: Settings, *, fused: bool) -> int:
    """Returns the likely tokens of a run's largest forward pass; fused layers need no padding.

    `lengths` are the tokens of each training example.
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


def choose_memory_plan(
    shape: Shape, settings: Settings, lengths: Sequence[int], ranks: Ranks = ONE_GPU
) -> tuple[Settings, MemoryPlan, int]:
    """Applies `--memory`: returns the settings to run with, their plan and the tokens per pass.

    Without padding, a step learns the same in one pass or several: "fast" and "balanced" take
    one. `lengths` are the tokens of each example. Raises SettingsError if nothing fits.
    """
    fused = uses_fused(shape, settings)

    def planned(changed: Settings) -> tuple[Settings, MemoryPlan, int]:
        tokens = largest_pass(lengths, changed, fused=fused)
        return changed, predict_memory(shape, changed, tokens, ranks), tokens

    memory = settings.optimization.memory
    if memory is None:
        return planned(settings)
    rungs = rungs_of(fused)
    if not fused:
        rungs.append(LADDER[-1] | {"checkpointing": "full"})
    accumulated = settings.optimization.grad_accum
    passes = [accumulated]
    if fused:  # with padding, another batch would be padded differently
        passes = [n for n in range(1, accumulated + 1) if accumulated % n == 0]
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
    """Returns the rungs of the ladder for a model with or without fused layers."""
    return [rung for rung in LADDER if fused or rung["checkpointing"] in ("none", "full")]


def with_rung(settings: Settings, rung: Mapping[str, str]) -> Settings:
    """Returns settings with the values of a rung; with compute dtype float16 the adapter keeps its.

    Paged 32-bit AdamW becomes torch's, which updates alike without waiting at each parameter; its
    states have the adapter's dtype, so a bfloat16 adapter stays with the paged one.
    """
    optimization, lora = settings.optimization, settings.lora
    optimizer = optimization.optimizer
    if optimizer == "paged_adamw_32bit" and lora.adapter_dtype == "float32":
        optimizer = "adamw_torch"
    optimization = dataclasses.replace(
        optimization,
        checkpointing=rung["checkpointing"],
        optimizer=rung.get("optimizer", optimizer),
    )
    if settings.model.compute_dtype != "float16":
        dtype = rung.get("adapter_dtype", lora.adapter_dtype)
        lora = dataclasses.replace(lora, adapter_dtype=dtype)
    return dataclasses.replace(settings, optimization=optimization, lora=lora)


def _in_passes(settings: Settings, number: int) -> Settings:
    """Splits the same step into `number` forward passes."""
    optimization = settings.optimization
    whole = optimization.batch_size * optimization.grad_accum
    optimization = dataclasses.replace(optimization, batch_size=whole // number, grad_accum=number)
    return dataclasses.replace(settings, optimization=optimization)

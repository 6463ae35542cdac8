"""The shape of a model: what of it the memory of a training run depends on."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_harness.settings import Settings


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


def uses_fused(shape: Shape, settings: Settings) -> bool:
    """Returns whether a run goes through fused layers.

    Args:
        shape: From `measure_shape`.
        settings: Of the run.
    """
    return shape.fused and settings.optimization.kernels == "auto"

"""Reads the shape of a model, without its weights."""

from __future__ import annotations

from qlora_harness.model.shape import Shape
from qlora_harness.settings import Settings


def measure_shape(path: str, revision: str | None, targets: str) -> Shape:
    """Reads a model's configuration, of a folder or a Hub id, and counts its parameters.

    `targets` is that of `--lora-targets`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_harness.fused.model import reason_against_config
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
    heads, layers, size = config.num_attention_heads, config.num_hidden_layers, head_size(config)
    return Shape(
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        queries=heads * size,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
        layers=layers,
        vocabulary=head.weight.shape[0],
        linear=sum(sizes),
        largest=max(sizes),
        others=sum(p.numel() for p in model.parameters()) - sum(sizes),
        sides=sum(sum(weight.shape) for weight in adapted.values()),
        adapted=len(adapted) / layers,
        fused=reason_against_config(config) is None
        and all(name.startswith("model.layers.") for name in adapted),
        head_norms=config.model_type == "qwen3",
    )


def uses_fused(shape: Shape, settings: Settings) -> bool:
    """Returns whether a run goes through fused layers."""
    return shape.fused and settings.optimization.kernels == "auto"

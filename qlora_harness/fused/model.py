"""Lets a PEFT model of LLaMA's kind run its training pass through fused layers, in place.

The adapter stays PEFT's: the same parameters, saved and loaded by PEFT. Only what `forward` does
with a row (see `train.batches.pack_batch`) changes; any other input goes the model's own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from qlora_harness.fused import ops
from qlora_harness.fused.bordered import Projection, Scratch
from qlora_harness.fused.host_memory import HostMemory
from qlora_harness.fused.layer import FusedLayer
from qlora_harness.fused.lora_group import LoraGroup
from qlora_harness.fused.row import Row
from qlora_harness.settings import CHECKPOINTING

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def why_config_not_fused(config: Any) -> str | None:
    """Returns why a model of a configuration can't have fused layers, or None if it can.

    Args:
        config: A transformers model configuration.
    """
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type!r} is not one of {', '.join(sorted(MODEL_TYPES))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it has sliding-window attention"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    if getattr(config, "attention_dropout", 0.0):
        return f"it has attention dropout ({config.attention_dropout})"
    return None


def why_not_fused(model: Any) -> str | None:
    """Returns why a model can't have fused layers, or None if it can.

    Args:
        model: A PEFT model with LoRA on a causal language model.
    """
    from peft.tuners.lora import LoraLayer

    reason = why_config_not_fused(model.get_base_model().config)
    if reason is not None:
        return reason
    decoder = model.get_base_model().model
    known = {id(m) for layer in decoder.layers for m in layer.modules()}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if id(module) not in known:
            return f"it has an adapter outside its layers ({name.rsplit('.', 1)[-1]})"
        if list(module.lora_A) != ["default"] or any(module.use_dora.values()):
            return "its adapter is not one plain LoRA"
    return None


def install(model: Any, checkpointing: str) -> None:
    """Gives a model fused layers.

    They hold on to the weights, scales and adapters that the model has now: it must stay on its
    device and in its dtypes. Full-precision weights become views of larger matrices until
    `uninstall`.

    Args:
        model: For which `why_not_fused` is None; from `attach_lora`.
        checkpointing: One of `settings.CHECKPOINTING`.
    """
    assert checkpointing in CHECKPOINTING
    base = model.get_base_model()
    scratch, host = Scratch(), HostMemory()
    layers = [_fused_layer(layer, checkpointing, scratch, host) for layer in base.model.layers]
    base.forward = _Forward(base, layers, base.forward)


def uninstall(model: Any) -> None:
    """Gives a model its own forward back.

    Args:
        model: On which `install` was called.
    """
    base = model.get_base_model()
    base.forward.release()
    base.forward = base.forward.own


class _Forward:
    """The model's forward; a row of texts goes through the fused layers."""

    def __init__(self, base: Any, layers: list[FusedLayer], own: Callable[..., Any]) -> None:
        self._base, self._layers, self.own = base, layers, own

    def release(self) -> None:
        """Gives full-precision weights memory of their own again."""
        for layer in self._layers:
            for group in layer.groups():
                group.release()

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        borders: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if borders is None:
            return self.own(input_ids=input_ids, **options)
        assert input_ids is not None
        if not self._layers[0].has_adapters_of(self._base.model.layers[0]):
            raise RuntimeError("the adapter's parameters were replaced after `install`")
        return self._row(input_ids, borders, **options)

    def _row(
        self,
        input_ids: torch.Tensor,
        borders: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        starts: tuple[int, ...],
        longest: int,
        read_at: torch.Tensor,
        read_token: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        per_token: bool = False,
        **ignored: Any,
    ) -> CausalLMOutput:
        base, decoder = self._base, self._base.model
        hidden = decoder.embed_tokens(input_ids)
        cos, sin = decoder.rotary_emb(hidden, position_ids)
        hidden = hidden[0]
        row = Row(borders, starts, longest, cos[0].to(hidden.dtype), sin[0].to(hidden.dtype))
        added: torch.Tensor | None = None
        for layer in self._layers[:-1]:
            hidden, added = layer(hidden, added, row, training=base.training)
        # The rest of the last layer, the norm and the head run only where a token is learned.
        hidden, added = self._layers[-1](
            hidden, added, row, training=base.training, places=read_at if len(read_at) else None
        )
        with torch.autocast(hidden.device.type, enabled=False):
            read = decoder.norm((hidden + added)[: len(read_at)])
            if per_token:
                losses = ops.cross_entropies(read, base.lm_head.weight, read_token)
                return CausalLMOutput(loss=losses)
            total = ops.summed_cross_entropy(read, base.lm_head.weight, read_token)
        count = len(read_token) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count)


def _fused_layer(layer: Any, checkpointing: str, scratch: Scratch, host: HostMemory) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    size = attention.head_dim

    def group(*modules: Any) -> LoraGroup:
        return LoraGroup([_projection(m) for m in modules], scratch)

    return FusedLayer(
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        layer.input_layernorm.variance_epsilon,
        attention.q_proj.out_features // size,
        attention.k_proj.out_features // size,
        size,
        attention.scaling,
        group(attention.q_proj, attention.k_proj, attention.v_proj),
        group(attention.o_proj),
        group(mlp.gate_proj, mlp.up_proj),
        group(mlp.down_proj),
        checkpointing,
        (attention.q_norm.weight, attention.k_norm.weight)
        if hasattr(attention, "q_norm")
        else None,
        host,
    )


def _projection(module: Any) -> Projection:
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return Projection(module, None, None, 0.0, 0.0)
    return Projection(
        module.base_layer,
        module.lora_A["default"].weight,
        module.lora_B["default"].weight,
        float(module.scaling["default"]),
        float(getattr(module.lora_dropout["default"], "p", 0.0)),
    )

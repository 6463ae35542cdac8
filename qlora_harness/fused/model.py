"""Lets a model of LLaMA's kind compute rows through fused layers, beside its own modules.

The adapter stays PEFT's: the same parameters, saved and loaded by PEFT. In training only what
`forward` does with a row (see `train.batches.pack_batch`) changes; any other input goes the model's
own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from qlora_harness.fused import cross_entropy
from qlora_harness.fused.bordered import Projection, Scratch
from qlora_harness.fused.host_memory import HostMemory
from qlora_harness.fused.layer import Attend, FusedLayer
from qlora_harness.fused.lora_group import LoraGroup
from qlora_harness.fused.row import Rotation, Row
from qlora_harness.model.base import base_of, is_plain_linear
from qlora_harness.model.plain_lora import is_plain
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
        model: A causal language model, with or without a PEFT adapter.
    """
    base = base_of(model)
    reason = why_config_not_fused(base.config)
    if reason is None and base is not model:
        reason = _why_adapter_not_fused(model, base.model.layers)
    if reason is not None:
        return reason
    dtype = base.model.embed_tokens.weight.dtype
    for layer in base.model.layers:
        dropouts = set()
        for group in _groups(layer):
            projections = [_projection(module) for module in group]
            if not all(_is_linear(p.layer, dtype) for p in projections):
                return "its weights are neither 4-bit nor of its own dtype"
            pairs = [(p, p.down) for p in projections if p.down is not None]
            if len({(len(down), p.scale, down.dtype) for p, down in pairs}) > 1:
                return "the ranks or scales of its adapter differ within a layer"
            dropouts |= {p.dropout for p, _ in pairs}
        if len(dropouts) > 1:
            return "the dropout of its adapter differs within a layer"
    return None


def _why_adapter_not_fused(model: Any, layers: Any) -> str | None:
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    known = {id(m) for layer in layers for m in layer.modules()}
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"its adapter replaces a module ({last})"
        if not isinstance(module, LoraLayer):
            continue
        if id(module) not in known:
            return f"it has an adapter outside its layers ({last})"
        if not is_plain(module):
            return "its adapter is not one plain LoRA"
    return None


def _is_linear(layer: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether a layer's weight is 4-bit, as bitsandbytes lays it out first, or of a dtype."""
    if not is_plain_linear(layer):
        return False
    state: Any = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.dtype == dtype
    return not getattr(state, "packing_format_for_cpu", False)


def install(model: Any, checkpointing: str) -> None:
    """Gives a model fused layers.

    See `FusedDecoder` for what the model must keep until `uninstall`.

    Args:
        model: For which `why_not_fused` is None; from `attach_lora`.
        checkpointing: One of `settings.CHECKPOINTING`.
    """
    base = base_of(model)
    base.forward = _Forward(base, FusedDecoder(model, checkpointing), base.forward)


def uninstall(model: Any) -> None:
    """Gives a model its own forward back.

    Args:
        model: On which `install` was called.
    """
    base = base_of(model)
    base.forward.fused.release()
    base.forward = base.forward.own


class FusedDecoder:
    """Fused layers beside those of a model.

    They hold on to the weights, scales and adapters that the model has now: it must stay on its
    device and in its dtypes. Full-precision weights become views of larger matrices until
    `release`.

    Args:
        model: For which `why_not_fused` is None.
        checkpointing: One of `settings.CHECKPOINTING`.

    Attributes:
        layers: In their order.
    """

    def __init__(self, model: Any, checkpointing: str = "none") -> None:
        assert checkpointing in CHECKPOINTING
        self._decoder = base_of(model).model
        scratch, host = Scratch(), HostMemory()
        self.layers = [
            _fused_layer(layer, checkpointing, scratch, host) for layer in self._decoder.layers
        ]
        # Two of three: as many as can be copied while an H100 computes a forward pass.
        for number, layer in enumerate(self.layers):
            layer.gates_on_host = number % 3 != 0

    def release(self) -> None:
        """Gives full-precision weights memory of their own again; the layers are of no use then."""
        for layer in self.layers:
            for group in layer.groups():
                group.release()

    def embed(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Rotation]:
        """Returns what the first layer reads, [T, H], and how tokens are rotated.

        Args:
            input_ids: [1, T].
            position_ids: [1, T].
        """
        hidden = self._decoder.embed_tokens(input_ids)
        cos, sin = self._decoder.rotary_emb(hidden, position_ids)
        hidden = hidden[0]
        return hidden, Rotation(cos[0].to(hidden.dtype), sin[0].to(hidden.dtype))

    def infer(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attend: Attend,
        read_at: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the normalised hidden states of some tokens, [R, H], without gradients.

        Args:
            input_ids: [1, T].
            position_ids: [1, T].
            attend: Computes attention.
            read_at: Places of the tokens, [R] int64.
        """
        hidden, rotation = self.embed(input_ids, position_ids)
        added: torch.Tensor | None = None
        *below, last = self.layers
        for layer in below:
            hidden, added = layer.infer(hidden, added, rotation, attend)
        hidden, added = last.infer(hidden, added, rotation, attend, read_at)
        normed: torch.Tensor = self._decoder.norm(hidden + added)
        return normed


class _Forward:
    """The model's forward; a row of texts goes through the fused layers."""

    def __init__(self, base: Any, fused: FusedDecoder, own: Callable[..., Any]) -> None:
        self._base, self.fused, self.own = base, fused, own

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        borders: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if borders is None:
            return self.own(input_ids=input_ids, **options)
        assert input_ids is not None
        if not self.fused.layers[0].has_adapters_of(self._base.model.layers[0]):
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
        hidden, rotation = self.fused.embed(input_ids, position_ids)
        row = Row(rotation.cos, rotation.sin, borders, starts, longest)
        added: torch.Tensor | None = None
        *below, last = self.fused.layers
        for layer in below:
            hidden, added = layer(hidden, added, row, training=base.training)
        # The rest of the last layer, the norm and the head run only where a token is learned.
        places = read_at if len(read_at) else None
        hidden, added = last(hidden, added, row, training=base.training, places=places)
        with torch.autocast(hidden.device.type, enabled=False):
            read = decoder.norm((hidden + added)[: len(read_at)])
            if per_token:
                losses = cross_entropy.cross_entropies(read, base.lm_head.weight, read_token)
                return CausalLMOutput(loss=losses)
            total = cross_entropy.summed_cross_entropy(read, base.lm_head.weight, read_token)
        count = len(read_token) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count)


def _fused_layer(layer: Any, checkpointing: str, scratch: Scratch, host: HostMemory) -> FusedLayer:
    attention = layer.self_attn
    size = attention.head_dim
    qkv, out, gate_up, down = (_lora_group(modules, scratch) for modules in _groups(layer))
    return FusedLayer(
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        layer.input_layernorm.variance_epsilon,
        attention.q_proj.out_features // size,
        attention.k_proj.out_features // size,
        size,
        attention.scaling,
        qkv,
        out,
        gate_up,
        down,
        checkpointing,
        (attention.q_norm.weight, attention.k_norm.weight)
        if hasattr(attention, "q_norm")
        else None,
        host,
    )


def _groups(layer: Any) -> list[list[Any]]:
    """The linear layers of a decoder layer, those that read one input together."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def _lora_group(modules: list[Any], scratch: Scratch) -> LoraGroup:
    return LoraGroup([_projection(module) for module in modules], scratch)


def _projection(module: Any) -> Projection:
    if not hasattr(module, "lora_A"):
        return Projection(module, None, None, 0.0, 0.0)
    return Projection(
        module.base_layer,
        module.lora_A["default"].weight,
        module.lora_B["default"].weight,
        float(module.scaling["default"]),
        float(getattr(module.lora_dropout["default"], "p", 0.0)),
    )

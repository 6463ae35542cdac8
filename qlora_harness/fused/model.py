"""Fused layers for models of LLaMA's kind, which share weights and PEFT adapter with the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from qlora_harness.fused import cross_entropy, fp8
from qlora_harness.fused.bordered import Projection, Scratch
from qlora_harness.fused.fp8_group import Fp8Group
from qlora_harness.fused.graphs import LayerGraphs
from qlora_harness.fused.group import Group
from qlora_harness.fused.host_memory import HostMemory, pinned_bytes, to_device
from qlora_harness.fused.layer import Attend, FusedLayer
from qlora_harness.fused.lora_group import LoraGroup
from qlora_harness.fused.packed_row import PackedRow, Rotation
from qlora_harness.model.base import is_plain_linear, why_not_plain
from qlora_harness.model.by_layer import MODEL_TYPES
from qlora_harness.model.facts import base_of
from qlora_harness.model.plain_lora import is_plain
from qlora_harness.model.rope import why_by_length
from qlora_harness.model.shape import Shape
from qlora_harness.model.sharded import sharded_layers
from qlora_harness.settings import CHECKPOINTING, COMPUTE

# With selective checkpointing, every third layer recomputes its gates; the others copy them to the
# host: as many as fit into the time of a forward pass on an H100.
_THIRD = 3


def reason_against_config(config: Any) -> str | None:
    """Returns why a configuration's model can't have fused layers, or None if it can."""
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type!r} is not one of {', '.join(sorted(MODEL_TYPES))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it has sliding-window attention"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    if getattr(config, "attention_dropout", 0.0):
        return f"it has attention dropout ({config.attention_dropout})"
    return why_by_length(config)


class FusedDecoder:
    """The fused layers of a model.

    `FusedDecoder(model)` builds them; `infer` then computes hidden states without gradients.
    `attach` also replaces the model's `forward` until `detach`: batches of
    `train.batches.pack_batch`, which have `borders`, run the fused layers, others the model's own.

    The layers hold the model's current weights and adapters, so it must not change device or dtype.
    Full-precision weights become views of larger matrices until `detach`.

    `compute` is one of `settings.COMPUTE`; "fp8" requires that `reason_against_fp8` is None, or a
    CPU, which rounds the same way but gains nothing.
    """

    def __init__(
        self,
        model: Any,
        checkpointing: str = "none",
        longest: int | None = None,
        *,
        compute: str = "bf16",
    ) -> None:
        assert checkpointing in CHECKPOINTING
        assert compute in COMPUTE
        self._base = base_of(model)
        self._decoder = self._base.model
        self._own_forward: Callable[..., Any] = self._base.forward
        self._sharded = sharded_layers(self._base)
        scratch, self._host = Scratch(sharded=self._sharded is not None), HostMemory()
        self.layers: list[FusedLayer] = []
        for number, layer in enumerate(self._decoder.layers):
            if self._sharded is not None:  # biases, and the largest weight for FP8, are read
                self._sharded.fetch(number)
            fused = _fused_layer(layer, checkpointing, compute, scratch, self._host)
            fused.gates_on_host = number % _THIRD != 0
            fused.number, fused.sharded = number, self._sharded
            self.layers.append(fused)
        self._has_dropout = any(layer.dropout for layer in self.layers)
        # FP8 pays in long rows, whose kernels take longer than their launches.
        self.graphs = LayerGraphs(self.layers[:-1] if compute == "bf16" else [], longest)

    @staticmethod
    def reason_against(model: Any) -> str | None:
        """Returns why a model, with or without an adapter, can't have them, or None if it can."""
        base = base_of(model)
        reason = reason_against_config(base.config) or why_not_plain(base)
        if reason is None and base is not model:
            reason = _reason_against_adapter(model, base.model.layers)
        return reason or _reason_against_layers(base)

    @staticmethod
    def reason_against_fp8(model: Any) -> str | None:
        """Returns why fused layers can't multiply in FP8, or None if they can."""
        base = base_of(model)
        weight = base.model.embed_tokens.weight
        reason = FusedDecoder.reason_against(model) or fp8.why_unavailable(weight.device)
        if reason is None and weight.dtype != torch.bfloat16:
            reason = f"its dtype is {str(weight.dtype).removeprefix('torch.')}, not bfloat16"
        sizes = {
            size
            for layer in base.model.layers
            for group in _groups(layer)
            for module in group
            for size in (module.in_features, module.out_features)
        }
        odd = [size for size in sorted(sizes) if size % fp8.MULTIPLE]
        if reason is None and odd:
            reason = f"it has layers of size {odd[0]}, which is no multiple of {fp8.MULTIPLE}"
        return reason

    @classmethod
    def attach(
        cls,
        model: Any,
        checkpointing: str,
        longest: int | None = None,
        *,
        compute: str = "bf16",
    ) -> FusedDecoder:
        """Builds the layers and replaces the model's `forward`.

        `longest` is the number of tokens of the longest row, if known: host memory is pinned for it
        in advance, and `graphs.LayerGraphs` needs it.
        """
        decoder = cls(model, checkpointing, longest, compute=compute)
        if longest is not None and decoder._base.device.type == "cuda":
            config, weight = decoder._base.config, decoder._decoder.embed_tokens.weight
            tensors, elements = _stored_on_host(
                checkpointing, len(decoder.layers), config.hidden_size, config.intermediate_size
            )
            decoder._host.reserve(tensors, elements * longest * weight.element_size())
        decoder._base.forward = decoder
        if decoder._sharded is not None:
            # Trainer's would copy the layers out of their buffers, from "cpu" to "cpu:0".
            model.to = lambda *_, **__: model
        return decoder

    def detach(self) -> None:
        """Restores the model's `forward` and weights; the layers are unusable afterwards."""
        for layer in self.layers:
            for group in layer.groups():
                group.release()
        self.graphs.release()
        self._base.forward = self._own_forward

    def __call__(
        self, input_ids: Tensor | None = None, borders: Tensor | None = None, **options: Any
    ) -> Any:
        """Replaces the model's `forward`; returns the loss of a packed row."""
        if borders is None:
            return self._own_forward(input_ids=input_ids, **options)
        assert input_ids is not None
        if not self.layers[0].has_adapters_of(self._decoder.layers[0]):
            raise RuntimeError("the adapter's parameters were replaced after `attach`")
        return CausalLMOutput(loss=self._row_loss(input_ids, borders, **options))

    def _row_loss(
        self,
        input_ids: Tensor,
        borders: Tensor,
        *,
        position_ids: Tensor,
        starts: tuple[int, ...],
        longest: int,
        read_at: Tensor,
        read_token: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        per_token: bool = False,
        **ignored: Any,
    ) -> Tensor:
        """Returns the losses at `read_at`, [R], if `per_token`; else their sum per item."""
        hidden, rotation = self._embed(input_ids, position_ids)
        row = PackedRow(rotation.cos, rotation.sin, borders, starts, longest)
        seeds = self._draw_seeds(hidden)
        added: Tensor | None = None
        if self.graphs.serve(hidden):
            hidden, added = self.graphs(hidden, row, seeds)
        else:
            for number, layer in enumerate(self.layers[:-1]):
                seed = None if seeds is None else seeds[number]
                hidden, added = layer(hidden, added, row, seed=seed)
        # The rest of the last layer, the norm and the head run only at learned tokens.
        learned = read_at if len(read_at) else None
        seed = None if seeds is None else seeds[-1]
        hidden, added = self.layers[-1](hidden, added, row, seed=seed, read_at=learned)
        head = self._base.lm_head.weight
        with torch.autocast(hidden.device.type, enabled=False):
            read = self._decoder.norm((hidden + added)[: len(read_at)])
            if per_token:
                return cross_entropy.cross_entropies(read, head, read_token)
            total = cross_entropy.summed_cross_entropy(read, head, read_token)
        return total / (len(read_token) if num_items_in_batch is None else num_items_in_batch)

    def infer(
        self, input_ids: Tensor, position_ids: Tensor, attend: Attend, read_at: Tensor
    ) -> Tensor:
        """Returns the normalised hidden states at `read_at`, [R, H], without gradients.

        Ids and positions are [1, T].
        """
        hidden, rotation = self._embed(input_ids, position_ids)
        added: Tensor | None = None
        *below, last = self.layers
        for layer in below:
            hidden, added = layer.infer(hidden, added, rotation, attend)
        hidden, added = last.infer(hidden, added, rotation, attend, read_at)
        normed: Tensor = self._decoder.norm(hidden + added)
        return normed

    def _draw_seeds(self, like: Tensor) -> Tensor | None:
        """Returns a seed of dropout for each layer, [layers, 2]; None if nothing is dropped.

        They come from torch's generator, which seeding, checkpoints and resuming cover.
        """
        if not self._base.training or not self._has_dropout:
            return None
        # Twice, since kernels are compiled for addresses that are multiples of 16 bytes.
        seeds = torch.randint(0, 2**62, (len(self.layers), 1)).repeat(1, 2)
        return to_device(seeds, like.device) if self.layers[0].packs_masks(like) else seeds

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Rotation]:
        """Returns the embeddings, [T, H], and the tokens' rotation."""
        if self._sharded is not None and not torch.is_grad_enabled():
            self._sharded.begin_pass()
        hidden = self._decoder.embed_tokens(input_ids)
        cos, sin = self._decoder.rotary_emb(hidden, position_ids)
        hidden = hidden[0]
        return hidden, Rotation(cos[0].to(hidden.dtype), sin[0].to(hidden.dtype))


def host_bytes(shape: Shape, checkpointing: str, tokens: int, size: int) -> int:
    """Returns the most host memory that a model's layers pin, in bytes; an element takes `size`."""
    tensors, elements = _stored_on_host(checkpointing, shape.layers, shape.hidden, shape.inner)
    return pinned_bytes(tensors, elements * size * tokens)


def _stored_on_host(checkpointing: str, layers: int, hidden: int, inner: int) -> tuple[int, int]:
    """Returns how many tensors a pass stores in host memory, and the elements of each per token."""
    return {
        "selective": (layers - -(-layers // _THIRD), 2 * inner),
        "offload": (layers, hidden),
    }.get(checkpointing, (0, 0))


def _reason_against_adapter(model: Any, layers: Any) -> str | None:
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = {id(m) for layer in layers for m in layer.modules()}
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"its adapter replaces a module ({last})"
        if not isinstance(module, LoraLayer):
            continue
        if id(module) not in inside:
            return f"it has an adapter outside its layers ({last})"
        if not is_plain(module):
            return "its adapter is not one plain LoRA"
    return None


def _reason_against_layers(base: Any) -> str | None:
    dtype = base.model.embed_tokens.weight.dtype
    if dtype == torch.float16:
        # The cross-entropy computes gradients before it knows the scale that float16 needs.
        return "its dtype is float16"
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


def _is_linear(layer: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether a linear layer's weight has a dtype, or 4 bits in bitsandbytes' original layout."""
    if not is_plain_linear(layer):
        return False
    state: Any = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.dtype == dtype
    return not getattr(state, "packing_format_for_cpu", False)


def _fused_layer(
    layer: Any, checkpointing: str, compute: str, scratch: Scratch, host: HostMemory
) -> FusedLayer:
    attention = layer.self_attn
    size = attention.head_dim
    kind: type[Fp8Group] | type[LoraGroup] = Fp8Group if compute == "fp8" else LoraGroup
    groups: list[Group] = [
        kind([_projection(module) for module in modules], scratch) for modules in _groups(layer)
    ]
    qkv, out, gate_up, down = groups
    normed = hasattr(attention, "q_norm")
    return FusedLayer(
        attention_norm=layer.input_layernorm.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        eps=layer.input_layernorm.variance_epsilon,
        heads=attention.q_proj.out_features // size,
        key_heads=attention.k_proj.out_features // size,
        head_size=size,
        scale=attention.scaling,
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        checkpointing=checkpointing,
        head_norms=(attention.q_norm.weight, attention.k_norm.weight) if normed else None,
        host=host,
    )


def _groups(layer: Any) -> list[list[Any]]:
    """Groups the linear layers of a decoder layer by their input."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


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

"""A forward pass over a pack of the prefix tree, with attention along the tree's paths.

Each token attends to its ancestors and itself, and its position is its depth in the tree, so its
hidden state is the same as in the text alone. The output head runs only where a log-probability is
read; fused layers also skip the rest of the last layer elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_harness.fused.host_memory import to_device
from qlora_harness.fused.layer import Attend
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.compute_dtype import has_bfloat16
from qlora_harness.model.facts import base_of, head_size
from qlora_harness.model.plain_lora import FastLora
from qlora_harness.model.rope import why_by_length
from qlora_harness.model.sharded import sharded_layers
from qlora_harness.score.output_head import OutputHead
from qlora_harness.score.prefix_tree import Pack, Query, plan
from qlora_harness.score.tree_attention import BLOCK, TreeAttention, attending, tree_blocks

logger = logging.getLogger("qlora_harness")

_SMALLEST_HEAD = 16  # that FlexAttention takes

# Decoders whose attention is causal, uses transformers' attention interface, and takes positions
# from position_ids only. HFLM scores all others.
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "granite", "phi3")
PACKED_MODEL_TYPES = frozenset([*_LLAMA_LIKE, "gpt2", "gpt_neox"])


class Reads(NamedTuple):
    """Results for the R tokens that were read from a pack."""

    logprobs: NDArray[np.float64]  # nats, [R]
    greedy: NDArray[np.bool_]  # whether the token was the most probable, [R]


def why_unsupported(config: Any) -> str | None:
    """Returns why a model of this configuration can't be scored in packs, or None if it can."""
    kind = getattr(config, "model_type", None)
    if kind not in PACKED_MODEL_TYPES:
        return f"model type {kind!r} is not among those checked"
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        return f"it has layers of type {', '.join(sorted(layers - {'full_attention'}))}"
    sliding = getattr(config, "sliding_window", None)
    if sliding and getattr(config, "use_sliding_window", True):
        return f"it has sliding-window attention ({sliding} tokens)"
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None):
            return f"its configuration has {name}"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "its attention scale depends on the layer"
    return why_by_length(config)


class Running(NamedTuple):
    """A started pack, which a GPU may still be computing."""

    logprobs: torch.Tensor
    greedy: torch.Tensor

    def reads(self) -> Reads:
        """Waits for the pack and returns its results."""
        return Reads(self.logprobs.double().cpu().numpy(), self.greedy.cpu().numpy())


class PackedModel:
    """Computes packs with a transformers model, with or without a PEFT adapter.

    With fused layers the model must keep its device, dtypes and adapter, and its full-precision
    weights become views of larger matrices; its modules still compute the same numbers. Otherwise
    plain LoRA layers are replaced while a pack is computed (see `plain_lora.FastLora`).

    Args:
        softmax_dtype: dtype of the log-softmax; None is float32.
        flex: On a GPU that Triton supports, the default: packs attend with a kernel rather than by
            segment, and generation with FlexAttention rather than with matrix products.
        fused: Uses fused layers rather than the model's modules; the default if they support it.
        compute: How fused layers multiply by the base; see `FusedDecoder`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        softmax_dtype: torch.dtype | None,
        *,
        flex: bool | None = None,
        fused: bool | None = None,
        compute: str = "bf16",
    ) -> None:
        self._model = base_of(model)
        self._decoder = getattr(self._model, self._model.base_model_prefix)
        self._head = OutputHead(self._model.get_output_embeddings())
        # Granite divides its logits after the head.
        self._logits_scaling = float(getattr(self._model.config, "logits_scaling", 1.0) or 1.0)
        self._softmax_dtype = softmax_dtype
        self.config = self._model.config
        self.device = next(model.parameters()).device
        self.dtype = self._model.get_input_embeddings().weight.dtype
        has_triton = self.device.type == "cuda" and has_bfloat16(self.device)
        fits = has_triton and head_size(model.config) >= _SMALLEST_HEAD
        self.flex = fits if flex is None else flex
        self._by_block = has_triton and flex is not False
        if fused is None:
            fused = FusedDecoder.reason_against(model) is None
        self._fused = FusedDecoder(model, compute=compute) if fused else None
        # Fused layers and a base alone have no LoRA layers to replace.
        plain = fused or self._model is model
        self._fast_lora = contextlib.nullcontext() if plain else FastLora(model, self.dtype)
        # Modules of transformers may wait for the device, which a graph can't.
        self.has_graphs = self.overlaps and self.flex and fused and compute == "bf16"
        self._building: threading.Thread | None = None

    @property
    def overlaps(self) -> bool:
        """Whether the device computes one pack while the host prepares the next."""
        return self.device.type == "cuda"

    @property
    def is_sharded(self) -> bool:
        """Whether the base is spread over processes, which must all compute or join each pack."""
        return sharded_layers(self._model) is not None

    def join(self) -> None:
        """Takes part in the packs that other processes still compute."""
        if (sharded := sharded_layers(self._model)) is not None:
            sharded.join_passes()

    def build_ahead(self) -> None:
        """Builds the kernels in a thread, with a pack of one token.

        The first pack waits for the thread and raises its errors again. Until then nothing else may
        use the model.
        """
        device = torch.cuda.current_device() if self.device.type == "cuda" else None

        def build() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # each thread has its own setting
                (one_token,) = plan([Query([0], [0])], pack_tokens=1, window=1)
                self._start(one_token).reads()
            except Exception as error:  # noqa: BLE001  # the first pack raises it again
                logger.info("kernels could not be built ahead (%s)", type(error).__name__)

        self.wait()
        self._building = threading.Thread(target=build, name="qlora_harness kernels", daemon=True)
        self._building.start()

    def wait(self) -> None:
        """Waits for `build_ahead`."""
        if self._building is not None:
            self._building.join()
            self._building = None

    def close(self) -> None:
        """Undoes what fused layers did to the model's weights; nothing can be computed then."""
        self.wait()
        if self._fused is not None:
            self._fused.detach()

    def start(self, pack: Pack) -> Running:
        """Starts a pack without waiting for a GPU."""
        self.wait()
        return self._start(pack)

    @torch.inference_mode()
    def _start(self, pack: Pack) -> Running:
        tokens, positions, tree = self.lay_out(pack)
        # The head runs once for choices that follow the same token.
        distinct, which = map(self._moved, np.unique(pack.read_at, return_inverse=True))
        read = self._head.read(
            self._hidden(tokens, positions, tree, distinct),
            which,
            self._moved(pack.read_token),
            scaling=self._logits_scaling,
            softmax_dtype=self._softmax_dtype,
        )
        return Running(*read)

    def lay_out(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor, TreeAttention]:
        """Returns a pack's ids and positions on the device, and its attention.

        The kernel takes whole blocks, so it has padding tokens, which no other token sees.
        """
        size = len(pack.tokens)
        padding = (0, -size % BLOCK if self._by_block else 0)
        blocks = None
        if self._by_block:
            alone = np.arange(size + 1, size + padding[1] + 1, dtype=np.int32)
            blocks = tree_blocks(np.concatenate([pack.end, alone]), self.device)
        tokens, positions = (self._moved(np.pad(x, padding)) for x in (pack.tokens, pack.positions))
        return tokens, positions, TreeAttention(pack.segments, blocks)

    def next_tokens(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend, at: torch.Tensor
    ) -> torch.Tensor:
        """Returns the likeliest tokens after those `at`, [R]; ids and positions are [T]."""
        return self._head.likeliest(self._hidden(tokens, positions, attend, at))

    def _hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend, at: torch.Tensor
    ) -> torch.Tensor:
        """The last hidden states at the tokens `at`, [R, H]."""
        if self._fused is not None:
            return self._fused.infer(tokens[None], positions[None], attend, at)
        with attending(self._model, attend), self._fast_lora:
            hidden: torch.Tensor = self._decoder(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False
            )[0]
        return hidden[0, at]

    def _moved(self, values: Any) -> torch.Tensor:
        """Copies integers to the device as int64, without waiting for it."""
        return to_device(torch.from_numpy(values.astype(np.int64)), self.device)

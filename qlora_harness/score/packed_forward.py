"""One forward pass over a pack of the prefix tree, with attention along the tree's paths only.

Each token sees its ancestors and itself, and its position is its distance from the root, so its
hidden state is the one it has in the text alone. The output head runs only where a log-probability
is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora_harness.score.prefix_tree import Pack, Segment

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ATTENTION = "qlora_harness_tree"
_BLOCK = 128

# Decoders whose whole attention goes through transformers' attention interface, causal, with
# positions given by position_ids. Others fall back to HFLM's own path.
MODEL_TYPES = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gpt2",
        "gpt_neox",
        "smollm3",
        "olmo2",
        "granite",
        "phi3",
    }
)


@dataclass
class _Tree:
    """The pack that the attention function works on."""

    segments: tuple[Segment, ...]
    block_mask: BlockMask | None


_active: _Tree | None = None


@dataclass(frozen=True)
class Reads:
    """What was read from a pack.

    Attributes:
        logprobs: Log-probability of each token asked about, nats, [R] float64.
        greedy: Whether it was the most probable one, [R] bool.
    """

    logprobs: np.ndarray[Any, np.dtype[np.float64]]
    greedy: np.ndarray[Any, np.dtype[np.bool_]]


def why_unsupported(config: Any) -> str | None:
    """Returns why a model can't be scored in packs, or None if it can.

    Args:
        config: A transformers model configuration.
    """
    kind = getattr(config, "model_type", None)
    if kind not in MODEL_TYPES:
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
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    rope = (scaling or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        return f"its rotary embedding ({rope}) depends on the length of the text"
    return None


def use_fused_kernels(model: torch.nn.Module) -> bool:
    """Replaces norms, gated products and rotary embeddings by Liger's fused kernels, on CUDA.

    Args:
        model: A causal language model, with or without a PEFT adapter.

    Returns:
        Whether it was done: liger-kernel is installed and knows the architecture.
    """
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    if base.device.type != "cuda" or find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(base.config.model_type)
    if apply is None:
        return False
    apply(cross_entropy=False, fused_linear_cross_entropy=False, model=base)
    return True


class PackedModel:
    """Computes packs with a causal language model.

    Args:
        model: A transformers causal language model, with or without a PEFT adapter.
        softmax_dtype: dtype of the log-softmax, or None for that of the logits.
        flex: Whether attention is FlexAttention with a block mask, or one call of scaled dot
            product attention a segment; None is FlexAttention on CUDA.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        softmax_dtype: torch.dtype | None,
        *,
        flex: bool | None = None,
    ) -> None:
        _register()
        whole: Any = model
        self._model = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        self._decoder = getattr(self._model, self._model.base_model_prefix)
        self._head = self._model.get_output_embeddings()
        # Granite divides its logits, a rule that stands in forward() behind the head.
        self._logits_scaling = float(getattr(self._model.config, "logits_scaling", 1.0) or 1.0)
        self._softmax_dtype = softmax_dtype
        self._device = next(model.parameters()).device
        self._flex = self._device.type == "cuda" if flex is None else flex

    @torch.inference_mode()
    def read(self, pack: Pack, pad_to: int | None = None) -> Reads:
        """Runs one pack and reads the log-probabilities asked of it.

        Args:
            pack: From `prefix_tree.plan`.
            pad_to: Length to fill the pack up to, so that GPU kernels are built once.
        """
        size = max(len(pack.tokens), pad_to or 0)
        tokens = _filled(pack.tokens, size, 0)
        positions = _filled(pack.positions, size, 0)
        mask = None
        if self._flex:
            # A token of the filling has no descendants: only itself sees it.
            alone = np.arange(len(pack.tokens) + 1, size + 1, dtype=np.int32)
            mask = _block_mask(np.concatenate([pack.end, alone]), self._device)
        segments = pack.segments
        if size > len(pack.tokens) and not self._flex:
            segments = (*segments, Segment(len(pack.tokens), size, ()))
        with _attending(self._model, _Tree(segments, mask)):
            hidden = self._decoder(
                input_ids=torch.from_numpy(tokens)[None].to(self._device, torch.int64),
                position_ids=torch.from_numpy(positions)[None].to(self._device, torch.int64),
                use_cache=False,
            )[0][0]
        places = torch.from_numpy(pack.read_at).to(self._device, torch.int64)
        asked = torch.from_numpy(pack.read_token).to(self._device, torch.int64)
        # Choices of one question read the same place: the head runs once for them.
        distinct, which = torch.unique(places, return_inverse=True)
        logits = self._head(hidden[distinct]) / self._logits_scaling
        logprobs = torch.log_softmax(logits, dim=-1, dtype=self._softmax_dtype)
        greedy = logprobs.argmax(dim=-1)[which] == asked
        return Reads(
            logprobs[which, asked].double().cpu().numpy(),
            greedy.cpu().numpy(),
        )


def _filled(values: Any, size: int, filler: int) -> Any:
    out = np.full(size, filler, dtype=np.int32)
    out[: len(values)] = values
    return out


@contextmanager
def _attending(model: Any, tree: _Tree) -> Iterator[None]:
    """Lets the model's layers attend along a tree inside the `with` block."""
    global _active
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    _active = tree
    try:
        yield
    finally:
        _active = None
        model.set_attn_implementation(before)


@lru_cache(maxsize=1)
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _tree_attention)


def _tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the active pack, as transformers' attention interface wants it.

    Args:
        module: The attention layer.
        query: [1, H, T, D].
        key: [1, K, T, D]; H is a multiple of K.
        value: [1, K, T, D].
        attention_mask: Not used: the tree is the mask.
        scaling: Factor of the scores, or None for 1 / sqrt(D).
        **options: What else the layers pass along.

    Returns:
        [1, T, H, D], and no weights.
    """
    assert _active is not None
    if _active.block_mask is not None:
        out = _flex(query.device.type == "cuda")(
            query, key, value, block_mask=_active.block_mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    out = torch.empty_like(query)
    for segment in _active.segments:
        out[:, :, segment.start : segment.stop] = _segment_attention(
            query, key, value, segment, scaling
        )
    return out.transpose(1, 2), None


def _segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment: Segment,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of a run of tokens to its ancestors, and causally to itself."""
    ranges = [*segment.ancestors, (segment.start, segment.stop)]
    keys = torch.cat([key[:, :, a:b] for a, b in ranges], dim=2)
    values = torch.cat([value[:, :, a:b] for a, b in ranges], dim=2)
    queries = query[:, :, segment.start : segment.stop]
    rows, columns = queries.shape[2], keys.shape[2]
    mask = None
    if rows > 1 and segment.ancestors:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    return torch.nn.functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=rows > 1 and not segment.ancestors,
        scale=scaling,
    )


@lru_cache(maxsize=2)
def _flex(compiled: bool) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., torch.Tensor] = flex_attention
    return torch.compile(function, dynamic=False) if compiled else function


def _block_mask(end: Any, device: torch.device) -> BlockMask:
    """FlexAttention's mask of a pack: q sees k when k <= q < end[k]."""
    from torch.nn.attention.flex_attention import create_block_mask

    ends = torch.from_numpy(end).to(device)

    def sees(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q < ends[k])

    size = len(end)
    return create_block_mask(
        sees, B=None, H=None, Q_LEN=size, KV_LEN=size, device=device, BLOCK_SIZE=_BLOCK
    )

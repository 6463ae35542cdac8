"""One forward pass over a pack of the prefix tree, with attention along the tree's paths only.

Each token sees its ancestors and itself, and its position is its distance from the root, so its
hidden state is the one it has in the text alone. The output head runs only where a log-probability
is asked.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora_harness.model.base import head_size
from qlora_harness.model.kernels import fused_rotary
from qlora_harness.score.prefix_tree import Pack, Segment

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

logger = logging.getLogger("qlora_harness")

ATTENTION = "qlora_harness_tree"
BLOCK = 128
_SMALLEST_HEAD = 16  # that FlexAttention takes
# Tile sizes of FlexAttention on CUDA, or None for its own choice.
FLEX_OPTIONS: dict[str, int] | None = None

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


class Running:
    """A pack that was started; on a GPU it may still be at work.

    Args:
        logprobs: Log-probabilities on the device, [R].
        greedy: On the device, [R] bool.
    """

    def __init__(self, logprobs: torch.Tensor, greedy: torch.Tensor) -> None:
        self._logprobs, self._greedy = logprobs, greedy

    def reads(self) -> Reads:
        """Waits for the pack and returns what was read."""
        return Reads(self._logprobs.double().cpu().numpy(), self._greedy.cpu().numpy())


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
        fits = self._device.type == "cuda" and head_size(model.config) >= _SMALLEST_HEAD
        self._flex = fits if flex is None else flex
        self._building: threading.Thread | None = None

    @property
    def overlaps(self) -> bool:
        """Whether the device works on while the next pack is made ready."""
        return self._device.type == "cuda"

    def build_ahead(self, size: int) -> None:
        """Begins to build the kernels for packs of one length, in a thread of its own.

        It computes a pack of one token, filled up. Whatever goes wrong is left to the first pack,
        which waits for the thread. Until then nothing else may use the model.

        Args:
            size: Length that packs will be filled up to, tokens.
        """
        device = torch.cuda.current_device() if self._device.type == "cuda" else None

        def build() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # each thread has its own
                self._start(_one_token(), size).reads()
            except Exception as error:  # the first pack meets it again, where it is dealt with
                logger.info("kernels could not be built ahead (%s)", type(error).__name__)

        self.wait()
        self._building = threading.Thread(target=build, name="qlora_harness kernels", daemon=True)
        self._building.start()

    def wait(self) -> None:
        """Waits until nothing is being built ahead."""
        if self._building is not None:
            self._building.join()
            self._building = None

    def start(self, pack: Pack, pad_to: int | None = None) -> Running:
        """Starts one pack, on a GPU without waiting for it.

        Args:
            pack: From `prefix_tree.plan`.
            pad_to: Length to fill the pack up to, so that GPU kernels are built once.
        """
        self.wait()
        return self._start(pack, pad_to)

    @torch.inference_mode()
    def _start(self, pack: Pack, pad_to: int | None) -> Running:
        size = max(len(pack.tokens), pad_to or 0)
        mask = None
        if self._flex:
            size = -(-size // BLOCK) * BLOCK
            # A token of the filling has no descendants: only itself sees it.
            alone = np.arange(len(pack.tokens) + 1, size + 1, dtype=np.int32)
            mask = block_mask(np.concatenate([pack.end, alone]), self._device)
        segments = pack.segments
        if size > len(pack.tokens) and not self._flex:
            segments = (*segments, Segment(len(pack.tokens), size, ()))
        tokens = self._moved(_filled(pack.tokens, size, 0))
        positions = self._moved(_filled(pack.positions, size, 0))
        # Choices of one question read the same place: the head runs once for them.
        places, which = np.unique(pack.read_at, return_inverse=True)
        at, back, asked = map(self._moved, (places, which, pack.read_token))
        with _attending(self._model, _Tree(segments, mask)):
            hidden = self._decoder(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False
            )[0][0]
        logits = self._head(hidden[at]) / self._logits_scaling
        logprobs = torch.log_softmax(logits, dim=-1, dtype=self._softmax_dtype)
        greedy = logprobs.argmax(dim=-1)[back] == asked
        return Running(logprobs[back, asked], greedy)

    def _moved(self, values: Any) -> torch.Tensor:
        """Integers on the device, as int64; without waiting for the device."""
        return _to_device(torch.from_numpy(values.astype(np.int64)), self._device)


def _one_token() -> Pack:
    zero, one = np.zeros(1, dtype=np.int32), np.ones(1, dtype=np.int32)
    return Pack(zero, zero, one, (Segment(0, 1, ()),), zero, zero, zero)


def _to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


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
        with fused_rotary(model):
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
        on_gpu = query.device.type == "cuda"
        out = _flex(on_gpu)(
            query,
            key,
            value,
            block_mask=_active.block_mask,
            scale=scaling,
            enable_gqa=True,
            kernel_options=FLEX_OPTIONS if on_gpu else None,
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


def block_mask(end: Any, device: torch.device) -> BlockMask:
    """Returns FlexAttention's mask of a pack: q sees k when k <= q < end[k].

    What create_block_mask would find by trying all pairs follows from the largest and the smallest
    end in each block of keys.

    Args:
        end: Place after the subtree of each token, [T] int32.
        device: Where the mask is used.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = len(end)
    blocks = -(-size // BLOCK)
    filled = np.full(blocks * BLOCK, 0, dtype=np.int32)
    filled[:size] = end
    by_block = filled.reshape(blocks, BLOCK)
    number = np.arange(blocks)
    first = number[:, None] * BLOCK
    earlier = number[None, :] < number[:, None]
    some = (earlier & (by_block.max(axis=1)[None, :] > first)) | (number[:, None] == number)
    every = earlier & (by_block.min(axis=1)[None, :] >= first + BLOCK)
    ends = _to_device(torch.from_numpy(filled), device)

    def sees(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q < ends[k])

    partial, whole = (
        [_to_device(torch.from_numpy(values)[None, None], device) for values in _ordered(blocks)]
        for blocks in (some & ~every, every)
    )
    return BlockMask.from_kv_blocks(
        partial[0],
        partial[1],
        whole[0],
        whole[1],
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(size, size),
    )


def _ordered(blocks: Any) -> tuple[Any, Any]:
    """Number of blocks of keys of each block of queries, and their places, those first."""
    return (
        blocks.sum(axis=1).astype(np.int32),
        np.argsort(~blocks, axis=1, kind="stable").astype(np.int32),
    )

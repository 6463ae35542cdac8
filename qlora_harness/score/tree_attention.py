"""Attention along the paths of a prefix tree, by FlexAttention with a block mask or by segment.

Fused layers call it; transformers' layers get it through its attention interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora_harness.fused.host_memory import to_device
from qlora_harness.fused.layer import Attend
from qlora_harness.fused.products import linear, uses_onednn
from qlora_harness.score.prefix_tree import Segment

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
_NAME = "qlora_harness_tree"  # in transformers' attention interface
_MOST_COMPILED = 1000
_ROWS = 384  # of scores in a block on a CPU


@dataclass
class TreeAttention:
    """Attention of one pack."""

    segments: tuple[Segment, ...]  # in order; they cover the pack
    block_mask: BlockMask | None  # for FlexAttention; None attends segment by segment

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Returns the attention [T, H, D] of each token to its ancestors and itself.

        q is [T, H, D] with a dense last dimension; k and v are [T, K, D], and H is a multiple of K.
        """
        if self.block_mask is None and uses_onednn(q):
            out = torch.empty_like(q)
            for segment in self.segments:
                _write_segment(q, k, v, segment, scale, out)
            return out
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        if self.block_mask is None:
            return self._by_segment(query, key, value, scale)[0].transpose(0, 1)
        on_gpu = q.device.type == "cuda"
        if on_gpu:
            keep_compiling()
        out = _flex(on_gpu)(
            query, key, value, block_mask=self.block_mask, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def _by_segment(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        _, heads, tokens, size = query.shape
        if key.shape[1] != heads:
            key = key.repeat_interleave(heads // key.shape[1], dim=1)
            value = value.repeat_interleave(heads // value.shape[1], dim=1)
        out = query.new_empty(1, tokens, heads, size).transpose(1, 2)
        for segment in self.segments:
            out[:, :, segment.start : segment.stop] = _segment_attention(
                query, key, value, segment, scale
            )
        return out


_active: Attend | None = None


@contextmanager
def attending(model: Any, attend: Attend) -> Iterator[None]:
    """Makes a transformers model's layers use an attention of ours inside the `with` block."""
    global _active
    _register()
    before = model.config._attn_implementation  # noqa: SLF001  # only the setter is public
    model.set_attn_implementation(_NAME)
    _active = attend
    try:
        yield
    finally:
        _active = None
        model.set_attn_implementation(before)


@lru_cache(maxsize=1)
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _active_attention)


def _active_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Adapts the active attention to transformers' interface.

    query is [1, H, T, D], key and value are [1, K, T, D]. Returns [1, T, H, D] and no weights.
    """
    assert _active is not None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _active(q, k, v, scaling or q.shape[-1] ** -0.5)[None], None


def _segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment: Segment,
    scaling: float,
) -> torch.Tensor:
    """Attention of a segment to its ancestors, and causally to itself."""
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


def _write_segment(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment: Segment,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Writes the attention of a segment to `out`, [T, H, D], as `_segment_attention` computes it.

    Blocks of scores fit the cache of a core, and oneDNN multiplies them, three times as fast as
    torch's attention.
    """
    ranges = [*segment.ancestors, (segment.start, segment.stop)]
    heads, size = k.shape[1], q.shape[2]
    group = q.shape[1] // heads
    count, before = segment.stop - segment.start, sum(b - a for a, b in segment.ancestors)
    keys = torch.cat([k[a:b] for a, b in ranges]).transpose(0, 1).contiguous()  # [K, S, D]
    values = torch.cat([v[a:b] for a, b in ranges]).permute(1, 2, 0).contiguous()  # [K, D, S]
    rows = (q[segment.start : segment.stop] * scale).view(count, heads, group * size)
    rows = rows.transpose(0, 1).reshape(heads, count * group, size)
    step = max(1, _ROWS // group)
    later = torch.ones(step, step, dtype=torch.bool).triu(1)[:, None]
    for start in range(0, count, step):
        stop = min(count, start + step)
        mask = later[: stop - start, :, : stop - start]
        for head in range(heads):
            scores = linear(rows[head, start * group : stop * group], keys[head, : before + stop])
            own = scores.view(stop - start, group, -1)[:, :, before + start :]
            own.masked_fill_(mask, -torch.inf)
            weights = scores.softmax(-1)
            attended = linear(weights, values[head, :, : before + stop])
            out[segment.start + start : segment.start + stop, head * group : (head + 1) * group] = (
                attended.view(stop - start, group, size)
            )


@lru_cache(maxsize=2)
def _flex(compiled: bool) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., torch.Tensor] = flex_attention
    return torch.compile(function, dynamic=False) if compiled else function


def keep_compiling() -> None:
    """Raises torch's limits on recompilation, in the calling thread.

    Each length of pack and each model needs a compilation. Beyond the limit torch would run
    FlexAttention without a kernel, with memory for the full score matrix.
    """
    limits = torch._dynamo.config  # noqa: SLF001  # documented, despite its name
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if getattr(limits, name) < _MOST_COMPILED:
            setattr(limits, name, _MOST_COMPILED)


def block_mask(end: Any, device: torch.device) -> BlockMask:
    """Returns FlexAttention's mask of a pack: q sees k when k <= q < end[k].

    `end` [T] int32 is the index after each token's subtree. Its largest and smallest value in a
    block of keys give what create_block_mask finds by trying all pairs.
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
    ends = to_device(torch.from_numpy(filled), device)

    def sees(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q < ends[k])

    # For each block of queries, the number of its key blocks, and their indices before the others.
    partial_count, partial_blocks, full_count, full_blocks = (
        to_device(torch.from_numpy(values.astype(np.int32))[None, None], device)
        for blocks in (some & ~every, every)
        for values in (blocks.sum(axis=1), np.argsort(~blocks, axis=1, kind="stable"))
    )
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_blocks,
        full_count,
        full_blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(size, size),
    )

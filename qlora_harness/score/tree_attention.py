"""Attention along the paths of a prefix tree, by a Triton kernel or segment by segment.

Fused layers call it; transformers' layers get it through its attention interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_harness.fused.host_memory import to_device
from qlora_harness.fused.layer import Attend
from qlora_harness.fused.products import linear, uses_onednn
from qlora_harness.score.prefix_tree import Segment

BLOCK = 128
_NAME = "qlora_harness_tree"  # in transformers' attention interface
_ROWS = 384  # of scores in a block on a CPU


class TreeBlocks(NamedTuple):
    """What the B blocks of a pack of T tokens see, for the kernel; q sees k if k <= q < end[k]."""

    end: Tensor  # index after the subtree of each token, [T] int32
    seen: Tensor  # of each block's queries: the number of blocks seen whole, and of those seen at
    # all, then these blocks, those seen whole first, [B, 2 + B] int32


@dataclass
class TreeAttention:
    """Attention of one pack."""

    segments: tuple[Segment, ...]  # in order; they cover the pack
    blocks: TreeBlocks | None  # for the Triton kernel; None attends segment by segment

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Returns the attention [T, H, D] of each token to its ancestors and itself.

        q is [T, H, D] with a dense last dimension; k and v are [T, K, D], and H is a multiple of K.
        """
        if self.blocks is not None:
            from qlora_harness.score import triton_tree

            return triton_tree.attend(q, k, v, scale, *self.blocks)
        if uses_onednn(q):
            out = torch.empty_like(q)
            for segment in self.segments:
                _write_segment(q, k, v, segment, scale, out)
            return out
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        return self._by_segment(query, key, value, scale)[0].transpose(0, 1)

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


def tree_blocks(end: NDArray[np.int32], device: torch.device) -> TreeBlocks:
    """Returns the blocks of a pack whose tokens' subtrees end at `end`, whole blocks of them."""
    by_block = end.reshape(-1, BLOCK)
    number = np.arange(len(by_block))
    first = number[:, None] * BLOCK
    earlier = number[None, :] < number[:, None]
    some = (earlier & (by_block.max(axis=1)[None, :] > first)) | (number[:, None] == number)
    whole = earlier & (by_block.min(axis=1)[None, :] >= first + BLOCK)
    order = np.argsort(np.where(whole, 0, np.where(some, 1, 2)), axis=1, kind="stable")
    seen = np.column_stack([whole.sum(axis=1), some.sum(axis=1), order]).astype(np.int32)
    return TreeBlocks(*(to_device(torch.from_numpy(values), device) for values in (end, seen)))

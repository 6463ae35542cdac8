"""Keys and values of growing texts in pages, and attention to them.

All texts begin with the same prefix, whose keys and values exist once. Those of the rest of a text
are in pages of 64 tokens, which a text owns until another takes its place: attention reads as many
as the text needs. Its two parts, to the prefix and to the pages, join by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from qlora_harness.fused.layer import Attend
from qlora_harness.model.facts import head_size

PAGE = 64  # tokens
_MOST_COMPILED = 1000


def pages_for(tokens: int) -> int:
    """Returns the number of pages of a text's own tokens."""
    return -(-tokens // PAGE)


def page_bytes(config: Any, dtype: torch.dtype) -> int:
    """Returns the bytes of a page in all layers of a model."""
    size = PAGE * key_heads(config) * head_size(config) * dtype.itemsize
    return int(2 * config.num_hidden_layers * size)


def key_heads(config: Any) -> int:
    """Returns the number of key heads of a layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


class PagedCache:
    """Keys and values of `rows` texts in `pages` pages, at most `widest` of them for a text.

    Each row's first page is its own forever, so that a row without a text has one to write to.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        rows: int,
        pages: int,
        widest: int,
    ) -> None:
        shape = key_heads(config), pages * PAGE, head_size(config)
        layers = range(config.num_hidden_layers)
        # Zeros, as whatever isn't attended to still gets multiplied by zero.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in layers] for _ in range(2)
        )
        self.prefix: list[tuple[Tensor, Tensor]] = []  # of each layer, [K, P, D] each
        self._free = list(range(pages - 1, rows - 1, -1))
        self._owned: list[list[int]] = [[] for _ in range(rows)]  # after the first
        self._table = np.zeros((rows, widest), dtype=np.int32)
        self._table[:, 0] = np.arange(rows)
        self._owner = np.arange(pages, dtype=np.int32)
        self._first = np.zeros(pages, dtype=np.int32)
        # On the device: the pages of each row; the row of each page, if any, and its first token
        # there; the tokens that a row holds, and the index of the last that it may get.
        self.table, self.owner, self.first = (
            torch.from_numpy(each).to(device) for each in (self._table, self._owner, self._first)
        )
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)

    def take(self, row: int, tokens: int) -> None:
        """Gives a row the pages for a text; `upload` makes it known to the device."""
        owned = [self._free.pop() for _ in range(pages_for(tokens) - 1)]
        self._owned[row] = owned
        self._table[row, 1 : 1 + len(owned)] = owned
        self._owner[owned] = row
        self._first[owned] = np.arange(1, 1 + len(owned)) * PAGE

    def release(self, row: int) -> None:
        """Takes the pages back."""
        self._free += self._owned[row]
        self._owner[self._owned[row]] = -1
        self._owned[row] = []

    def upload(self, lengths: dict[int, tuple[int, int]]) -> None:
        """Copies the pages to the device, and for some rows the tokens held and the last index."""
        for mine, theirs in (
            (self._table, self.table),
            (self._owner, self.owner),
            (self._first, self.first),
        ):
            theirs.copy_(torch.from_numpy(mine))
        rows, values = torch.tensor(list(lengths)), torch.tensor(list(lengths.values()))
        rows = rows.to(self.length.device)
        self.length[rows], self.last[rows] = values.to(self.length.device).unbind(1)

    def slots(self, row: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Returns where the first `count` tokens of a row are in the pages."""
        pages = self._table[row, : pages_for(count)].astype(np.int64)
        return (pages[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[:count]

    def write(self, layer: int, at: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes keys and values, [N, K, D], to slots, [N]."""
        self.keys[layer].index_copy_(1, at, k.transpose(0, 1))
        self.values[layer].index_copy_(1, at, v.transpose(0, 1))


@dataclass
class FillAttention:
    """Attention of a pack (`tree`), that copies keys and values of its tokens to the cache."""

    cache: PagedCache
    tree: Attend
    source: Tensor  # tokens of the pack, [N]
    target: Tensor  # their slots, [N]
    prefix: Tensor | None  # tokens of the pack that are the prefix; None if it is in the cache
    layer: int = 0  # the next that calls

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attend`."""
        self.cache.write(self.layer, self.target, k[self.source], v[self.source])
        if self.prefix is not None:
            both = (x[self.prefix].transpose(0, 1).contiguous() for x in (k, v))
            self.cache.prefix.append((next(both), next(both)))
        self.layer += 1
        return self.tree(q, k, v, scale)


class StepAttention:
    """Attention of one new token of each row, which it adds to the cache."""

    def __init__(self, cache: PagedCache, *, flex: bool) -> None:
        self._cache, self._flex, self._layer = cache, flex, 0
        self._mask: BlockMask | None = None  # one for all layers
        page, within = cache.length // PAGE, cache.length % PAGE
        self._at = cache.table.gather(1, page[:, None])[:, 0].long() * PAGE + within

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attend`; T is the number of rows."""
        cache, layer = self._cache, self._layer
        self._layer += 1
        cache.write(layer, self._at, k, v)
        prefix = cache.prefix[layer] if cache.prefix else None
        keys, values = cache.keys[layer], cache.values[layer]
        # Query heads that share a key head are like queries of one head.
        grouped = q.view(len(q), len(keys), -1, q.shape[2])
        if self._flex:
            if self._mask is None:
                self._mask = _mask(cache, grouped.shape[2])
            if q.is_cuda:
                _keep_compiling()
            out = _flex(q.is_cuda)(grouped, keys, values, prefix, self._mask, scale)
        else:
            pages = self._gathered(keys, values)
            out = _plain(grouped, *pages, prefix, cache.length, scale)
        return out.reshape(q.shape)

    def _gathered(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Copies what the rows hold, up to the longest, [K, T, S, D]."""
        count = int(self._cache.length.max()) + 1
        inside = torch.arange(PAGE, device=keys.device)
        pages = self._cache.table[:, : pages_for(count), None].long() * PAGE
        at = (pages + inside).flatten(1)[:, :count]
        return keys[:, at], values[:, at]


def _plain(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    length: Tensor,
    scale: float,
) -> Tensor:
    """Attends with matrix products: q is [T, K, G, D], keys and values are [K, T, S, D]."""
    q = q.transpose(0, 1) * scale
    scores = q @ keys.transpose(2, 3)
    unseen = torch.arange(keys.shape[2], device=q.device) > length[:, None]
    scores = scores.masked_fill(unseen[:, None], -torch.inf)
    before = scores[..., :0]
    if prefix is not None:
        before = (q.flatten(1, 2) @ prefix[0].transpose(1, 2)).view(*q.shape[:3], -1)
    weights = torch.cat([before, scores], dim=3).float().softmax(-1).to(q.dtype)
    before, own = weights.split([before.shape[3], scores.shape[3]], dim=3)
    out: Tensor = own @ values
    if prefix is not None:
        out += (before.flatten(1, 2) @ prefix[1]).view_as(out)
    return out.transpose(0, 1)


def _mask(cache: PagedCache, group: int) -> BlockMask:
    """Returns FlexAttention's mask: a row sees the tokens that it holds, and its new one."""
    owner, first, length = cache.owner, cache.first, cache.length

    def sees(row: Any, head: Any, query: Any, slot: Any) -> Any:
        page = slot // PAGE
        return (owner[page] == row) & (first[page] + slot % PAGE <= length[row])

    return BlockMask.from_kv_blocks(
        (length // PAGE + 1).int()[:, None, None],
        cache.table[:, None, None],
        BLOCK_SIZE=(128, PAGE),
        mask_mod=sees,
        seq_lengths=(group, cache.keys[0].shape[1]),
        compute_q_blocks=False,  # for gradients
    )


def _joined(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    mask: BlockMask,
    scale: float,
) -> Tensor:
    """Attends with FlexAttention: q is [T, K, G, D], keys and values are all pages, [K, S, D]."""
    attend: Any = flex_attention
    own: Tensor
    with_lse = AuxRequest(lse=True)
    own, aux = attend(
        *(q, keys[None], values[None]), block_mask=mask, scale=scale, return_aux=with_lse
    )
    if prefix is None:
        return own
    # The prefix is one text for all rows, so their queries are one matrix.
    flat = q.transpose(0, 1).flatten(1, 2)[None]
    before, aux_before = attend(
        *(flat, prefix[0][None], prefix[1][None]), scale=scale, return_aux=with_lse
    )
    before = before.view(q.transpose(0, 1).shape).transpose(0, 1)
    lse = aux_before.lse.view(q.shape[1], q.shape[0], q.shape[2]).transpose(0, 1)
    share = torch.sigmoid(aux.lse - lse)[..., None]
    joined: Tensor = before + share * (own - before)
    return joined.to(q.dtype)


@lru_cache(maxsize=2)
def _flex(compiled: bool) -> Callable[..., Tensor]:
    return torch.compile(_joined, dynamic=False) if compiled else _joined


def _keep_compiling() -> None:
    """Raises torch's limits on recompilation, in the calling thread.

    Each prefix and each model needs a compilation. Beyond the limit torch would run FlexAttention
    without a kernel, with memory for the full score matrix.
    """
    limits = torch._dynamo.config  # noqa: SLF001  # documented, despite its name
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if getattr(limits, name) < _MOST_COMPILED:
            setattr(limits, name, _MOST_COMPILED)

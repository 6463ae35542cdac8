"""Greedy continuations of many prompts.

Prompts are computed in packs, which hold their common prefix once. Then each step computes the next
token of every row; a row whose text is complete gets the next prompt. On a GPU a step is one CUDA
graph, and the host looks at a step's tokens while the next one runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qlora_harness.errors import ModelError
from qlora_harness.fused.host_memory import to_device
from qlora_harness.model.free_memory import available_memory
from qlora_harness.score.packed_forward import PackedModel
from qlora_harness.score.paged_attention import (
    FillAttention,
    PagedCache,
    StepAttention,
    page_bytes,
    pages_for,
)
from qlora_harness.score.prefix_tree import Pack, Query, plan

_PACK = 8192  # tokens of prompts in a pass; one length for all needs one set of kernels
# A step of more rows is no faster per token.
MOST_ROWS = 512
_MOST_CPU_ROWS = 64
_REFILL = 4  # a pass over new prompts waits until one row in so many is free
_SHARE = 0.8  # of free memory for keys and values

Complete = Callable[[Sequence[list[int]]], list[bool]]


@dataclass
class Text:
    """A prompt and its continuation."""

    number: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    complete: bool = False


class _Step(NamedTuple):
    """A started step: the texts in its rows, and their next tokens on the way to the host."""

    texts: list[Text | None]
    tokens: Tensor
    arrived: torch.cuda.Event | None


@torch.inference_mode()
def generate(
    model: PackedModel, prompts: Sequence[list[int]], longest: int, complete: Complete
) -> Iterator[Text]:
    """Yields texts as they become complete, with at most `longest` new tokens each.

    `complete` gets the new tokens of some texts after each step, and says which of them end there.
    Raises ModelError if memory doesn't suffice for one text.
    """
    yield from _Generator(model, prompts, longest, complete).run()


def common_prefix(texts: Sequence[list[int]]) -> int:
    """Returns the number of tokens with which all texts begin."""
    first, last = min(texts), max(texts)  # in lexicographic order
    pairs = enumerate(zip(first, last, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(last)))


class _Generator:
    def __init__(
        self,
        model: PackedModel,
        prompts: Sequence[list[int]],
        longest: int,
        complete: Complete,
    ) -> None:
        self._model, self._longest, self._complete = model, longest, complete
        # A prompt's last token is its own: the next token is read there.
        shortest = min(map(len, prompts))
        self.prefix = min(common_prefix(prompts), shortest - 1)
        # The longest first, so that memory runs out at once or not at all.
        order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
        self._waiting = deque(Text(n, prompts[n]) for n in order)
        self._cache = self._allocate([self._need(text) for text in self._waiting])
        self._rows: list[Text | None] = [None] * len(self._cache.length)
        self._steps: deque[_Step] = deque()
        self._tokens = torch.zeros_like(self._cache.length)
        self._every = torch.arange(len(self._rows), device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def _need(self, text: Text) -> int:
        """The own tokens of a text that the cache must hold: all but the last new one."""
        return len(text.prompt) - self.prefix + self._longest - 1

    def _allocate(self, needs: list[int]) -> PagedCache:
        """Allocates as many rows as memory allows for the longest texts."""
        model = self._model
        pages = np.cumsum([pages_for(need) for need in needs])
        room = int(_SHARE * _free_memory(model.device)) // page_bytes(model.config, model.dtype)
        most = MOST_ROWS if model.overlaps else _MOST_CPU_ROWS
        rows = min(int(np.searchsorted(pages, room, side="right")), most)
        if not rows:
            raise ModelError(
                f"{model.device} has no memory for the keys and values of a text of "
                f"{self.prefix + needs[0]} tokens",
                "Give a lower max_gen_toks or max_length",
            )
        rows = -(-len(needs) // -(-len(needs) // rows))  # the last round as full as the others
        return PagedCache(
            *(model.config, model.dtype, model.device),
            rows=rows,
            pages=int(pages[rows - 1]),
            widest=pages_for(needs[0]),
        )

    def run(self) -> Iterator[Text]:
        """See `generate`."""
        lag = 1 if self._model.overlaps else 0
        while True:
            free = [n for n, text in enumerate(self._rows) if text is None or text.complete]
            busy = len(free) < len(self._rows)
            if self._waiting and (not busy or len(free) * _REFILL >= len(self._rows)):
                yield from self._read(0)
                self._refill()
            elif busy:
                self._start_step()
            else:
                return
            yield from self._read(lag)

    def _read(self, lag: int) -> Iterator[Text]:
        """Adds the tokens of all steps but the last `lag`, and yields the texts they complete."""
        while len(self._steps) > lag:
            step = self._steps.popleft()
            if step.arrived is not None:
                step.arrived.synchronize()
            pairs = zip(step.texts, step.tokens.tolist(), strict=True)
            growing = [(text, token) for text, token in pairs if text and not text.complete]
            for text, token in growing:
                text.tokens.append(token)
            texts = [text for text, _ in growing]
            ended = self._complete([text.tokens for text in texts])
            for text, end in zip(texts, ended, strict=True):
                text.complete = end or len(text.tokens) == self._longest
            yield from (text for text in texts if text.complete)

    def _refill(self) -> None:
        """Puts waiting texts into free rows, and computes their prompts."""
        cache = self._cache
        lengths: dict[int, tuple[int, int]] = {}
        fresh: dict[int, Text] = {}
        free = [n for n, text in enumerate(self._rows) if text is None or text.complete]
        for row in free:
            cache.release(row)
            self._rows[row], lengths[row] = None, (0, 0)
        for row in free[: len(self._waiting)]:
            # It needs no more pages than the one before it, which was longer.
            fresh[row] = text = self._waiting.popleft()
            last = self._need(text) - 1
            cache.take(row, last + 1)
            self._rows[row] = text
            lengths[row] = min(len(text.prompt) - self.prefix, last), last
        cache.upload(lengths)
        rows, texts = list(fresh), list(fresh.values())
        packs = plan(
            [Query(text.prompt, [0]) for text in texts],
            pack_tokens=_PACK,
            window=max(len(text.prompt) for text in texts),
        )
        for pack in packs:
            self._fill(pack, [rows[n] for n in pack.read_query])

    def _fill(self, pack: Pack, rows: list[int]) -> None:
        """Computes a pack of prompts: their keys and values, and the token after each."""
        cache, model = self._cache, self._model
        # A token's ancestors in the pack, see `prefix_tree`, and itself.
        paths = [np.flatnonzero(pack.end[: at + 1] > at) for at in pack.read_at]
        own = [path[self.prefix :] for path in paths]
        slots = [cache.slots(row, len(path)) for row, path in zip(rows, own, strict=True)]
        prefix = paths[0][: self.prefix] if self.prefix and not cache.prefix else None
        source, target, at, where = (
            to_device(torch.from_numpy(np.asarray(each, dtype=np.int64)), model.device)
            for each in (np.concatenate(own), np.concatenate(slots), pack.read_at, rows)
        )
        tokens, positions, tree = model.lay_out(pack)
        before = None if prefix is None else to_device(torch.from_numpy(prefix), model.device)
        attend = FillAttention(cache, tree, source, target, before)
        new = model.next_tokens(tokens, positions, attend, at)
        self._tokens[where] = new
        texts: list[Text | None] = [self._rows[row] for row in rows]
        self._steps.append(_started(texts, new))

    def _start_step(self) -> None:
        """Starts to compute the next token of every row."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute()
            if self._model.has_graphs:  # whose kernels the step has compiled and loaded
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._compute()
        self._steps.append(_started(list(self._rows), self._tokens))

    def _compute(self) -> None:
        cache, model = self._cache, self._model
        attend = StepAttention(cache, flex=model.flex)
        positions = cache.length + self.prefix
        self._tokens.copy_(model.next_tokens(self._tokens, positions, attend, self._every))
        torch.minimum(cache.length + 1, cache.last, out=cache.length)


def _started(texts: list[Text | None], tokens: Tensor) -> _Step:
    if tokens.device.type != "cuda":
        return _Step(texts, tokens.clone(), None)
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Step(texts, host, arrived)


def _free_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return available_memory()
    free = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

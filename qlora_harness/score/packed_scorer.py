"""Scores queries pack by pack, shared among processes, in smaller packs if memory runs out."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from qlora_harness.model.facts import is_out_of_memory
from qlora_harness.score.packed_forward import PackedModel, Reads, Running
from qlora_harness.score.prefix_tree import Pack, PlannedPack, Query, Score, lay_out, plan_packs

logger = logging.getLogger("qlora_harness")

_CPU_PACK = 8192
# Each pack computes its prefixes again. For MMLU's five-shot prompts and LLaMA's tokens that adds
# 4.0% to the distinct tokens in packs of 24,576, 1.4% in packs of this size and 0.7% in packs twice
# as large. A killed run loses the packs that it computes, so larger ones would cost it more.
_GPU_PACK = 65536
_SHARED_GPU_PACK = 24576  # of several processes, whose shares are whole packs
_SMALLEST_PACK = 256


class PackedScores(NamedTuple):
    """Scores by query number, and the tokens that all processes compute for them."""

    scores: dict[int, Score]
    computed_tokens: int


class PackedScorer:
    """Scores queries in packs of at most `pack_tokens`, with inputs of at most `window` tokens."""

    def __init__(self, model: PackedModel, *, window: int, pack_tokens: int) -> None:
        self._model = model
        self._window = window
        self.pack_tokens = pack_tokens

    def plan(self, queries: Sequence[Query]) -> list[PlannedPack]:
        """Returns the packs that `score` computes on one process."""
        return plan_packs(queries, pack_tokens=self.pack_tokens, window=self._window)

    def score(
        self,
        parts: Iterable[Sequence[Query]],
        *,
        texts: int = 0,
        share: tuple[int, int] = (0, 1),
        show_progress: bool = True,
        on_scored: Callable[[Sequence[tuple[int, Score]]], None] = lambda scored: None,
    ) -> PackedScores:
        """Scores this process's share of the queries, which every process gets in full.

        It takes the next part while a GPU computes the packs of the last; queries are numbered
        across parts. `texts` is their number, for the progress bar, if it is known. `share` is
        (rank, processes); a share is a run of packs, so mostly of whole subtrees. `on_scored` gets
        the queries completed by each pack.
        """
        work = _Work(self.plan, parts, share)
        scores: dict[int, Score] = {}
        started, own_tokens = time.perf_counter(), 0
        pending: list[int] = []
        total, off = texts or None, not show_progress
        with tqdm(desc="Scoring", unit=" texts", total=total, disable=off) as bar:
            while True:
                for pack, numbers, running in self._computed(work.packs(pending)):
                    fresh = [(numbers[n], score) for n, score in _sums(pack, running.reads())]
                    scores.update(fresh)
                    on_scored(fresh)
                    own_tokens += len(pack.tokens)
                    rate = own_tokens / (time.perf_counter() - started)
                    bar.set_postfix_str(f"{rate:,.0f} distinct tokens/s", refresh=False)
                    bar.total = max(texts, len(work.mine))
                    bar.update(len(fresh))
                pending = sorted(n for n in work.mine if n not in scores)
                if not pending:
                    break
                self.pack_tokens //= 2
                torch.cuda.empty_cache()
                logger.warning(
                    "out of memory: continuing with packs of %d tokens", self.pack_tokens
                )
        self._model.join()
        return PackedScores(scores, work.computed_tokens)

    def _computed(
        self, packs: Iterator[tuple[Pack, Sequence[int]]]
    ) -> Iterator[tuple[Pack, Sequence[int], Running]]:
        """Yields packs that are computed or about to be; stops early if memory runs out."""
        running: deque[tuple[Pack, Sequence[int], Running]] = deque()
        pack = next(packs, None)
        while pack is not None:
            try:
                running.append((*pack, self._model.start(pack[0])))
            except Exception as error:
                smallest = self.pack_tokens <= _SMALLEST_PACK
                if not is_out_of_memory(error) or smallest or self._model.is_sharded:
                    raise
                break
            # A GPU computes while the host makes the next pack and handles the last one's results.
            pack = next(packs, None)
            if len(running) > self._model.overlaps:
                yield running.popleft()
        yield from running


class _Work:
    """The packs of one process, and the numbers of the queries that they answer."""

    def __init__(
        self,
        plan: Callable[[Sequence[Query]], list[PlannedPack]],
        parts: Iterable[Sequence[Query]],
        share: tuple[int, int],
    ) -> None:
        self._plan, self._parts, self._share = plan, iter(parts), share
        self._queries: list[Query] = []
        self.mine: list[int] = []  # of all parts so far
        self.computed_tokens = 0  # by all processes

    def packs(self, pending: Sequence[int]) -> Iterator[tuple[Pack, Sequence[int]]]:
        """Yields packs for the pending queries of earlier parts, then those of the next parts.

        Each comes with the numbers of the queries that it was planned for.
        """
        # Each process keeps its share, so it splits its own packs only.
        queries = [self._queries[n] for n in pending]
        for planned in self._plan(queries):
            yield lay_out(planned, queries), pending
        for part in self._parts:
            numbers = range(len(self._queries), len(self._queries) + len(part))
            self._queries += part
            packs = self._plan(part)
            self.computed_tokens += sum(pack.tokens for pack in packs)
            own = _share(packs, *self._share)
            self.mine += [numbers[n] for pack in own for n in pack.queries()]
            for planned in own:
                yield lay_out(planned, part), numbers


def _share(packs: Sequence[PlannedPack], rank: int, world: int) -> list[PlannedPack]:
    """A run of packs with about 1 / world of the tokens."""
    sizes = np.array([pack.tokens for pack in packs], dtype=np.int64)
    middles = np.cumsum(sizes) - sizes / 2
    owner = np.minimum((middles * world / max(1, sizes.sum())).astype(int), world - 1)
    return [pack for pack, mine in zip(packs, owner == rank, strict=True) if mine]


def _sums(pack: Pack, reads: Reads) -> list[tuple[int, Score]]:
    """Sums the log-probabilities of each query; it is greedy if all its tokens are."""
    total = np.bincount(pack.read_query, weights=reads.logprobs)
    misses = np.bincount(pack.read_query, weights=~reads.greedy)
    numbers = np.unique(pack.read_query)
    return [(int(n), (float(total[n]), bool(misses[n] == 0))) for n in numbers]


def default_pack_tokens(model: torch.nn.Module, device: torch.device, processes: int = 1) -> int:
    """Returns a pack size that fits into the device's free memory.

    In a layer a token takes at most ten vectors of the hidden and four of the intermediate size; in
    a fused layer about four and three.
    """
    if device.type != "cuda":
        return _CPU_PACK
    config: Any = model.config
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    size = next(p for p in model.parameters() if p.is_floating_point()).element_size()
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fits = int(0.8 * free / (size * (10 * hidden + 4 * inner)))
    most = _GPU_PACK if processes == 1 else _SHARED_GPU_PACK
    return max(1024, min(most, fits))

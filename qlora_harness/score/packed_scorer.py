"""Scores queries pack by pack: progress, memory, and what is done when memory runs out."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qlora_harness.model.base import is_out_of_memory
from qlora_harness.score.garbage_collection import paused_collection
from qlora_harness.score.packed_forward import PackedModel, Running
from qlora_harness.score.prefix_tree import Pack, Plan, Query, plan

logger = logging.getLogger("qlora_harness")

Score = tuple[float, bool]

_CPU_PACK = 8192
_GPU_PACK = 24576
_SMALLEST_PACK = 256
_ROUND = 128


class PackedScorer:
    """Answers queries with a model, in as few tokens as they distinctly hold.

    Args:
        model: Computes one pack.
        window: Longest input of the model, tokens.
        pack_tokens: Most tokens in a pack.
    """

    def __init__(self, model: PackedModel, *, window: int, pack_tokens: int) -> None:
        self._model = model
        self._window = window
        self.pack_tokens = pack_tokens
        self.last_plan: Plan | None = None

    def score(
        self,
        queries: Sequence[Query],
        *,
        share: tuple[int, int] = (0, 1),
        show_progress: bool = True,
        on_scored: Callable[[Sequence[tuple[int, Score]]], None] | None = None,
    ) -> dict[int, Score]:
        """Scores queries.

        Args:
            queries: The same list on every process.
            share: This process and the number of processes; whole runs of packs, so mostly whole
                subtrees, go to one process.
            show_progress: Whether to show a bar.
            on_scored: Called after each pack with the queries it completed.

        Returns:
            Log-probability in nats and greediness by query, for this process's share.
        """
        wanted = list(range(len(queries)))
        scored: dict[int, Score] = {}
        progress = _Progress(queries, show_progress)
        while wanted:
            with paused_collection():
                planned = plan(
                    [queries[i] for i in wanted], pack_tokens=self.pack_tokens, window=self._window
                )
            if not scored:
                self.last_plan = planned
            packs = _share(planned.packs, *share)
            progress.expect(n for pack in packs for n in (wanted[i] for i in _asking(pack)))
            running: tuple[Pack, Running] | None = None

            def finish(pack: Pack, started: Running, wanted: list[int] = wanted) -> None:
                reads = started.reads()
                fresh = [
                    (wanted[number], value)
                    for number, value in _collect(pack, reads.logprobs, reads.greedy)
                ]
                scored.update(fresh)
                if on_scored is not None:
                    on_scored(fresh)
                progress.advance((number for number, _ in fresh), len(pack.tokens))

            done = 0
            for pack in packs:
                try:
                    started = self._model.start(pack, self._padding(pack, len(packs) == 1))
                except Exception as error:
                    if not is_out_of_memory(error) or self.pack_tokens <= _SMALLEST_PACK:
                        raise
                    break
                done += 1
                # A GPU works on this pack while the results of the one before are put away.
                if running is not None:
                    finish(*running)
                    running = None
                if self._model.overlaps:
                    running = pack, started
                else:
                    finish(pack, started)
            if running is not None:
                finish(*running)
            if done == len(packs):
                break
            # Every process must go on with the same plan, so only the own packs are made smaller.
            self.pack_tokens //= 2
            torch.cuda.empty_cache()
            logger.warning("out of memory: going on with packs of %d tokens", self.pack_tokens)
            left = {n for pack in packs[done:] for n in _asking(pack)}
            wanted = [wanted[number] for number in sorted(left)]
            share = (0, 1)
        progress.close()
        return scored

    def _padding(self, pack: Pack, alone: bool) -> int:
        """On a GPU one length for all packs: kernels are built anew for every other."""
        size = len(pack.tokens)
        if not self._model.overlaps:
            return size
        padded = self.pack_tokens
        while alone and padded >= 2 * max(size, _ROUND):
            padded //= 2
        return padded if size <= padded else -(-size // _ROUND) * _ROUND


class _Progress:
    """A bar in questions: contexts all of whose continuations are scored."""

    def __init__(self, queries: Sequence[Query], shown: bool) -> None:
        self._context = [id(query.context) for query in queries]
        self._left: Counter[int] = Counter()
        self._bar = tqdm(total=0, desc="Scoring", unit=" questions", disable=not shown)
        self._started, self._computed = time.perf_counter(), 0
        self._finished = 0

    def expect(self, numbers: Iterable[int]) -> None:
        """Takes the queries that are still to come."""
        self._left = Counter(self._context[n] for n in numbers)
        self._bar.total = self._finished + len(self._left)

    def advance(self, numbers: Iterable[int], tokens: int) -> None:
        """Takes queries that were scored, and the tokens computed for them."""
        before = self._finished
        for number in numbers:
            context = self._context[number]
            self._left[context] -= 1
            self._finished += self._left[context] == 0
        self._computed += tokens
        rate = self._computed / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:,.0f} distinct tokens/s", refresh=False)
        self._bar.update(self._finished - before)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def _asking(pack: Pack) -> list[int]:
    """The queries that a pack answers."""
    return [int(n) for n in np.unique(pack.read_query)]


def _share(packs: Sequence[Pack], rank: int, world: int) -> list[Pack]:
    """A run of packs with about an equal part of the tokens."""
    sizes = np.array([len(pack.tokens) for pack in packs], dtype=np.int64)
    middles = np.cumsum(sizes) - sizes / 2
    owner = np.minimum((middles * world / max(1, sizes.sum())).astype(int), world - 1)
    return [pack for pack, mine in zip(packs, owner == rank, strict=True) if mine]


def _collect(
    pack: Pack,
    logprobs: np.ndarray[tuple[int], np.dtype[np.float64]],
    greedy: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> list[tuple[int, Score]]:
    """Sums the tokens of each query."""
    size = int(pack.read_query.max()) + 1 if len(pack.read_query) else 0
    total = np.bincount(pack.read_query, weights=logprobs, minlength=size)
    misses = np.bincount(pack.read_query, weights=~greedy, minlength=size)
    return [(int(n), (float(total[n]), bool(misses[n] == 0))) for n in _asking(pack)]


def default_pack_tokens(model: torch.nn.Module, device: torch.device) -> int:
    """Returns a pack size that fits the device.

    A token of a pack takes at most ten vectors of the hidden size and four of the intermediate size
    while it passes through a layer; through a fused layer about four and three.

    Args:
        model: Already on the device.
        device: "cuda" or another.
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
    return max(1024, min(_GPU_PACK, fits) // _ROUND * _ROUND)

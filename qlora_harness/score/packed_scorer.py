"""Scores queries pack by pack: shares of processes, progress, and what happens out of memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from qlora_harness.model.base import is_out_of_memory
from qlora_harness.score.packed_forward import PackedModel, Reads, Running
from qlora_harness.score.prefix_tree import Pack, Query, Score, plan

logger = logging.getLogger("qlora_harness")

_CPU_PACK = 8192
_GPU_PACK = 24576
_SMALLEST_PACK = 256
_ROUND = 128


class PackedScores(NamedTuple):
    """Scores by the number of the query, and the tokens that all processes compute for them."""

    scores: dict[int, Score]
    computed_tokens: int


class PackedScorer:
    """Scores queries with a model, in as few tokens as they distinctly hold.

    Args:
        model: Computes one pack.
        window: Longest input of the model, tokens.
        pack_tokens: Most tokens in a pack.
    """

    def __init__(self, model: PackedModel, *, window: int, pack_tokens: int) -> None:
        self._model = model
        self._window = window
        self.pack_tokens = pack_tokens

    def build_ahead(self) -> None:
        """On a GPU, begins to build the kernels of whole packs; `wait` before anything else."""
        if self._model.overlaps:
            self._model.build_ahead(self.pack_tokens)

    def wait(self) -> None:
        """Waits until nothing is being built ahead."""
        self._model.wait()

    def score(
        self,
        queries: Sequence[Query],
        *,
        share: tuple[int, int] = (0, 1),
        show_progress: bool = True,
        on_scored: Callable[[Sequence[tuple[int, Score]]], None] = lambda scored: None,
    ) -> PackedScores:
        """Scores this process's share of queries, which are the same list on every process.

        `share` is this process and the number of processes; a share is a run of packs, so mostly
        whole subtrees. `on_scored` is called after each pack with the queries that it completed.
        """
        pending = list(range(len(queries)))
        scores: dict[int, Score] = {}
        computed_tokens, started, own_tokens = 0, time.perf_counter(), 0
        with tqdm(desc="Scoring", unit=" texts", disable=not show_progress) as bar:
            while pending:
                planned = plan(
                    [queries[n] for n in pending], pack_tokens=self.pack_tokens, window=self._window
                )
                computed_tokens = computed_tokens or sum(len(pack.tokens) for pack in planned)
                packs = _share(planned, *share)
                mine = [pending[n] for pack in packs for n in np.unique(pack.read_query)]
                bar.total = len(scores) + len(mine)
                for pack, reads in self._computed(packs):
                    fresh = [(pending[n], score) for n, score in _sums(pack, reads)]
                    scores.update(fresh)
                    on_scored(fresh)
                    own_tokens += len(pack.tokens)
                    rate = own_tokens / (time.perf_counter() - started)
                    bar.set_postfix_str(f"{rate:,.0f} distinct tokens/s", refresh=False)
                    bar.update(len(fresh))
                pending = sorted(n for n in mine if n not in scores)
                if pending:
                    # Every process must keep its share, so only its own packs are made smaller.
                    share = (0, 1)
                    self.pack_tokens //= 2
                    torch.cuda.empty_cache()
                    logger.warning(
                        "out of memory: going on with packs of %d tokens", self.pack_tokens
                    )
        return PackedScores(scores, computed_tokens)

    def _computed(self, packs: Sequence[Pack]) -> Iterator[tuple[Pack, Reads]]:
        """Yields packs with what was read from them; ends early where memory runs out."""
        running: tuple[Pack, Running] | None = None
        for pack in packs:
            try:
                started = self._model.start(pack, self._padding(pack, len(packs) == 1))
            except Exception as error:
                if not is_out_of_memory(error) or self.pack_tokens <= _SMALLEST_PACK:
                    raise
                break
            # A GPU works on this pack while the results of the one before are put away.
            if running is not None:
                yield running[0], running[1].reads()
            running = pack, started
            if not self._model.overlaps:
                yield pack, started.reads()
                running = None
        if running is not None:
            yield running[0], running[1].reads()

    def _padding(self, pack: Pack, alone: bool) -> int:
        """On a GPU one length for all packs: kernels are built anew for every other."""
        size = len(pack.tokens)
        if not self._model.overlaps:
            return size
        padded = self.pack_tokens
        while alone and padded >= 2 * max(size, _ROUND):
            padded //= 2
        return padded if size <= padded else -(-size // _ROUND) * _ROUND


def _share(packs: Sequence[Pack], rank: int, world: int) -> list[Pack]:
    """A run of packs with about an equal part of the tokens."""
    sizes = np.array([len(pack.tokens) for pack in packs], dtype=np.int64)
    middles = np.cumsum(sizes) - sizes / 2
    owner = np.minimum((middles * world / max(1, sizes.sum())).astype(int), world - 1)
    return [pack for pack, mine in zip(packs, owner == rank, strict=True) if mine]


def _sums(pack: Pack, reads: Reads) -> list[tuple[int, Score]]:
    """The score of each query: the sum over its tokens, and whether each was the likeliest."""
    total = np.bincount(pack.read_query, weights=reads.logprobs)
    misses = np.bincount(pack.read_query, weights=~reads.greedy)
    numbers = np.unique(pack.read_query)
    return [(int(n), (float(total[n]), bool(misses[n] == 0))) for n in numbers]


def default_pack_tokens(model: torch.nn.Module, device: torch.device) -> int:
    """Returns a pack size that fits the device, which holds the model already.

    A token of a pack takes at most ten vectors of the hidden size and four of the intermediate size
    while it passes through a layer; through a fused layer about four and three.
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

"""Plans the scoring of many texts as a trie of tokens, so that shared prefixes are computed once.

In lexicographic order, a sequence shares its longest prefix with the sequence before it. So a pack
is a run of sorted sequences, each of which adds the tokens after that prefix: the trie in
depth-first order. The ancestors of token q are then the tokens k <= q with q < end[k], where end[k]
is the index after the subtree of k.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
Score = tuple[float, bool]  # log-probability in nats, and whether it is the greedy continuation


@dataclass(frozen=True)
class Query:
    """Token ids, and those after them whose log-probability is read; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Segment:
    """The tokens [start, stop) that a sequence adds to a pack, and their ancestors."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]  # ranges [start, stop) of the pack, from the root


@dataclass(frozen=True)
class Pack:
    """One forward pass over T tokens, of which R next-token distributions are read."""

    tokens: IntArray  # ids in depth-first order, [T]
    positions: IntArray  # distance of each token from its root, [T]
    end: IntArray  # index after the subtree of each token, [T]
    segments: tuple[Segment, ...]  # in order; they cover the pack
    read_at: IntArray  # indices of tokens, [R]
    read_token: IntArray  # the token whose log-probability is read there, [R]
    read_query: IntArray  # its query, [R]; in the order of the query's tokens


class _Row(NamedTuple):
    """Input tokens and the queries that share them."""

    tokens: IntArray
    queries: list[int]


class PlannedPack(NamedTuple):
    """The sorted rows of a pack, and the length of the prefix each shares with the one before."""

    rows: list[_Row]
    shared: list[int]

    @property
    def tokens(self) -> int:
        """The number of its tokens."""
        return sum(len(row.tokens) for row in self.rows) - sum(self.shared)

    def queries(self) -> list[int]:
        """Returns the numbers of the queries that it answers."""
        return [query for row in self.rows for query in row.queries]


def plan(queries: Sequence[Query], *, pack_tokens: int, window: int) -> list[Pack]:
    """Returns the forward passes that answer all queries; see `plan_packs`."""
    planned = plan_packs(queries, pack_tokens=pack_tokens, window=window)
    return [lay_out(pack, queries) for pack in planned]


def plan_packs(queries: Sequence[Query], *, pack_tokens: int, window: int) -> list[PlannedPack]:
    """Plans the forward passes that answer all queries; duplicates cost nothing.

    A pack has at most `pack_tokens` tokens, unless one sequence is longer. Inputs longer than
    `window` lose tokens on the left, as in HFLM. Laying packs out, with `lay_out`, takes longer
    than planning them, so it can wait until a GPU is busy.
    """
    rows = _distinct_rows(queries, window)
    packs = []
    group: list[_Row] = []
    shared: list[int] = []  # 0 for the first
    size = 0
    for row in rows:
        common = _common(group[-1].tokens, row.tokens) if group else 0
        if group and size + len(row.tokens) - common > pack_tokens:
            packs.append(PlannedPack(group, shared))
            group, shared, size, common = [], [], 0, 0
        group.append(row)
        shared.append(common)
        size += len(row.tokens) - common
    if group:
        packs.append(PlannedPack(group, shared))
    return packs


def _distinct_rows(queries: Sequence[Query], window: int) -> list[_Row]:
    """The distinct inputs in lexicographic order: all but the last token, cut to the window."""
    by_input: dict[bytes, list[int]] = {}
    # Choices of one token share their input, and mostly the same list object.
    known: dict[tuple[int, tuple[int, ...]], bytes] = {}
    for number, query in enumerate(queries):
        read = tuple(query.continuation[:-1])
        key = known.get((id(query.context), read))
        if key is None:
            # Big-endian, so that bytes sort as the token ids do.
            ids = array("I", [*query.context, *read][-window:])  # ten times as fast as NumPy's
            key = np.frombuffer(ids, dtype=np.uint32).astype(">u4").tobytes()
            known[id(query.context), read] = key
        by_input.setdefault(key, []).append(number)
    return [
        _Row(np.frombuffer(key, dtype=">u4").astype(np.int32), by_input[key])
        for key in sorted(by_input)
    ]


def _common(a: IntArray, b: IntArray) -> int:
    """Length of the common prefix."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def lay_out(planned: PlannedPack, queries: Sequence[Query]) -> Pack:
    """Lays out a pack that `plan_packs` planned for these queries."""
    rows, shared = planned
    spans = [(common, len(row.tokens)) for row, common in zip(rows, shared, strict=True)]
    size = sum(length - common for common, length in spans)
    end = np.full(size, size, dtype=np.int32)
    # Index in the pack of each token of the current row.
    path = np.empty(max(length for _, length in spans), dtype=np.int32)
    depth = filled = 0
    segments: list[Segment] = []
    read_at: list[int] = []
    read_token: list[int] = []
    read_query: list[int] = []
    for row, (common, length) in zip(rows, spans, strict=True):
        end[path[common:depth]] = filled
        stop = filled + length - common
        path[common:length] = np.arange(filled, stop, dtype=np.int32)
        if stop > filled:
            segments.append(Segment(filled, stop, _ranges(path[:common])))
        depth, filled = length, stop
        for query in row.queries:
            continuation = queries[query].continuation
            read_at += path[length - len(continuation) : length].tolist()
            read_token += continuation
            read_query += [query] * len(continuation)
    return Pack(
        np.concatenate([row.tokens[common:] for row, common in zip(rows, shared, strict=True)]),
        np.concatenate([np.arange(*span, dtype=np.int32) for span in spans]),
        end,
        tuple(segments),
        *(np.asarray(values, dtype=np.int32) for values in (read_at, read_token, read_query)),
    )


def _ranges(path: IntArray) -> tuple[tuple[int, int], ...]:
    """Joins consecutive indices into [start, stop) ranges."""
    if not len(path):
        return ()
    breaks = np.flatnonzero(np.diff(path) != 1) + 1
    starts = path[np.concatenate(([0], breaks))]
    stops = path[np.concatenate((breaks - 1, [len(path) - 1]))] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))

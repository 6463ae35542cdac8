"""Plans the scoring of many texts as a trie of tokens: each distinct token position computed once.

Pure planning: no torch, no lm_eval. Sorted lexicographically, sequences that share a prefix stand
side by side, and what a sequence shares with the one before it is all it shares with any earlier
one. So a pack is a run of the sorted order: each sequence adds the tokens past its common prefix
with the one before, in depth-first order of the trie. In that order the ancestors of token q are
the tokens k <= q with q < end[k], where end[k] is the index after the subtree of k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class Query:
    """Token ids, at least one, and those after them whose log-probability is read, at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Segment:
    """A run of new tokens in a pack, [start, stop), and the tokens it continues."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]
    """Ranges [start, stop) of the pack that come before it on its path, from the root."""


@dataclass(frozen=True)
class Pack:
    """One forward pass over T tokens, of which R next-token distributions are read."""

    tokens: IntArray  # ids in depth-first order, [T]
    positions: IntArray  # distance of each token from its root, [T]
    end: IntArray  # index after the subtree of each token, [T]
    segments: tuple[Segment, ...]  # in order; they cover the pack
    read_at: IntArray  # indices of tokens, [R]
    read_token: IntArray  # the token whose log-probability is read there, [R]
    read_query: IntArray  # its query, [R]; the reads of a query are in the order of its tokens


@dataclass(frozen=True)
class Plan:
    """All packs of a set of queries."""

    packs: tuple[Pack, ...]
    input_tokens: int
    """Of all queries, one by one."""
    distinct_tokens: int
    """Nodes of the trie of all queries."""
    computed_tokens: int
    """Of all packs; more than `distinct_tokens` by the prefixes that a pack repeats."""
    truncated: tuple[int, ...]
    """Queries that were longer than the window and lost tokens on the left."""


@dataclass(frozen=True)
class _Row:
    """Input tokens, and the queries that have them in common."""

    tokens: IntArray
    queries: tuple[int, ...]


def plan(queries: Sequence[Query], *, pack_tokens: int, window: int) -> Plan:
    """Plans the forward passes that answer all queries, in any order; duplicates cost nothing.

    A pack has at most `pack_tokens` tokens; a longer sequence gets a pack of its own. Inputs longer
    than `window` lose tokens on the left, as with HFLM.
    """
    rows, truncated = _distinct_rows(queries, window)
    # What each row shares with the one before it; the first has none.
    shared = [_common(rows[i - 1].tokens, row.tokens) if i else 0 for i, row in enumerate(rows)]
    packs = []
    first = 0
    while first < len(rows):
        last, size = first + 1, len(rows[first].tokens)
        while last < len(rows):
            added = len(rows[last].tokens) - shared[last]
            if size + added > pack_tokens:
                break
            size += added
            last += 1
        packs.append(_pack(rows[first:last], shared[first:last], queries))
        first = last
    return Plan(
        tuple(packs),
        sum(min(window, len(q.context) + len(q.continuation) - 1) for q in queries),
        sum(len(row.tokens) - common for row, common in zip(rows, shared, strict=True)),
        sum(len(pack.tokens) for pack in packs),
        truncated,
    )


def _input(query: Query, window: int) -> Sequence[int]:
    """What the model reads: all but the last token, cut on the left to the window."""
    whole = [*query.context, *query.continuation[:-1]]
    return whole[-window:]


def _distinct_rows(queries: Sequence[Query], window: int) -> tuple[list[_Row], tuple[int, ...]]:
    """The distinct inputs in lexicographic order of their tokens."""
    by_input: dict[bytes, list[int]] = {}
    truncated = []
    # Choices of one token have the input in common, and mostly the very list of its tokens.
    known: dict[tuple[int, tuple[int, ...]], bytes] = {}
    for number, query in enumerate(queries):
        if len(query.context) + len(query.continuation) > window + 1:
            truncated.append(number)
        short = (id(query.context), tuple(query.continuation[:-1]))
        key = known.get(short)
        if key is None:
            # Big-endian, so that bytes sort as the token ids do.
            key = np.asarray(_input(query, window), dtype=">u4").tobytes()
            known[short] = key
        by_input.setdefault(key, []).append(number)
    rows = [
        _Row(np.frombuffer(key, dtype=">u4").astype(np.int32), tuple(by_input[key]))
        for key in sorted(by_input)
    ]
    return rows, tuple(truncated)


def _common(a: IntArray, b: IntArray) -> int:
    """Length of the common prefix."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _pack(rows: Sequence[_Row], shared: Sequence[int], queries: Sequence[Query]) -> Pack:
    """Lays sorted rows out as one pack; the first row shares nothing with what is before it."""
    longest = max(len(row.tokens) for row in rows)
    size = len(rows[0].tokens) + sum(
        len(row.tokens) - common for row, common in zip(rows[1:], shared[1:], strict=True)
    )
    tokens = np.empty(size, dtype=np.int32)
    positions = np.empty(size, dtype=np.int32)
    end = np.full(size, size, dtype=np.int32)
    path = np.empty(longest, dtype=np.int32)  # index in the pack of each token of the current row
    depth = filled = 0
    segments: list[Segment] = []
    read_at: list[int] = []
    read_token: list[int] = []
    read_query: list[int] = []
    for number, row in enumerate(rows):
        common = shared[number] if number else 0
        length = len(row.tokens)
        end[path[common:depth]] = filled
        stop = filled + length - common
        tokens[filled:stop] = row.tokens[common:]
        positions[filled:stop] = np.arange(common, length, dtype=np.int32)
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
        tokens,
        positions,
        end,
        tuple(segments),
        np.asarray(read_at, dtype=np.int32),
        np.asarray(read_token, dtype=np.int32),
        np.asarray(read_query, dtype=np.int32),
    )


def _ranges(path: IntArray) -> tuple[tuple[int, int], ...]:
    """Joins consecutive indices into [start, stop) ranges."""
    if not len(path):
        return ()
    breaks = np.flatnonzero(np.diff(path) != 1) + 1
    starts = path[np.concatenate(([0], breaks))]
    stops = path[np.concatenate((breaks - 1, [len(path) - 1]))] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_harness.score.prefix_tree import Pack, Query, Segment, plan, plan_packs

SMALL = st.lists(st.integers(0, 2), min_size=1, max_size=8)
QUERIES = st.lists(st.builds(Query, SMALL, SMALL), min_size=1, max_size=25)


def ancestors(pack: Pack, q: int) -> list[int]:
    """What a token sees, by the rule k <= q < end[k]."""
    return [k for k in range(q + 1) if q < pack.end[k]]


def text(pack: Pack, q: int) -> list[int]:
    """The tokens from the root to token q."""
    return [int(pack.tokens[k]) for k in ancestors(pack, q)]


def trie_size(queries: list[Query], window: int) -> int:
    nodes = set()
    for query in queries:
        tokens = [*query.context, *query.continuation][-(window + 1) :][:-1]
        nodes |= {tuple(tokens[: i + 1]) for i in range(len(tokens))}
    return len(nodes)


def check(queries: list[Query], packs: list[Pack], window: int) -> None:
    seen: dict[int, list[tuple[list[int], int]]] = {}
    for pack in packs:
        for at, token, number in zip(pack.read_at, pack.read_token, pack.read_query, strict=True):
            seen.setdefault(int(number), []).append((text(pack, int(at)), int(token)))
        for q in range(len(pack.tokens)):
            assert pack.positions[q] == len(ancestors(pack, q)) - 1
        covered = [i for s in pack.segments for i in range(s.start, s.stop)]
        assert covered == list(range(len(pack.tokens)))
        for segment in pack.segments:
            before = [i for a, b in segment.ancestors for i in range(a, b)]
            assert before == [k for k in ancestors(pack, segment.start) if k < segment.start]
    assert sorted(seen) == list(range(len(queries)))
    for number, query in enumerate(queries):
        whole = [*query.context, *query.continuation][-(window + 1) :]
        first = len(whole) - len(query.continuation)
        assert seen[number] == [(whole[: first + i], t) for i, t in enumerate(query.continuation)]


@settings(max_examples=300, deadline=None)
@given(QUERIES, st.integers(1, 40))
def test_every_query_reads_its_own_tokens_after_its_own_text(
    queries: list[Query], pack_tokens: int
) -> None:
    packs = plan(queries, pack_tokens=pack_tokens, window=100)
    check(queries, packs, 100)
    planned = plan_packs(queries, pack_tokens=pack_tokens, window=100)
    assert [pack.tokens for pack in planned] == [len(pack.tokens) for pack in packs]
    for pack, numbers in zip(packs, (pack.queries() for pack in planned), strict=True):
        assert sorted(numbers) == np.unique(pack.read_query).tolist()
        # Only a single text that is longer than a pack may exceed it.
        assert len(pack.tokens) <= pack_tokens or len(pack.segments) == 1


@settings(max_examples=100, deadline=None)
@given(QUERIES)
def test_one_pack_holds_each_distinct_token_once(queries: list[Query]) -> None:
    (pack,) = plan(queries, pack_tokens=10_000, window=100)
    assert len(pack.tokens) == trie_size(queries, 100)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.builds(Query, SMALL, st.just([1])), min_size=1, max_size=10))
def test_long_queries_lose_tokens_on_the_left(queries: list[Query]) -> None:
    check(queries, plan(queries, pack_tokens=50, window=4), 4)


def test_a_pack_worked_out_by_hand() -> None:
    queries = [Query([5, 6, 7], [1]), Query([5, 6, 7], [2]), Query([5, 6, 8], [3, 4])]
    (pack,) = plan(queries, pack_tokens=100, window=100)
    # 5 ─ 6 ─┬ 7          the last token of a query is never an input
    #        └ 8 ─ 3
    assert pack.tokens.tolist() == [5, 6, 7, 8, 3]
    assert pack.positions.tolist() == [0, 1, 2, 2, 3]
    assert pack.end.tolist() == [5, 5, 3, 5, 5]
    assert pack.segments == (Segment(0, 3, ()), Segment(3, 5, ((0, 2),)))
    assert pack.read_at.tolist() == [2, 2, 3, 4]
    assert pack.read_token.tolist() == [1, 2, 3, 4]
    assert pack.read_query.tolist() == [0, 1, 2, 2]


def test_a_full_pack_is_followed_by_one_that_repeats_its_prefix() -> None:
    queries = [Query([1, 2, 3], [i]) for i in range(4)] + [Query([1, 2, 9], [0])]
    sizes = [len(pack.tokens) for pack in plan(queries, pack_tokens=3, window=100)]
    assert sizes == [3, 3]  # the prefix 1 2 stands in both


def test_no_query_needs_no_pack() -> None:
    assert plan([], pack_tokens=8, window=8) == []


def test_the_plan_is_pure() -> None:
    code = (
        "import sys, qlora_harness.score.prefix_tree;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lm_eval', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_real_test_set_shrinks_sevenfold(mmlu_test_ids: list[list[int]]) -> None:
    queries = [Query(ids, [letter]) for ids in mmlu_test_ids for letter in (319, 350, 315, 360)]
    assert sum(map(len, mmlu_test_ids)) == 10_882_111
    (whole,) = plan(queries, pack_tokens=10**9, window=4096)
    assert len(whole.tokens) == 1_542_533
    for size, tokens in ((24_576, 1_603_466), (65_536, 1_564_054)):
        packs = plan(queries, pack_tokens=size, window=4096)
        assert sum(len(pack.tokens) for pack in packs) == tokens
    assert np.unique(np.concatenate([p.read_query for p in packs])).size == len(queries)


@pytest.fixture(scope="module")
def mmlu_test_ids(shared_data: object) -> list[list[int]]:
    from transformers import PreTrainedTokenizerFast

    from qlora_harness.score.mmlu_files import load_questions

    tokenizer = PreTrainedTokenizerFast.from_pretrained(f"{shared_data}/tokenizer-llama2")
    questions = load_questions("five_shot_mmlu_test.json", f"{shared_data}/mmlu")
    ids: list[list[int]] = tokenizer([q.prompt for q in questions])["input_ids"]
    return ids

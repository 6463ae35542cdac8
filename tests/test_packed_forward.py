"""The packed forward against the plain one, in float32, on several architectures."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_of_any_kind

from qlora_harness.score.packed_forward import PackedModel, why_unsupported
from qlora_harness.score.packed_scorer import PackedScorer, default_pack_tokens
from qlora_harness.score.prefix_tree import Query, plan
from qlora_harness.score.tree_attention import BLOCK, tree_blocks

WINDOW = 48


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_of_any_kind(request.param)


def plain(model: Any, query: Query) -> tuple[float, bool]:
    """HFLM's rule, one text at a time."""
    whole = [*query.context, *query.continuation][-(WINDOW + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([whole[:-1]])).logits[0].float()
    targets = torch.tensor(query.continuation)
    logprobs = torch.log_softmax(logits, dim=-1)[-len(targets) :]
    total = logprobs[torch.arange(len(targets)), targets].sum()
    return float(total), bool((logprobs.argmax(-1) == targets).all())


TOKENS = st.integers(0, 3)
QUERIES = st.lists(
    st.builds(
        Query,
        st.lists(TOKENS, min_size=1, max_size=WINDOW + 6),
        st.lists(TOKENS, min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(queries=QUERIES, pack_tokens=st.integers(1, 160))
def test_packed_equals_plain(model: Any, queries: list[Query], pack_tokens: int) -> None:
    packed = PackedModel(model, torch.float32)
    scorer = PackedScorer(packed, window=WINDOW, pack_tokens=pack_tokens)
    scores = scorer.score([queries], show_progress=False).scores
    assert sorted(scores) == list(range(len(queries)))
    for number, query in enumerate(queries):
        logprob, greedy = plain(model, query)
        assert scores[number][0] == pytest.approx(logprob, abs=1e-4)
        assert scores[number][1] == greedy


@settings(max_examples=30, deadline=None)
@given(queries=QUERIES, filling=st.integers(0, 300))
def test_blocks_that_queries_see_whole_or_in_part(queries: list[Query], filling: int) -> None:
    # Long tails, so that whole blocks are seen, skipped, and seen in part.
    longer = [
        Query([*q.context, *range(i, i + filling)], q.continuation) for i, q in enumerate(queries)
    ]
    (pack,) = plan(longer, pack_tokens=10**6, window=10**6)
    size = len(pack.end) // BLOCK * BLOCK
    if not size:
        return
    end, seen = tree_blocks(np.minimum(pack.end[:size], size), torch.device("cpu"))
    number = torch.arange(size)
    sees = (number <= number[:, None]) & (number[:, None] < end)
    tiles = sees.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(2)
    for (whole, some, *blocks), tile in zip(seen.tolist(), tiles, strict=True):
        assert blocks[:whole] == tile.all(1).nonzero()[:, 0].tolist()
        assert sorted(blocks[:some]) == tile.any(1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("free", "expected"),
    [(60e9, 65536), (11e9, 51769), (1e6, 1024)],  # 169,984 bytes a token, in 80% of the memory
)
def test_packs_are_as_large_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch, free: float, expected: int
) -> None:
    model: Any = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    model.config = SimpleNamespace(hidden_size=4096, intermediate_size=11008)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    assert default_pack_tokens(model, torch.device("cuda")) == expected
    assert default_pack_tokens(model, torch.device("cuda"), 2) == min(expected, 24576)
    assert default_pack_tokens(model, torch.device("cpu")) == 8192


def test_the_model_is_left_as_it_was(model: Any) -> None:
    assert why_unsupported(model.config) is None
    before = model.config._attn_implementation
    query = Query([1, 2, 3], [4])
    expected = plain(model, query)
    PackedScorer(PackedModel(model, torch.float32), window=WINDOW, pack_tokens=64).score(
        [[query]], show_progress=False
    )
    assert model.config._attn_implementation == before
    assert plain(model, query) == expected


def test_shares_of_all_processes_make_the_whole(model: Any) -> None:
    rng = np.random.default_rng(0)
    queries = [
        Query(rng.integers(0, 3, size=rng.integers(1, 30)).tolist(), [int(rng.integers(0, 3))])
        for _ in range(60)
    ]
    scorer = PackedScorer(PackedModel(model, torch.float32), window=WINDOW, pack_tokens=64)
    alone = scorer.score([queries], show_progress=False).scores
    shares = [scorer.score([queries], share=(rank, 3), show_progress=False) for rank in range(3)]
    parts = [share.scores for share in shares]
    assert sum(len(part) for part in parts) == len(queries)
    assert {n: s for part in parts for n, s in part.items()} == alone
    assert min(len(part) for part in parts) > 0


class RunsOut:
    """A model that has memory for so many tokens only."""

    overlaps, is_sharded = True, False

    def __init__(self, inner: PackedModel, limit: int) -> None:
        self.inner, self.limit, self.failed = inner, limit, 0
        self.join = inner.join

    def start(self, pack: Any) -> Any:
        if len(pack.tokens) > self.limit:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner.start(pack)


def test_out_of_memory_halves_the_packs_and_goes_on(model: Any) -> None:
    rng = np.random.default_rng(1)
    queries = [Query(rng.integers(0, 40, size=30).tolist(), [1]) for _ in range(80)]
    packed = PackedModel(model, torch.float32)
    limited = RunsOut(packed, 300)
    scorers = [PackedScorer(m, window=WINDOW, pack_tokens=1024) for m in (packed, limited)]  # type: ignore[arg-type]
    expected, scored = (s.score([queries], show_progress=False) for s in scorers)
    assert scorers[1].pack_tokens == 256
    assert limited.failed == 2
    assert scored.computed_tokens == expected.computed_tokens
    assert {n: s[0] for n, s in scored.scores.items()} == pytest.approx(
        {n: s[0] for n, s in expected.scores.items()}, abs=1e-5
    )


def test_parts_are_made_while_a_gpu_computes(model: Any) -> None:
    rng = np.random.default_rng(2)
    queries = [Query(rng.integers(0, 40, size=30).tolist(), [1]) for _ in range(40)]
    events: list[Any] = []

    class Noted(RunsOut):
        def start(self, pack: Any) -> Any:
            events.append(len(pack.tokens) <= self.limit)
            return super().start(pack)

    def parts() -> Iterator[list[Query]]:
        for number, (start, stop) in enumerate([(0, 5), (5, 30), (30, 40)]):
            events.append(number)
            yield queries[start:stop]

    packed = PackedModel(model, torch.float32)
    scored: list[Any] = []
    whole = PackedScorer(packed, window=WINDOW, pack_tokens=1024)
    expected = whole.score([queries], show_progress=False).scores
    limited: Any = Noted(packed, 300)
    scorer = PackedScorer(limited, window=WINDOW, pack_tokens=1024)
    scores = scorer.score(parts(), show_progress=False, on_scored=scored.extend).scores
    # The second part is made while the first pack runs; it is too large for the memory, twice.
    assert events[:5] == [0, True, 1, False, False]
    assert set(events[5:]) == {True, 2}
    assert sorted(n for n, _ in scored) == sorted(scores) == list(range(40))
    assert {n: s[0] for n, s in scores.items()} == pytest.approx(
        {n: s[0] for n, s in expected.items()}, abs=1e-5
    )


def test_first_pack_waits_for_what_is_built_ahead() -> None:
    model = tiny_of_any_kind("llama")
    packed = PackedModel(model, torch.float32)
    (pack,) = plan([Query([1, 2, 3], [4])], pack_tokens=256, window=WINDOW)
    goes_on = threading.Event()
    seen: list[tuple[str, int]] = []

    def forward(module: Any, args: Any) -> None:
        thread = threading.current_thread().name
        if thread != "MainThread":
            goes_on.wait(10)
        seen.append((thread, args[0].shape[1]))

    hook = model.model.embed_tokens.register_forward_pre_hook(forward)
    packed.build_ahead()
    threading.Timer(0.2, goes_on.set).start()
    packed.start(pack).reads()
    hook.remove()
    assert seen == [("qlora_harness kernels", 1), ("MainThread", len(pack.tokens))]


def test_what_can_not_be_built_ahead_is_left_to_the_first_pack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_of_any_kind("llama")
    packed = PackedModel(model, torch.float32)
    query = Query([1, 2, 3], [4])
    (pack,) = plan([query], pack_tokens=256, window=WINDOW)
    failures = iter([torch.OutOfMemoryError("CUDA out of memory"), ValueError("broken")])

    def forward(module: Any, args: Any) -> None:
        if (failure := next(failures, None)) is not None:
            raise failure

    hook = model.model.embed_tokens.register_forward_pre_hook(forward)
    before = model.config._attn_implementation
    with caplog.at_level("INFO", logger="qlora_harness"):
        packed.build_ahead()
        packed.wait()
    assert caplog.messages == ["kernels could not be built ahead (OutOfMemoryError)"]
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="broken"):
        packed.start(pack)
    reads = packed.start(pack).reads()
    hook.remove()
    assert reads.logprobs[0] == pytest.approx(plain(model, query)[0], abs=1e-4)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "mamba"}, "model type 'mamba' is not among those checked"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding-window attention (8 tokens)"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            "layers of type sliding_attention",
        ),
        ({"model_type": "llama", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}},
            "rotary embedding (dynamic)",
        ),
    ],
)
def test_models_it_cannot_take_are_refused(values: dict[str, Any], reason: str) -> None:
    assert reason in str(why_unsupported(SimpleNamespace(**values)))

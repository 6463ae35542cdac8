"""Rows that fill up a length of the CUDA graphs, without the graphs: loss and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import adapted, gradients, texts, tiny

from qlora_harness.data.examples import IGNORE
from qlora_harness.fused.graphs import LayerGraphs, padded
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.fused.packed_row import PackedRow, Rotation, RowBuffer
from qlora_harness.train.batches import pack_batch


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(1, 32), (32, 32), (33, 64), (512, 512), (513, 544), (1025, 1088), (4097, 4352), (5000, 5120)],
)
def test_lengths_are_at_most_a_sixteenth_longer(tokens: int, length: int) -> None:
    assert padded(tokens) == length


def test_all_lengths_follow_the_rule() -> None:
    for tokens in range(1, 9000):
        assert 0 <= padded(tokens) - tokens <= max(31, tokens // 16)
        assert padded(padded(tokens)) == padded(tokens)


def test_buffer_has_the_tiles_of_its_row_and_empty_ones() -> None:
    def row(*starts: int) -> PackedRow:
        turns = torch.rand(starts[-1], 4)
        return PackedRow(turns, -turns, torch.tensor(starts, dtype=torch.int32), starts, 0)

    like = Rotation(torch.zeros(1, 4), torch.zeros(1, 4))
    buffer, first, second = RowBuffer(32, 4, like), row(0, 5, 21), row(0, 8, 16, 24, 32)
    buffer.fill(first)
    tiles = buffer.tiles(8)
    assert len(tiles) == 10
    lines = [[5, 16, 8], [5, 16, 0], [21, 11, 8], [21, 11, 0], [0, 5, 0]]
    assert tiles.tolist() == lines + [[0, 0, 0]] * 5
    assert torch.equal(buffer.cos[:21], first.cos)
    buffer.fill(second)
    assert buffer.tiles(8) is tiles  # in the same memory
    assert tiles.tolist() == [[start, 8, 0] for start in (24, 16, 8, 0)] + [[0, 0, 0]] * 6
    assert torch.equal(buffer.sin, second.sin)


def through_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerGraphs, "serve", lambda *_: torch.is_grad_enabled())


def backward(model: Any, rows: list[dict[str, list[int]]]) -> float:
    batch = pack_batch(rows)
    loss = model(**batch, num_items_in_batch=(batch["shift_labels"] != IGNORE).sum()).loss
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("kind", "quantised"), [("llama", True), ("qwen2", False), ("qwen3", False)]
)
def test_padded_passes_equal_the_layers_own(
    kind: str, quantised: bool, checkpointing: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three passes of a step, two of which share buffers, then another step."""
    plain = adapted(tiny(kind, quantised=quantised, layers=3), dropout=dropout)
    models = plain, copy.deepcopy(plain)
    decoders = [FusedDecoder.attach(model, checkpointing) for model in models]
    passes = [texts([9, 20], seed=1), texts([33, 12, 40], seed=2), texts([14, 15], seed=3)]
    steps = []
    for model in models:
        torch.manual_seed(5)
        losses = [backward(model, rows) for rows in passes]
        first = gradients(model)
        steps.append(([*losses, backward(model, passes[0])], first, gradients(model)))
        through_graphs(monkeypatch)
    assert [decoder.graphs.passes for decoder in decoders] == [0, 4]
    expected, padded_steps = steps
    assert padded_steps[0] == pytest.approx(expected[0], rel=1e-6)
    for own, reference in zip(padded_steps[1:], expected[1:], strict=True):
        assert own.keys() == reference.keys()
        for name, gradient in reference.items():
            assert (own[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


def test_other_passes_of_a_step_add_to_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny("llama", layers=3))
    FusedDecoder.attach(model, "none")
    rows = [texts([9, 20], seed=1), texts([14, 15], seed=2)]
    for each in rows:
        backward(model, each)
    expected = gradients(model)
    for order in ((0, 1), (1, 0)):  # the layers' own pass comes first, then last
        for number in order:
            with monkeypatch.context() as patch:
                if number:
                    through_graphs(patch)
                backward(model, rows[number])
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_backward_pass_after_a_later_row_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny("llama", layers=3))
    FusedDecoder.attach(model, "none")
    through_graphs(monkeypatch)
    first, second = (model(**pack_batch(texts([9, 20], seed))).loss for seed in (1, 2))
    second.backward()
    with pytest.raises(RuntimeError, match="later row"):
        first.backward()


def test_few_lengths_stay_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_harness.fused.graphs._LENGTHS", 2)
    model = adapted(tiny("llama", layers=3))
    decoder = FusedDecoder.attach(model, "none")
    through_graphs(monkeypatch)
    for length in (70, 20, 40, 30):
        backward(model, texts([length]))
    assert list(decoder.graphs._rows) == [(64, 1, True), (32, 1, True)]
    decoder.detach()
    assert not decoder.graphs._rows


def test_longest_row_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny("llama", layers=3), dropout=0.1)
    decoder = FusedDecoder.attach(model, "none", longest=90)
    through_graphs(monkeypatch)
    backward(model, texts([20, 8, 7]))
    assert list(decoder.graphs._rows) == [(96, 4, False), (64, 4, False)]
    backward(model, texts([100]))  # longer than announced
    backward(model.eval(), texts([100]))
    assert list(decoder.graphs._rows) == [(128, 1, False), (128, 1, True)]


def test_cpus_need_no_graphs() -> None:
    decoder = FusedDecoder.attach(adapted(tiny("llama", layers=3)), "none")
    assert not decoder.graphs.serve(torch.zeros(32, 64))

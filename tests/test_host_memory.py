"""Activations in the host's memory, with streams that do everything at once in place of CUDA's."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from test_fused import adapted, fused_step, texts, tiny

from qlora_harness.errors import TrainingError
from qlora_harness.fused import host_memory
from qlora_harness.fused.host_memory import Blocks, HostMemory
from qlora_harness.fused.model import install

BLOCK = 2**24


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: str) -> None:
        assert event == "event"

    def record_event(self) -> str:
        return "event"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options)
    )
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(HostMemory, "serves", lambda host, x: True)


def test_blocks_are_used_again_and_a_quarter_more_are_pinned(streams: None) -> None:
    blocks = Blocks()
    first = blocks.take(3 * BLOCK + 1)
    assert (len(first), blocks.pinned) == (4, 5)
    assert blocks.new_bytes(BLOCK) == 0 and blocks.new_bytes(BLOCK + 1) == 2 * BLOCK
    second = blocks.take(BLOCK)
    assert blocks.pinned == 5
    assert len({block.data_ptr() for block in first + second}) == 5
    blocks.give(first)
    assert len(blocks.take(4 * BLOCK)) == 4 and blocks.pinned == 5


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [0, 3, 4, 1, 2], []])
def test_tensors_come_back_in_any_order(streams: None, order: list[int]) -> None:
    host = HostMemory()
    tensors = [torch.randn(3000, 2048) for _ in range(5)]  # two blocks each
    wanted = [x.clone() for x in tensors]
    stored = [host.put(x) for x in tensors]
    for x in tensors[:3]:
        x.fill_(7.0)  # their memory was given up
    assert [s.there is not None for s in stored] == [False, False, False, True, True]
    for number in order:
        assert torch.equal(host.get(stored[number]), wanted[number])
        if order[0] == 4 and number:
            assert stored[number - 1].there is not None  # on its way
    free = host._blocks._free
    assert len(free) == host._blocks.pinned - 2 * (5 - len(order))
    stored.clear()
    assert len(free) == host._blocks.pinned
    assert len({block.data_ptr() for block in free}) == len(free)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["selective", "offload"])
def test_steps_are_the_same_wherever_activations_wait(
    streams: None, monkeypatch: pytest.MonkeyPatch, checkpointing: str, dtype: torch.dtype
) -> None:
    """Gates of two layers in three, or the input of each; three steps, with rows of any length."""
    widths: list[int] = []
    own = HostMemory._put

    def put(host: HostMemory, x: torch.Tensor) -> Any:
        widths.append(x.shape[1])
        return own(host, x)

    monkeypatch.setattr(HostMemory, "_put", put)
    found = {}
    for way in ("none", checkpointing):
        model = adapted(tiny("llama", layers=6).to(dtype)).to(dtype)
        install(model, way)
        found[way] = [
            fused_step(model, texts(lengths, seed))
            for seed, lengths in enumerate(([9, 20, 33], [60, 2], [1, 5, 7, 11]))
        ]
    assert widths == ([256] * 4 if checkpointing == "selective" else [64] * 6) * 3
    for (loss, gradients), (wanted, others) in zip(
        found[checkpointing], found["none"], strict=True
    ):
        assert loss == wanted
        assert all(torch.equal(gradients[name], others[name]) for name in others)
    host = model.get_base_model().forward.fused.layers[0].host
    assert len(host._blocks._free) == host._blocks.pinned > 0


def test_graph_that_goes_without_a_backward_pass_gives_its_blocks_back(streams: None) -> None:
    from qlora_harness.train.batches import pack_batch

    for checkpointing in ("selective", "offload"):
        model = adapted(tiny("llama", layers=6))
        install(model, checkpointing)
        output = model(**pack_batch(texts([9, 20])))
        blocks = model.get_base_model().forward.fused.layers[0].host._blocks
        assert len(blocks._free) < blocks.pinned
        del output
        assert len(blocks._free) == blocks.pinned


def test_host_gives_a_quarter_of_what_is_available(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def put(host: HostMemory, x: torch.Tensor) -> str:
        asked.append(x.nbytes)
        return "stored"

    monkeypatch.setattr(HostMemory, "_put", put)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 16 * BLOCK)
    caplog.set_level("INFO")
    host = HostMemory()
    # With the quarter more that is pinned.
    assert host.put_if_room(torch.empty(3 * BLOCK, dtype=torch.uint8)) == "stored"
    assert not caplog.records
    for _ in range(2):
        assert host.put_if_room(torch.empty(3 * BLOCK + 1, dtype=torch.uint8)) is None
    assert len(caplog.records) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert HostMemory().put_if_room(torch.empty(BLOCK, dtype=torch.uint8)) == "stored"
    assert HostMemory().put_if_room(torch.empty(BLOCK + 1, dtype=torch.uint8)) is None
    assert asked == [3 * BLOCK, BLOCK]


def test_memory_that_the_system_does_not_pin_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(host: HostMemory, x: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(HostMemory, "_put", fails)
    host = HostMemory()
    assert host.put_if_room(torch.empty(1)) is None
    message = "pins no more of the host's memory than 0.0 GiB .CUDA error: out of memory."
    with pytest.raises(TrainingError, match=message):
        host.put(torch.empty(1))

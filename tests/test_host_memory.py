"""Activations in host memory, with fake CUDA streams that copy as late as they may."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import adapted, fused_step, noted_widths, texts, tiny

from qlora_harness.errors import TrainingError
from qlora_harness.fused import host_memory
from qlora_harness.fused.host_memory import (
    Blocks,
    HostMemory,
    NoPinnedMemory,
    Stored,
    memory_of_a_process,
    pinned_bytes,
)
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.train.batches import pack_batch

BLOCK = 2**24


class Side:
    """A stream that does nothing until another waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.queued: list[Callable[[], Any]] = []
        self.done = 0

    def wait_stream(self, other: Main) -> None:
        assert isinstance(other, Main)  # which is never behind

    def record_event(self) -> Event:
        return Event(self, len(self.queued))


class Event:
    def __init__(self, side: Side, number: int) -> None:
        self.side, self.number = side, number

    @property
    def reached(self) -> bool:
        return self.side.done >= self.number


class Main:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_event(self, event: Event) -> None:
        side = event.side
        while not event.reached:
            side.queued[side.done]()
            side.done += 1


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on CPU tensors; fresh memory holds NaN."""
    empty, copy = torch.empty, torch.Tensor.copy_

    def poisoned(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        new = empty(*shape, **options)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    @contextlib.contextmanager
    def inside(side: Side) -> Iterator[None]:
        def later(target: torch.Tensor, source: torch.Tensor, **options: Any) -> None:
            assert options == {"non_blocking": True}
            side.queued.append(lambda: copy(target, source))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", later)
            yield

    def given_up(stored: Stored, name: str, value: Any) -> None:
        if name == "device_copy" and value is None and vars(stored).get(name) is not None:
            assert stored.copied is None or stored.copied.reached, "memory that is still in use"  # type: ignore[attr-defined]
        object.__setattr__(stored, name, value)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.cuda, "Stream", Side)
    monkeypatch.setattr(torch.cuda, "current_stream", Main)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(Stored, "__setattr__", given_up)
    monkeypatch.setattr(HostMemory, "serves", lambda host, x: True)


def test_blocks_are_used_again(streams: None) -> None:
    blocks = Blocks()
    first = blocks.take(3 * BLOCK + 1)
    assert (len(first), blocks.pinned) == (4, 4)
    assert blocks.new_bytes(BLOCK) == 2 * BLOCK  # a quarter of the four besides
    second = blocks.take(BLOCK)
    assert (len(second), blocks.pinned) == (1, 6)
    assert blocks.new_bytes(BLOCK) == 0
    assert len({block.data_ptr() for block in first + second}) == 5
    blocks.give(first)
    assert blocks.new_bytes(5 * BLOCK) == 0
    assert len(blocks.take(5 * BLOCK)) == 5
    assert blocks.pinned == 6


@pytest.mark.parametrize("tensors", [1, 5, 21, 32])
@pytest.mark.parametrize("size", [1, 4 * 2**20, 344 * 2**20])
def test_no_more_is_pinned_than_planned(
    monkeypatch: pytest.MonkeyPatch, tensors: int, size: int
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.tensor(0))
    blocks = Blocks()
    for _ in range(tensors):
        blocks.take(size)
    most = pinned_bytes(tensors, size) // BLOCK
    needed = tensors * -(-size // BLOCK)
    assert needed <= blocks.pinned <= most == needed * 5 // 4


def test_reserved_memory_suffices(streams: None, monkeypatch: pytest.MonkeyPatch) -> None:
    size = BLOCK + 1
    host = HostMemory()
    host.reserve(3, size)
    assert host._blocks.pinned == 6
    for _ in range(3):
        host._blocks.take(size)
    assert host._blocks.pinned == 6
    monkeypatch.setattr(host_memory, "memory_of_a_process", lambda: 4 * 5 * BLOCK)
    limited = HostMemory()
    limited.reserve(3, size)
    assert limited._blocks.pinned == 5  # a quarter of what is free


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [0, 3, 4, 1, 2], []])
def test_tensors_come_back_in_any_order(streams: None, order: list[int]) -> None:
    host = HostMemory()
    tensors = [torch.randn(3000, 2048) for _ in range(5)]  # two blocks each
    expected = [x.clone() for x in tensors]
    stored = [host.put(x) for x in tensors]
    for x in tensors[:3]:
        x.fill_(7.0)  # their memory was given up
    assert [s.device_copy is not None for s in stored] == [False, False, False, True, True]
    for number in order:
        assert torch.equal(host.get(stored[number]), expected[number])
        if order[0] == 4 and number:
            assert stored[number - 1].device_copy is not None  # on its way
    free = host._blocks._free
    assert len(free) == host._blocks.pinned - 2 * (5 - len(order))
    tensors.clear()
    stored.clear()
    assert len(free) == host._blocks.pinned
    assert len({block.data_ptr() for block in free}) == len(free)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["selective", "offload"])
def test_steps_are_the_same_wherever_activations_wait(
    streams: None, monkeypatch: pytest.MonkeyPatch, checkpointing: str, dtype: torch.dtype
) -> None:
    """Gates of two layers in three, or all inputs; three steps with rows of different lengths."""
    widths = noted_widths(monkeypatch)
    steps = {}
    for way in ("none", checkpointing):
        model = adapted(tiny("llama", layers=6).to(dtype)).to(dtype)
        decoder = FusedDecoder.attach(model, way)
        steps[way] = [
            fused_step(model, texts(lengths, seed))
            for seed, lengths in enumerate(([9, 20, 33], [60, 2], [1, 5, 7, 11]))
        ]
    assert widths == ([256] * 4 if checkpointing == "selective" else [64] * 6) * 3
    for (loss, gradients), (expected, others) in zip(
        steps[checkpointing], steps["none"], strict=True
    ):
        assert loss == expected
        assert all(torch.equal(gradients[name], others[name]) for name in others)
    host = decoder.layers[0].host
    assert len(host._blocks._free) == host._blocks.pinned > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("checkpointing", ["selective", "offload"])
def test_graph_that_goes_without_a_backward_pass_gives_its_blocks_back(
    streams: None, checkpointing: str
) -> None:
    model = adapted(tiny("llama", layers=6))
    decoder = FusedDecoder.attach(model, checkpointing)
    output = model(**pack_batch(texts([9, 20])))
    blocks = decoder.layers[0].host._blocks  # type: ignore[union-attr]
    assert len(blocks._free) < blocks.pinned
    del output
    assert len(blocks._free) == blocks.pinned


def test_failed_copy_and_failed_prefetch_leave_memory_alone_until_it_is_done(
    streams: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HostMemory()
    expected = [torch.randn(3000, 2048) for _ in range(4)]
    stored = [host.put(x.clone()) for x in expected]
    new = torch.empty

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty", full)
    assert torch.equal(host.get(stored[2]), expected[2])  # not fetched meanwhile: the one below
    assert stored[1].device_copy is None
    monkeypatch.setattr(torch, "empty", new)
    assert torch.equal(host.get(stored[1]), expected[1])

    split = torch.split
    monkeypatch.setattr(torch, "split", lambda *_: [*split(*_), torch.zeros(1)])
    with pytest.raises(ValueError, match="zip"):
        host.put(torch.randn(3000, 2048))  # after its first block; dropped by `given_up`


def test_host_gives_a_quarter_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []

    def put(host: HostMemory, x: torch.Tensor) -> str:
        sizes.append(x.nbytes)
        return "stored"

    monkeypatch.setattr(HostMemory, "_put", put)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 16 * BLOCK)
    caplog.set_level("INFO")
    host = HostMemory()
    assert host.put_if_room(torch.zeros(4 * BLOCK, dtype=torch.uint8)) == "stored"
    assert not caplog.records
    for _ in range(2):
        assert host.put_if_room(torch.zeros(4 * BLOCK + 1, dtype=torch.uint8)) is None
    assert len(caplog.records) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory_of_a_process() == 8 * BLOCK
    assert HostMemory().put_if_room(torch.zeros(2 * BLOCK, dtype=torch.uint8)) == "stored"
    assert HostMemory().put_if_room(torch.zeros(2 * BLOCK + 1, dtype=torch.uint8)) is None
    assert sizes == [4 * BLOCK, 2 * BLOCK]


def test_system_that_pins_no_more_memory(streams: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*shape: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nand more")

    host, x = HostMemory(), torch.zeros(1)
    monkeypatch.setattr(torch, "empty", fails)
    with pytest.raises(NoPinnedMemory, match=r"^CUDA error: out of memory$"):
        host._put(x)
    assert host.put_if_room(x) is None
    with pytest.raises(TrainingError, match=r"than 0\.0 GiB \(CUDA error: out of memory\)"):
        host.put(x)


def test_other_cuda_errors_are_raised(streams: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(side: Side) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "stream", fails)
    for put in (HostMemory().put, HostMemory().put_if_room):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            put(torch.zeros(1))

"""Training in several processes, over gloo on the CPU.

The processes are forked from one that has imported everything, so a run takes a second.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.nn.parallel import DistributedDataParallel
from training_runs import Train, base, losses, on_ranks, read, steps, summary

from qlora_harness.fused.layer import FusedLayer
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.lora import attach_lora
from qlora_harness.train import heartbeat
from qlora_harness.train.batches import pack_batch
from qlora_harness.train.order import StepBatches, deal


def flags_for(model: Path, rows: Path) -> dict[str, Any]:
    return {
        "quant": "bf16", "model": model, "dataset": rows, "compute_dtype": "float32",
        "optimizer": "adamw_torch", "max_length": 96, "lora_r": 4, "lora_dropout": 0,
        "eval_fraction": 0.25, "learning_rate": 0.001, "batch_size": 2, "checkpointing": "none",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "kernels", "group_by_length"), [(4, "auto", False), (2, "none", True)]
)
def test_ranks_give_the_numbers_of_one(
    tiny_llama: Path, rows: Path, tmp_path: Path, train: Train, ranks: int, kernels: str,
    group_by_length: bool,
) -> None:  # fmt: skip
    """Each step of an epoch, also its last and shorter one, learns from the same examples."""
    common = flags_for(tiny_llama, rows) | {
        "eval_steps": 2, "max_steps": 5, "kernels": kernels, "group_by_length": group_by_length,
    }  # fmt: skip
    one, several = tmp_path / "one", tmp_path / "several"
    assert train(**common, grad_accum=4, output_dir=one) == 0
    on_ranks(ranks, common | {"grad_accum": 4 // ranks, "output_dir": several}, tmp_path)
    # Only the first process prints, and all are in the record.
    printed = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(ranks)]
    assert printed[0].count("adapter: ") == 1
    assert printed[1:] == [""] * (ranks - 1)
    result = summary(several)
    assert result["environment"]["world_size"] == ranks
    assert result["computation"]["fused_layers"] == (kernels == "auto")
    phases = sorted((phase["phase"], phase["rank"]) for phase in result["memory"]["phases"])
    names = ("evaluate", "evaluate_before", "evaluate_during", "load", "train")
    assert phases == [(name, rank) for name in names for rank in range(ranks)]

    assert losses(several) == pytest.approx(losses(one), rel=1e-6)
    own, expected = steps(several), steps(one)
    for name in ("tokens", "supervised_tokens"):
        assert [row[name] for row in own] == [row[name] for row in expected]
    norms = [row["grad_norm"] for row in expected]
    assert [row["grad_norm"] for row in own] == pytest.approx(norms, rel=1e-5)
    evaluated = [read(run / "training_logs.json")["evaluation"] for run in (several, one)]
    for points in zip(*(evaluation["during"] for evaluation in evaluated), strict=True):
        assert points[0]["nll"] == pytest.approx(points[1]["nll"], rel=1e-6)
    assert evaluated[0]["nll"] == pytest.approx(evaluated[1]["nll"], rel=1e-6)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (several, one)]
    for name, tensor in adapters[1].items():
        # Not by element: Adam makes a step of the rounding of a gradient near zero.
        assert float((adapters[0][name] - tensor).norm() / tensor.norm()) < 1e-6


def test_a_step_has_the_same_examples_on_any_number_of_ranks() -> None:
    lengths = [(7 * n) % 40 + 3 for n in range(52)]

    def by_step(ranks: int) -> list[list[int]]:
        passes = 8 // ranks
        batches = StepBatches(
            lengths, batch_size=2, passes=passes, processes=ranks, by_length=False, seed=1,
            epoch=lambda: 3,
        )  # fmt: skip
        listed = list(batches)
        assert len(batches) == len(listed)
        assert all(0 < len(batch) <= 2 for batch in listed)
        return [
            sorted(example for batch in listed[n : n + 8] for example in batch)
            for n in range(0, len(listed), 8)
        ]

    assert by_step(1) == by_step(2) == by_step(4)


def test_ranks_get_nearly_as_many_tokens() -> None:
    lengths = [512, 30, 40, 35, 200, 180, 20, 33, 300, 90, 60, 120]
    shares = deal(range(12), lengths, 2)
    tokens = [sum(lengths[example] for example in share) for share in shares]
    assert [len(share) for share in shares] == [6, 6]
    assert max(tokens) - min(tokens) <= 10
    # A rank without an example would not take part in the reduction.
    assert [len(share) for share in deal(range(3), lengths, 2)] == [2, 1]


def test_gradients_of_a_layer_are_reduced_before_the_layer_below(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach_lora(base(tiny_llama), r=4, alpha=4, dropout=0.0, targets="all-linear")
    decoder = FusedDecoder.attach(model, "selective")
    events: list[str] = []
    backward = FusedLayer.backward

    def noted(self: FusedLayer, *args: Any, **options: Any) -> Any:
        events.append("top" if self is decoder.layers[-1] else "below")
        return backward(self, *args, **options)

    def reduce(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses a string as type
        events.append("reduced")
        reduced = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0])

    monkeypatch.setattr(FusedLayer, "backward", noted)
    row = pack_batch([{"input_ids": [*range(20)], "labels": [*range(20)]}])
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, bucket_cap_mb=0.005)
        wrapped.register_comm_hook(None, reduce)
        for _ in range(2):  # DDP learns the order in the first
            events.clear()
            wrapped(**row).loss.backward()
            wrapped.zero_grad()
    finally:
        torch.distributed.destroy_process_group()
    assert events[:2] == ["top", "reduced"]
    assert events.index("below") < len(events) - 1


class SilentStore:
    """A store whose machine vanished, or whose process ended."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def set(self, key: str, value: str) -> None:
        pass

    def wait(self, keys: list[str]) -> None:
        pass

    def multi_get(self, keys: list[str]) -> list[bytes]:
        if self.error is not None:
            raise self.error
        time.sleep(0.6)
        return [b""] * len(keys)


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Queue[int]:
    """The statuses with which heartbeats, now quick, end the process."""
    statuses: Queue[int] = Queue()
    monkeypatch.setattr(heartbeat, "_EVERY", 0.02)
    monkeypatch.setattr(os, "_exit", statuses.put)
    return statuses


def test_a_process_that_leaves_in_order_is_not_missed(exits: Queue[int]) -> None:
    store = PrefixStore("run", torch.distributed.HashStore())
    store.set("beat_0", "begun")
    problems: Queue[str] = Queue()

    def begin(rank: int) -> heartbeat.Heartbeat:
        return heartbeat.Heartbeat(store, rank, 2, lambda error: problems.put(error.problem))

    second = begin(1)
    with begin(0):
        second.__exit__(None)
        time.sleep(0.5)  # longer than a process that stops is waited for
        assert exits.empty()
        with contextlib.suppress(ValueError), begin(1):
            raise ValueError
        assert exits.get(timeout=10) == 3
        assert "rank 1 of the 2 " in problems.get()


@pytest.mark.parametrize("error", [None, torch.distributed.DistNetworkError("reset")])
def test_a_lost_store_ends_the_process(error: Exception | None, exits: Queue[int]) -> None:
    store: Any = SilentStore(error)

    def fails(error: Exception) -> None:
        raise OSError("the folder of the run was on the lost machine")

    with heartbeat.Heartbeat(store, 1, 2, fails):
        assert exits.get(timeout=10) == 3


def test_faults_leave_a_run_that_resumes(
    tiny_llama: Path, rows: Path, tmp_path: Path, train: Train
) -> None:
    """In the middle of its second epoch, in one, two or four processes."""
    common = flags_for(tiny_llama, rows) | {"max_steps": 8, "save_steps": 2, "batch_size": 1}
    two = common | {"grad_accum": 2}
    flags = two | {"output_dir": tmp_path / "faulty"}
    began = time.monotonic()
    with pytest.raises(ChildFailedError):
        on_ranks(2, flags, tmp_path, fault="out of memory")
    assert time.monotonic() - began < 60
    texts = [(tmp_path / f"errors{rank}.txt").read_text() for rank in (0, 1)]
    first, second = ([s for s in text.splitlines() if "error:" in s] for text in texts)
    assert len(second) == 1
    assert "ran out of memory" in second[0]
    assert len(first) <= 1  # unless it got the signal first
    assert "Traceback" not in "".join(texts)
    record = summary(tmp_path / "faulty")
    assert record["status"] in ("failed", "interrupted")
    # Stopped, while the other one waits for it in a collective.
    (tmp_path / "errors0.txt").unlink()
    with pytest.raises(ChildFailedError) as ended:
        on_ranks(2, flags, tmp_path, fault="stop")
    assert ended.value.get_first_failure()[1].exitcode == 3
    lines = (tmp_path / "errors0.txt").read_text().splitlines()
    assert ["rank 1 of the 2 " in line for line in lines if "error:" in line] == [True]
    record = summary(tmp_path / "faulty")
    assert (record["status"], record["failure"]["problem"][:6]) == ("failed", "rank 1")
    for name in ("one", "four"):
        shutil.copytree(tmp_path / "faulty", tmp_path / name)
    # Killed without a word; torchrun --max-restarts 1 resumes from the checkpoint.
    on_ranks(2, flags, tmp_path, fault="kill", restarts=1)
    record = summary(tmp_path / "faulty")
    assert (record["status"], record["runtime"]["resumed"]) == ("completed", True)
    assert train(**common, grad_accum=4, output_dir=tmp_path / "one") == 0
    on_ranks(4, common | {"grad_accum": 1, "output_dir": tmp_path / "four"}, tmp_path)
    on_ranks(2, two | {"output_dir": tmp_path / "whole"}, tmp_path)
    assert losses(tmp_path / "faulty") == losses(tmp_path / "whole")
    assert 1 < steps(tmp_path / "whole")[3]["epoch"] < 2  # of the checkpoint
    for name in ("one", "four"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
        for key in ("tokens", "supervised_tokens"):
            own, expected = (steps(tmp_path / run) for run in (name, "whole"))
            assert [row[key] for row in own] == [row[key] for row in expected]

"""Training in several processes, over gloo on the CPU.

The processes are forked from one that has imported everything, so a run takes a second.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny_rows
from safetensors.torch import load_file
from training_runs import evaluations, losses, on_ranks, steps, summary

from qlora_harness.train.order import StepBatches, deal


@pytest.mark.parametrize(("kernels", "group_by_length"), [("auto", False), ("none", True)])
def test_ranks_give_the_numbers_of_one(
    tiny_llama: Path,
    tmp_path: Path,
    kernels: str,
    group_by_length: bool,
) -> None:
    """Each step of an epoch, also its last and shorter one, learns from the same examples."""
    rows = tiny_rows(tmp_path / "rows.jsonl")
    common = {
        "quant": "bf16", "model": tiny_llama, "dataset": rows, "compute_dtype": "float32",
        "optimizer": "adamw_torch", "max_length": 96, "lora_r": 4, "lora_dropout": 0,
        "eval_fraction": 0.25, "eval_steps": 2, "learning_rate": 0.001, "batch_size": 2,
        "max_steps": 5, "checkpointing": "none", "kernels": kernels,
        "group_by_length": group_by_length,
    }  # fmt: skip
    folders = {}
    for ranks in (1, 2, 4):
        folders[ranks] = folder = tmp_path / str(ranks)
        flags = common | {"grad_accum": 4 // ranks, "output_dir": folder}
        assert on_ranks(ranks, flags, tmp_path) == [0] * ranks
    assert (tmp_path / "rank0.txt").read_text().count("adapter: ") == len(folders)
    assert all((tmp_path / f"rank{rank}.txt").read_text() == "" for rank in (1, 2, 3))
    one = folders.pop(1)
    weights = load_file(one / "adapter" / "adapter_model.safetensors")
    for ranks, folder in folders.items():
        assert losses(folder) == pytest.approx(losses(one), rel=1e-6)
        for name in ("tokens", "supervised_tokens"):
            assert [row[name] for row in steps(folder)] == [row[name] for row in steps(one)]
        norms = [row["grad_norm"] for row in steps(one)]
        assert [row["grad_norm"] for row in steps(folder)] == pytest.approx(norms, rel=1e-5)
        # All processes are in the record.
        result = summary(folder)
        assert result["computation"]["fused_layers"] == (kernels == "auto")
        phases = sorted((phase["phase"], phase["rank"]) for phase in result["memory"]["phases"])
        names = ("evaluate", "evaluate_before", "evaluate_during", "load", "train")
        assert phases == [(name, rank) for name in names for rank in range(ranks)]
        during, expected = (evaluations(run)["during"] for run in (folder, one))
        assert [point["step"] for point in during] == [2, 4]
        for point, other in zip(during, expected, strict=True):
            assert point["nll"] == pytest.approx(other["nll"], rel=1e-6)
        assert result["environment"]["world_size"] == ranks
        assert result["results"]["eval_loss"] == pytest.approx(
            summary(one)["results"]["eval_loss"], rel=1e-6
        )
        for name, tensor in load_file(folder / "adapter" / "adapter_model.safetensors").items():
            # Not by element: Adam makes a step of the rounding of a gradient near zero.
            assert float((tensor - weights[name]).norm() / weights[name].norm()) < 1e-6


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

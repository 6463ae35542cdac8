"""The training benchmark as a command: its ways learn alike, and the JSON holds what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_runs import launch

from qlora_harness.benchmark.record import TrainingBenchmark, TrainingMeasurement
from qlora_harness.benchmark.training import WAYS, changed_settings
from qlora_harness.cli import main


def test_ways_learn_alike_from_the_same_batches(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "benchmark.json"
    words = ["benchmark-training", "--model", str(tiny_llama), "--compute-dtype", "float32"]
    words += ["--dataset", "demo", "--max-length", "64", "--batch-size", "3", "--lora-r", "4"]
    words += ["--steps", "2", "--warm-up", "1", "--json", str(output)]
    assert main([*words, "--ways", "peft-full,fused-none,fused-full"]) == 0
    record = json.loads(output.read_text())
    for quant in ("nf4", "bf16"):
        rows = [m for m in record["measurements"] if m["quant"] == quant]
        assert len(rows) == 3
        for measured in rows:
            assert measured["losses"] == pytest.approx(rows[0]["losses"], abs=1e-4)
            assert len(measured["losses"]) == 3
            assert measured["tokens"] == rows[0]["tokens"]
            assert measured["steps"] == 2
            ratio = measured["tokens_per_second"] / rows[0]["tokens_per_second"]
            assert measured["ratio"] == pytest.approx(ratio)
    assert capsys.readouterr().out.count("| fused-none | nf4 |") == 2  # as it comes, and at the end


def test_every_base_is_spread_over_two_processes(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    words = ["benchmark-training", "--model", str(tiny_llama), "--compute-dtype", "float32"]
    words += ["--dataset", "demo", "--max-length", "64", "--batch-size", "1", "--lora-r", "4"]
    words += ["--steps", "1", "--warm-up", "0", "--json", str(output), "--ways", "fused-full"]
    launch(2, main, [*words, "--engine", "fsdp2"])
    record = json.loads(output.read_text())
    assert (record["processes"], record["engine"]) == (2, "fsdp2")  # also after the last one
    assert [(m["quant"], m["failure"]) for m in record["measurements"]] == [
        ("nf4", None), ("bf16", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["--quant", "nf4,foo"], ["--quant: 'foo'", "nf4, fp4, int8, hqq, bf16"]),
        (["--ways", "fused-none,fused-none@0"], ["--ways: 'fused-none@0'", ", ".join(WAYS)]),
        (["--ways", "fused-none@x"], ["--ways: 'fused-none@x'"]),
        (["--ways", "fused-none,fused-none-fp8"], ["--ways: -fp8", "no CUDA device"]),
        (["--ways", "fused-none-fp8s"], ["--ways: 'fused-none-fp8s'"]),
        (["--ways", "trl-pad-fp8"], ["--ways: 'trl-pad-fp8'"]),
        (["--ways", "peft-none-fp8"], ["--compute fp8 with --kernels none"]),
        (["--lora-r", "0"], ["--lora-r: 0", "at least 1"]),
        (["--steps", "0"], ["--steps: 0", "at least 1"]),
        (["--warm-up", "-1"], ["--warm-up: -1", "at least 0"]),
        (["--peer-timeout", "0"], ["--peer-timeout: 0", "above 0"]),
        (["--peer-timeout", "nan"], ["--peer-timeout: nan", "above 0"]),
        (["--json", "/"], ["--json / is a folder"]),
    ],
)
def test_errors_come_before_the_model_is_looked_for(
    capsys: pytest.CaptureFixture[str], words: list[str], facts: list[str]
) -> None:
    assert main(["benchmark-training", "--model", "no/such/model", *words]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for fact in facts:
        assert fact in message


def test_batch_size_of_a_way_wins() -> None:
    own = changed_settings("fused-none@8", {"batch_size": 4, "lora_r": 2})
    assert (own["batch_size"], own["lora_r"], own["checkpointing"]) == (8, 2, "none")
    assert changed_settings("fused-none", {"batch_size": 4})["batch_size"] == 4
    assert changed_settings("fused-none-fp8@8", {"lora_r": 2}) == own | {"compute": "fp8"}


def test_table() -> None:
    measured = TrainingMeasurement(
        way="fused-none", quant="nf4", changes={}, steps=4, tokens=20_080, seconds=2.0,
        tokens_per_second=10_040.0, median_tokens_per_second=10_100.4,
        peak_allocated_bytes=3 * 2**29, peak_reserved_bytes=2**31, losses=[9.5, 9.43219],
        ratio=1.0,
    )  # fmt: skip
    peer = measured.model_copy(
        update={
            "way": "trl-pad", "peak_allocated_bytes": None, "peak_reserved_bytes": None,
            "ratio": None, "versions": {"trl": "1.16.0", "torch": "2.11.0"},
        }
    )  # fmt: skip
    failed = TrainingMeasurement(way="peft-none", quant="bf16", changes={}, failure="out of memory")
    record = TrainingBenchmark(
        title="a model, CPU", measurements=[measured, peer, failed], environment={}
    )
    lines = record.table().split("\n")
    assert lines[4:] == [
        "| fused-none | nf4 | 5,020 | 10,040 | 10,100 | 1.00 | 1.50 | 2.00 | 9.4322 |",
        "| trl-pad | nf4 | 5,020 | 10,040 | 10,100 | – | – | – | 9.4322 |",
        "| peft-none | bf16 | out of memory | | | | | | |",
        "",
        "trl: trl 1.16.0, torch 2.11.0",
    ]
    assert {line.count("|") for line in lines[2:7]} == {10}

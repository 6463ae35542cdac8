"""The tables of both benchmarks, to the letter: numbers, what is not known, and what failed."""

from __future__ import annotations

from qlora_harness.score import benchmark_table as scoring
from qlora_harness.train import benchmark_table as training


def test_table_of_training_steps() -> None:
    measured = training.StepMeasurement(
        "fused-none",
        "nf4",
        {},
        steps=4,
        tokens=20_080,
        seconds=2.0,
        tokens_per_second=10_040.0,
        median_tokens_per_second=10_100.4,
        peak_allocated_bytes=3 * 2**29,
        peak_reserved_bytes=2**31,
        losses=[9.5, 9.43219],
        ratio=1.0,
    )
    versions = {"trl": "1.16.0", "torch": "2.11.0"}
    peer = training.StepMeasurement(
        "trl-pad", "nf4", {}, 1, 900, 1.0, 900.0, 900.0, losses=[9.0], versions=versions
    )
    failed = training.StepMeasurement("peft-none", "bf16", {}, failure="out of memory")
    lines = training.report([measured, peer, failed], "a model, CPU").split("\n")
    assert lines[:2] == ["a model, CPU", ""]
    assert lines[3] == "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    assert lines[4:] == [
        "| fused-none | nf4 | 5,020 | 10,040 | 10,100 | 1.00 | 1.50 | 2.00 | 9.4322 |",
        "| trl-pad | nf4 | 900 | 900 | 900 | – | – | – | 9.0000 |",
        "| peft-none | bf16 | out of memory | | | | | | |",
        "",
        "trl: trl 1.16.0, torch 2.11.0",
    ]
    assert {line.count("|") for line in lines[2:7]} == {10}
    assert training.row(failed) == lines[6]


def test_table_of_scoring() -> None:
    baseline = scoring.Measurement("hf", 400, 6.24, 11.5, 312_627, 312_627, 2**30, 3)
    packed = scoring.Measurement(
        "packed",
        14_042,
        3.6,
        43.9,
        10_882_111,
        1_603_466,
        None,
        1789,
        ratio=13.04,
        scoring_ratio=9.1,
        largest_difference=0.287,
        same_predictions=0.96,
        untied_predictions=0.9982,
        accuracy_difference=-0.0004,
        float32_difference=0.0312,
        float32_predictions=0.923,
    )
    lines = scoring.report([baseline, packed], "a model, CPU").split("\n")
    assert lines[:2] == ["a model, CPU", ""]
    assert lines[4:] == [
        "| hf | 400 | 6.2 | 11.5 | 312,627 | 312,627 | 1.00 | 1.00 | 1.00 | – | – | – | – | 3 | "
        "– | – |",
        "| packed | 14,042 | 3.6 | 43.9 | 10,882,111 | 1,603,466 | 13.04 | 9.10 | – | 0.29 | "
        "96.00% | 99.82% | -0.04 points | 1,789 | 0.031 | 92.30% |",
    ]
    assert {line.count("|") for line in lines[2:]} == {17}

"""The scoring benchmark as a command: its ways agree, and its table shows what the JSON holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import launch

from qlora_harness.benchmark.record import ScoringBenchmark, ScoringMeasurement
from qlora_harness.cli import main
from qlora_harness.fused import fp8
from qlora_harness.score.mmlu_files import DEMO_FILE, known_files


def run(model: Path, folder: Path, *words: str) -> None:
    """Runs a benchmark of two demo questions per subject."""
    command = ["benchmark-scoring", "--model", str(model), "--file", DEMO_FILE, "--rows", "2"]
    output = ["--json", str(folder / "benchmark.json")]
    assert main([*command, "--batch-size", "4", *output, *words]) == 0


def record_of(model: Path, folder: Path, *words: str) -> dict[str, Any]:
    run(model, folder, *words)
    record: dict[str, Any] = json.loads((folder / "benchmark.json").read_text())
    return record


def test_benchmark_scores_both_ways_alike(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dtype", "float32", "--margin-batch-size", "1", "--adapter-rank", "4"]
    record = record_of(tiny_llama, tmp_path, *words)
    baseline, other, packed, adapted = record["measurements"]
    assert [m["name"] for m in record["measurements"]] == [
        "lm-eval hf, batch size 4",
        "lm-eval hf, batch size 1",
        "packed",
        "packed, unmerged adapter of rank 4",
    ]
    assert baseline["largest_difference"] is None
    for measured in (other, packed):
        assert measured["largest_difference"] < 1e-4
        assert measured["same_predictions"] == measured["untied_predictions"] == 1.0
        assert measured["float32_difference"] is None
        assert measured["accuracy_difference"] == 0.0
    assert packed["prompt_tokens"] == baseline["prompt_tokens"]
    assert packed["computed_tokens"] < packed["prompt_tokens"]
    seconds = [m["encoding_seconds"] + m["scoring_seconds"] for m in record["measurements"]]
    assert packed["ratio"] == pytest.approx(seconds[0] / seconds[2])
    assert adapted["ratio"] == pytest.approx(seconds[0] / seconds[3])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == record["title"]
    (row,) = (line for line in printed if line.startswith("| packed |"))
    assert row.split("|")[2].strip() == str(packed["questions"])
    assert f"{packed['computed_tokens']:,}" in row


@pytest.mark.parametrize("from_file", [False, True])
def test_generation_has_the_texts_of_hf(tiny_llama: Path, tmp_path: Path, from_file: bool) -> None:
    words = ["--generate", "6", "--max-new-tokens", "5", "--baseline-questions", "4"]
    if from_file:
        row = json.dumps({"question": "How many?", "answer": "Two.\n#### 2"})
        (tmp_path / "test.jsonl").write_text("\n".join([row] * 6))
        words += ["--gsm8k", str(tmp_path / "test.jsonl"), "--own-examples"]
    record = record_of(tiny_llama, tmp_path, *words, "--dtype", "float32", "--adapter-rank", "4")
    assert ("synthetic" in record["title"]) != from_file
    assert ("own examples" in record["title"]) == from_file
    assert [m["questions"] for m in record["measurements"]] == [4, 6, 6]
    assert [m["same_texts"] for m in record["measurements"]] == [None, 1.0, 1.0]
    baseline, first, _ = record["measurements"]
    assert first["ratio"] == pytest.approx(baseline["seconds"] / 4 * 6 / first["seconds"])


def _of_two_processes(model: Path, folder: Path) -> None:
    run(model, folder, "--engine", "fsdp2", "--quant", "nf4", "--adapter-rank", "4")


def test_a_base_spread_over_two_processes_is_timed_without_hf(
    tiny_llama: Path, tmp_path: Path
) -> None:
    launch(2, _of_two_processes, tiny_llama, tmp_path)
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert (record["processes"], record["engine"]) == (2, "fsdp2")
    assert "2 × CPU" in record["title"]
    packed, adapted = record["measurements"]
    assert [packed["name"], adapted["name"]] == ["packed", "packed, unmerged adapter of rank 4"]
    _, one = record_of(tiny_llama, tmp_path, "--quant", "nf4")["measurements"]
    for name in ("questions", "prompt_tokens", "computed_tokens", "ties"):
        assert packed[name] == one[name]
    assert (packed["ratio"], packed["largest_difference"]) == (1.0, None)
    assert adapted["ratio"] > 0


def test_baseline_on_a_sample_is_scaled(tiny_llama: Path, tmp_path: Path) -> None:
    words = ["--dtype", "float32", "--baseline-questions", "3"]
    baseline, packed = record_of(tiny_llama, tmp_path, *words)["measurements"]
    assert baseline["questions"] == 3
    scale = packed["prompt_tokens"] / baseline["prompt_tokens"]
    assert packed["scoring_ratio"] == pytest.approx(
        baseline["scoring_seconds"] * scale / packed["scoring_seconds"]
    )


def test_each_way_is_compared_with_float32(tiny_llama: Path, tmp_path: Path) -> None:
    words = ["--dtype", "bfloat16", "--float32-reference"]
    baseline, exact, packed = record_of(tiny_llama, tmp_path, *words)["measurements"]
    assert exact["name"] == "packed, weights in float32"
    assert exact["float32_difference"] == 0.0
    assert exact["float32_predictions"] == 1.0
    # The weights are the same, so only the rounding of the computation differs.
    for measured in (baseline, packed):
        assert 0.0 < measured["float32_difference"] < 0.01
        assert 0.5 < measured["float32_predictions"] <= 1.0
    assert exact["largest_difference"] > 0.0  # from hf in bfloat16


def test_fp8_is_measured_beside_bf16(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "why_unavailable", lambda device: None)
    words = ["--dtype", "bfloat16", "--quant", "nf4", "--fp8", "--adapter-rank", "4"]
    measured = record_of(tiny_llama, tmp_path, *words)["measurements"]
    assert [m["name"] for m in measured[1:]] == [
        "packed",
        "packed, compute=fp8",
        "packed, unmerged adapter of rank 4",
    ]
    exact, rounded = (m["largest_difference"] for m in measured[1:3])
    assert exact < rounded < 1


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["--rows", "0"], ["--rows: 0", "at least 1"]),
        (["--batch-size", "0"], ["--batch-size: 0", "at least 1"]),
        (["--margin-batch-size", "0"], ["--margin-batch-size: 0", "at least 1"]),
        (["--pack-tokens", "-1"], ["--pack-tokens: -1", "at least 1"]),
        (["--baseline-questions", "0"], ["--baseline-questions: 0", "at least 1"]),
        (["--adapter-rank", "0"], ["--adapter-rank: 0", "at least 1"]),
        (["--json", "/"], ["--json / is a folder"]),
        (["--quant", "nf4", "--float32-reference"], ["--float32-reference with --quant nf4"]),
        (
            ["--engine", "fsdp2", "--margin-batch-size", "1"],
            ["--engine fsdp2", "--margin-batch-size"],
        ),
        (["--engine", "fsdp2", "--generate", "1"], ["--engine fsdp2", "--generate"]),
        (["--fp8", "--dtype", "bfloat16"], ["compute=fp8", "no CUDA device"]),
        (["--fp8", "--kernels", "none"], ["compute=fp8 with kernels=none"]),
        (["--file", "nosuch"], ["--file: 'nosuch'", *known_files()]),
        (["--subjects", "nutritoin"], ["--subjects: ", DEMO_FILE, "'nutritoin'", "'nutrition'"]),
        (["--subjects", "nutrition,xyz"], ["--subjects: ", "'xyz'", "It has ", "nutrition"]),
        (["--mmlu-dir", "/no/such"], ["--mmlu-dir: folder /no/such does not exist"]),
    ],
)
def test_errors_come_before_the_model_is_looked_for(
    capsys: pytest.CaptureFixture[str], words: list[str], facts: list[str]
) -> None:
    common = ["benchmark-scoring", "--model", "no/such/model"]
    common += [] if "--mmlu-dir" in words else ["--file", DEMO_FILE]
    assert main([*common, *words]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for fact in facts:
        assert fact in message


def test_table() -> None:
    baseline = ScoringMeasurement(
        name="hf", questions=400, encoding_seconds=6.24, scoring_seconds=11.5,
        prompt_tokens=312_627, computed_tokens=312_627, peak_allocated_bytes=2**30, ties=3,
    )  # fmt: skip
    packed = ScoringMeasurement(
        name="packed", questions=14_042, encoding_seconds=3.6, scoring_seconds=43.9,
        prompt_tokens=10_882_111, computed_tokens=1_603_466, peak_allocated_bytes=None, ties=1789,
        ratio=13.04, scoring_ratio=9.1, largest_difference=0.287, same_predictions=0.96,
        untied_predictions=0.9982, accuracy_difference=-0.0004, float32_difference=0.0312,
        float32_predictions=0.923,
    )  # fmt: skip
    record = ScoringBenchmark(title="a model", measurements=[baseline, packed], environment={})
    lines = record.table().split("\n")
    assert lines[4:] == [
        "| hf | 400 | 6.2 | 11.5 | 312,627 | 312,627 | 1.00 | 1.00 | 1.00 | – | – | – | – | 3 | "
        "– | – |",
        "| packed | 14,042 | 3.6 | 43.9 | 10,882,111 | 1,603,466 | 13.04 | 9.10 | – | 0.29 | "
        "96.00% | 99.82% | -0.04 points | 1,789 | 0.031 | 92.30% |",
    ]
    assert {line.count("|") for line in lines[2:]} == {17}

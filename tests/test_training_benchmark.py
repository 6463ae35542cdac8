"""The training benchmark as a command: all ways learn alike, and the JSON says what was printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_harness.cli import main
from qlora_harness.train.benchmark import WAYS, _changes


def test_ways_learn_alike_from_the_same_batches(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "benchmark.json"
    words = ["benchmark-training", "--model", str(tiny_llama), "--compute-dtype", "float32"]
    words += ["--dataset", "demo", "--max-length", "64", "--batch-size", "3", "--lora-r", "4"]
    words += ["--steps", "2", "--warm-up", "1", "--json", str(output)]
    assert main([*words, "--ways", "peft-full,peft-none,fused-none,fused-full,fused-offload"]) == 0
    record = json.loads(output.read_text())
    for quant in ("nf4", "bf16"):
        found = [m for m in record["measurements"] if m["quant"] == quant]
        assert len(found) == 5
        for measured in found:
            assert measured["losses"] == pytest.approx(found[0]["losses"], abs=1e-4)
            assert len(measured["losses"]) == 3
            assert measured["tokens"] == found[0]["tokens"]
            assert measured["steps"] == 2
            ratio = measured["tokens_per_second"] / found[0]["tokens_per_second"]
            assert measured["ratio"] == pytest.approx(ratio)
    assert capsys.readouterr().out.count("| fused-none | nf4 |") == 2  # as it comes, and at the end


def test_unknown_way_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark-training", "--model", "m", "--ways", "fused-none@x"]) == 2
    assert "--ways: 'fused-none@x' is not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--quant", "nf4,foo"],
            "--quant: 'foo' is not one of nf4, fp4, bf16. Choose one of these.",
        ),
        (
            ["--ways", "fused-none,fused-none@0"],
            f"--ways: 'fused-none@0' is not known. Known are {', '.join(WAYS)}, each with @N for a "
            "batch size of N.",
        ),
        (["--lora-r", "0"], "--lora-r: 0 is out of range. It must be at least 1."),
        (["--steps", "0"], "--steps: 0 is out of range. It must be at least 1."),
        (["--steps", "-3"], "--steps: -3 is out of range. It must be at least 1."),
        (["--warm-up", "-1"], "--warm-up: -1 is out of range. It must be at least 0."),
        (["--peer-timeout", "0"], "--peer-timeout: 0 is out of range. It must be above 0."),
        (["--peer-timeout", "-1"], "--peer-timeout: -1 is out of range. It must be above 0."),
        (["--peer-timeout", "nan"], "--peer-timeout: nan is out of range. It must be above 0."),
        (["--json", "/"], "--json / is a folder. Name a file."),
    ],
)
def test_what_is_wrong_with_any_way_is_said_before_the_model_is_looked_for(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["benchmark-training", "--model", "no/such/model", *words]) == 2
    assert capsys.readouterr().err == f"qlora-harness: error: {said}\n"


def test_batch_size_of_a_way_goes_before_that_of_all() -> None:
    own = _changes("fused-none@8", {"batch_size": 4, "lora_r": 2})
    assert (own["batch_size"], own["lora_r"], own["checkpointing"]) == (8, 2, "none")
    assert _changes("fused-none", {"batch_size": 4})["batch_size"] == 4

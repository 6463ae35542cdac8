"""The scoring benchmark as a command: both ways agree, and the table says what the JSON says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_harness.cli import main


def test_benchmark_scores_both_ways_alike(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "benchmark.json"
    words = ["benchmark-scoring", "--model", str(tiny_llama), "--dtype", "float32"]
    words += ["--file", "five_shot_mmlu_demo.json", "--rows", "2", "--batch-size", "4"]
    words += ["--margin-batch-size", "1", "--adapter-rank", "4", "--json", str(output)]
    assert main(words) == 0
    record = json.loads(output.read_text())
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


def test_baseline_on_a_sample_is_scaled(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    words = ["benchmark-scoring", "--model", str(tiny_llama), "--dtype", "float32"]
    words += ["--file", "five_shot_mmlu_demo.json", "--rows", "2", "--batch-size", "4"]
    assert main([*words, "--baseline-questions", "3", "--json", str(output)]) == 0
    baseline, packed = json.loads(output.read_text())["measurements"]
    assert baseline["questions"] == 3
    scale = packed["prompt_tokens"] / baseline["prompt_tokens"]
    assert packed["scoring_ratio"] == pytest.approx(
        baseline["scoring_seconds"] * scale / packed["scoring_seconds"]
    )


def test_each_way_is_compared_with_float32(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "benchmark.json"
    words = ["benchmark-scoring", "--model", str(tiny_llama), "--dtype", "bfloat16"]
    words += ["--file", "five_shot_mmlu_demo.json", "--rows", "2", "--batch-size", "4"]
    assert main([*words, "--float32-reference", "--json", str(output)]) == 0
    baseline, exact, packed = json.loads(output.read_text())["measurements"]
    assert exact["name"] == "packed, weights in float32"
    assert exact["float32_difference"] == 0.0 and exact["float32_predictions"] == 1.0
    # The weights are the same, so that only the rounding of the computation is left.
    for measured in (baseline, packed):
        assert 0.0 < measured["float32_difference"] < 0.01
        assert 0.5 < measured["float32_predictions"] <= 1.0
    assert exact["largest_difference"] > 0.0  # from hf in bfloat16
    assert "letter of float32" in capsys.readouterr().out


def test_float32_reference_of_4_bit_weights_is_refused(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["benchmark-scoring", "--model", str(tiny_llama), "--quant", "nf4"]
    assert main([*words, "--float32-reference"]) == 2
    assert "--float32-reference with --quant nf4" in capsys.readouterr().err


FILES = (
    "five_shot_mmlu_test.json, five_shot_mmlu_val.json, zero_shot_mmlu_test.json, "
    "zero_shot_mmlu_val.json, five_shot_mmlu_demo.json"
)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "0"], "--rows: 0 is out of range. It must be at least 1."),
        (["--rows", "-1"], "--rows: -1 is out of range. It must be at least 1."),
        (["--batch-size", "0"], "--batch-size: 0 is out of range. It must be at least 1."),
        (
            ["--margin-batch-size", "0"],
            "--margin-batch-size: 0 is out of range. It must be at least 1.",
        ),
        (["--pack-tokens", "0"], "--pack-tokens: 0 is out of range. It must be at least 1."),
        (
            ["--baseline-questions", "0"],
            "--baseline-questions: 0 is out of range. It must be at least 1.",
        ),
        (["--adapter-rank", "0"], "--adapter-rank: 0 is out of range. It must be at least 1."),
        (["--json", "/"], "--json / is a folder. Name a file."),
        (["--file", "nosuch"], f"--file: 'nosuch' is not one of {FILES}. Choose one of these."),
        (
            ["--subjects", "nutritoin"],
            "--subjects: five_shot_mmlu_demo.json has no subject 'nutritoin'. The nearest is "
            "'nutrition'.",
        ),
        (
            ["--subjects", "nutrition,xyz"],
            "--subjects: five_shot_mmlu_demo.json has no subject 'xyz'. It has SUBJECTS.",
        ),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_looked_for(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions

    subjects = sorted({question.subject for question in load_questions(DEMO_FILE)})
    said = said.replace("SUBJECTS", ", ".join(subjects))
    common = ["benchmark-scoring", "--model", "no/such/model", "--file", DEMO_FILE]
    assert main([*common, *words]) == 2
    assert capsys.readouterr().err == f"qlora-harness: error: {said}\n"


def test_missing_folder_of_files_is_told_by_the_flag(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["benchmark-scoring", "--model", str(tiny_llama), "--mmlu-dir", "/no/such/folder"]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "qlora-harness: error: --mmlu-dir: folder /no/such/folder does not exist. Name the folder "
        "of the files.\n"
    )

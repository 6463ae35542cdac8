"""What a comparison says in words: the sentence of each run, and the notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare_runs import (
    FAMILY,
    FIRST,
    changed,
    edit,
    evaluation,
    summary,
    table,
    write_harness,
    write_run,
)

from qlora_harness.compare.comparison import compare


def test_equivalence_is_said_for_the_margin_asked(pair: tuple[Path, Path]) -> None:
    assert "is not shown to be within ±1 points" in compare(pair).verdict[0]
    wide = compare(pair, margin=0.4).verdict[0]
    assert "no difference is shown (McNemar p = 0.73), and it is shown to be within ±40" in wide


def test_verdict_says_that_no_difference_is_shown(pair: tuple[Path, Path]) -> None:
    assert compare(pair).verdict == (
        "16bit, against 4bit, uses 8.00 GiB more peak GPU memory (2.23×), takes 0.80× the "
        "training time, changes the evaluation loss by 0.0000 (no error bar), and differs on "
        "mmlu_qlora_5shot by −10.00 points (too few changed answers for an interval, paired): no "
        "difference is shown (McNemar p = 0.73), but it is not shown to be within ±1 points (two "
        "one-sided tests at 5%, p = 0.74).",
    )


def test_verdict_says_that_a_difference_is_shown(pair: tuple[Path, Path]) -> None:
    worse = {"anatomy": "0" * 10, "law": "0" * 10}
    write_run(pair[1], None, evaluation(worse))
    write_harness(pair[1], worse)
    text = compare(pair).verdict[0]
    assert "by −60.00 points (95% interval −80.00 to −40.00, paired): a difference is shown" in text
    assert text.endswith(
        "but it is not shown to be within ±1 points (two one-sided tests at 5%, p = 1.00)."
    )


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"status": "interrupted"}, "4bit: the training was interrupted"),
        ({"runtime__resumed": True}, "4bit: the training was resumed from a checkpoint"),
        ({"model__random_weights": True}, "4bit: random weights: accuracy and loss say nothing."),
        ({"memory__device_type": "cpu"}, "4bit: trained on the CPU: not a GPU measurement."),
        (
            {"data__dataset": "demo"},
            "The data: the embedded demo set: small, made for this project, not a benchmark.",
        ),
        ({"environment__device": {"name": "A100"}}, "Trained on different devices"),
    ],
)
def test_notes(pair: tuple[Path, Path], changes: dict[str, Any], note: str) -> None:
    write_run(pair[0], summary(**changes))
    assert any(found.startswith(note) for found in compare(pair).notes)


def test_a_clean_comparison_has_no_notes(pair: tuple[Path, Path]) -> None:
    assert compare(pair).notes == ()


def test_notes_of_the_evaluation(pair: tuple[Path, Path]) -> None:
    changed(pair[0] / "evaluation_results.json", edit(f"tasks/{FAMILY}/truncated", 2))
    changed(next(pair[1].rglob("results_*.json")), edit("config/use_cache", "/tmp/cache"))
    notes = compare(pair).notes
    assert "4bit: 2 prompts were truncated to fit the model." in notes
    assert any(note.startswith("16bit: scored with --use_cache") for note in notes)


def test_the_demo_is_called_a_demo_everywhere(tmp_path: Path) -> None:
    family = "mmlu_qlora_demo"
    runs = [
        write_run(
            tmp_path / quant, summary(quant, data__dataset="demo"), evaluation(FIRST, [family])
        )
        for quant in ("nf4", "bf16")
    ]
    comparison = compare(runs)
    assert "not a benchmark" in table(comparison, "mmlu").title
    assert any(note.startswith("The data and questions: the embedded") for note in comparison.notes)
    assert "(demo questions, not a benchmark)" in comparison.verdict[0]


def test_random_weights_are_not_judged(pair: tuple[Path, Path]) -> None:
    write_run(pair[0], summary(model__random_weights=True))
    assert compare(pair).verdict[0].endswith(", paired): random weights, so it says nothing.")


def test_random_weights_of_a_scored_base_are_not_judged(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, None, evaluation(FIRST)) for name in "ab"]
    changed(runs[1] / "evaluation_results.json", edit("model/random_weights", True))
    comparison = compare(runs)
    assert "b: random weights: accuracy and loss say nothing." in comparison.notes
    assert comparison.verdict[0].endswith("(unpaired): random weights, so it says nothing.")
    assert comparison.runs[1].quant == "nf4"


def test_a_resumed_time_is_not_in_the_verdict(pair: tuple[Path, Path]) -> None:
    write_run(pair[0], summary(runtime__resumed=True))
    assert "training time" not in compare(pair).verdict[0]

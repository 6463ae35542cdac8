"""Losses on the same data: differences, intervals over conversations, and what is not compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_runs import cells, changed, edit, table, texts, write

from qlora_harness.compare.comparison import compare
from qlora_harness.compare.losses import bootstrap
from qlora_harness.errors import ResultsError

TOKENS = [10, 20, 5, 40, 25] * 4
LOSSES = [1.0, 1.2, 0.8, 1.1, 0.9] * 4

MEAN = sum(loss * n for loss, n in zip(LOSSES, TOKENS, strict=True)) / sum(TOKENS)


def log(per_token: list[float], steps: list[float]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "kind": "training_logs",
        "steps": [
            {"step": i, "loss": loss, "supervised_tokens": 100 + i}
            for i, loss in enumerate(steps, start=1)
        ],
        "evaluation": {
            "nll": [loss * n for loss, n in zip(per_token, TOKENS, strict=True)],
            "tokens": TOKENS,
        },
    }


@pytest.fixture
def logged(pair: tuple[Path, Path]) -> tuple[Path, Path]:
    write(pair[0] / "training_logs.json", log(LOSSES, [2.0] * 20))
    worse = [loss + change for loss, change in zip(LOSSES, (0.1, 0, 0, 0.2, 0) * 4, strict=True)]
    write(pair[1] / "training_logs.json", log(worse, [2.1] * 18 + [2.5, 2.7]))
    for folder, loss in zip(pair, (MEAN, MEAN + 0.09), strict=True):
        changed(folder / "training_summary.json", edit("results/eval_loss", loss))
    return pair


def test_differences_are_those_of_the_logs(logged: tuple[Path, Path]) -> None:
    comparison = compare(logged)
    assert table(comparison, "losses").title == "Losses on the same data, 20 conversations"
    # (0.1 * 10 + 0.2 * 40) / 100.
    assert texts(comparison, "losses", "eval_difference") == ["–", "+0.0900"]
    interval = cells(comparison, "losses", "eval_interval")[1].interval or (9.0, 9.0)
    assert 0.0 <= interval[0] < 0.09 < interval[1] <= 0.2
    # (18 * 0.1 + 0.5 + 0.7) / 20, and the last two.
    assert texts(comparison, "losses", "steps_difference") == ["–", "+0.1500"]
    assert texts(comparison, "losses", "last_steps_difference") == ["–", "+0.6000"]
    low, high = cells(comparison, "losses", "perplexity_interval")[0].interval or (0.0, 0.0)
    mean = sum(loss * n for loss, n in zip(LOSSES, TOKENS, strict=True)) / sum(TOKENS)
    assert low < math.exp(mean) < high
    assert "over 20 conversations), and differs on" in comparison.verdict[0]


def test_bootstrap_draws_conversations_with_their_tokens() -> None:
    generator = np.random.default_rng(0)
    nll, tokens = np.array(LOSSES) * TOKENS, np.array(TOKENS)
    places = generator.integers(0, 20, size=(20_000, 20))
    drawn = nll[places].sum(axis=1) / tokens[places].sum(axis=1)
    found = bootstrap(nll.tolist(), TOKENS, draws=20_000, seed=1)
    assert (found.low, found.high) == pytest.approx(
        np.percentile(drawn, [2.5, 97.5]).tolist(), abs=0.01
    )


def test_intervals_cover_the_true_loss() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for run in range(400):
        tokens = generator.integers(20, 200, size=150)
        nll = tokens * generator.normal(1.0, 0.3, size=150)
        found = bootstrap(nll.tolist(), tokens.tolist(), draws=500, seed=run)
        covered += found.low <= 1.0 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_other_data_are_not_compared(logged: tuple[Path, Path]) -> None:
    changed(
        logged[1] / "training_summary.json", edit("data/eval/fingerprint", "sha256:" + "0" * 64)
    )
    comparison = compare(logged, allow_different_data=True)
    assert "eval_difference" not in [row.key for row in table(comparison, "losses").rows]
    assert "steps_difference" in [row.key for row in table(comparison, "losses").rows]


def test_other_batches_are_not_compared(logged: tuple[Path, Path]) -> None:
    path = logged[1] / "training_logs.json"
    record = json.loads(path.read_text())
    record["steps"][0]["supervised_tokens"] += 1
    path.write_text(json.dumps(record))
    keys = [row.key for row in table(compare(logged), "losses").rows]
    assert keys == ["perplexity_interval", "eval_difference", "eval_interval"]


def test_logs_of_before_have_no_evaluation(logged: tuple[Path, Path]) -> None:
    for folder in logged:
        path = folder / "training_logs.json"
        record = json.loads(path.read_text())
        del record["evaluation"]
        path.write_text(json.dumps(record))
    comparison = compare(logged)
    assert table(comparison, "losses").title == "Losses on the same data"
    assert "(no error bar)" in comparison.verdict[0]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [{"step": 1}]},
        {"steps": [{"step": float("inf"), "loss": 1.0}]},
        {"steps": [{"step": 1, "loss": "9" * 400}]},
        {"steps": [{"step": 1, "loss": float("nan")}]},
        {"steps": [{"step": 1.5, "loss": 1.0}]},
        {"evaluation": {"nll": [1.0], "tokens": []}},
        {"evaluation": {"nll": ["nan"], "tokens": [3]}},
        {"evaluation": {"nll": [1.0], "tokens": [0]}},
        {"evaluation": {"nll": [1.0], "tokens": [float("inf")]}},
        {"evaluation": {"nll": 5, "tokens": 5}},
    ],
)
def test_broken_logs_are_named(logged: tuple[Path, Path], change: dict[str, Any]) -> None:
    write(logged[1] / "training_logs.json", log(LOSSES, [2.0] * 20) | change)
    with pytest.raises(ResultsError, match=r"16bit/training_logs.json(, key '|.*not a finite)"):
        compare(logged)


@pytest.mark.parametrize("steps", [5, {}, None, "rows", [3]])
def test_logs_without_rows_are_named(logged: tuple[Path, Path], steps: object) -> None:
    write(logged[1] / "training_logs.json", log(LOSSES, [2.0] * 20) | {"steps": steps})
    with pytest.raises(ResultsError, match=r"16bit/training_logs.json: steps is not a list of obj"):
        compare(logged)


@pytest.mark.parametrize("rows", [0, 19, 21])
def test_logs_have_all_steps_of_a_completed_run(logged: tuple[Path, Path], rows: int) -> None:
    write(logged[1] / "training_logs.json", log(LOSSES, [2.0] * rows))
    message = f"16bit/training_logs.json, key 'steps': {rows} rows, but the summary says 20 steps"
    with pytest.raises(ResultsError, match=message):
        compare(logged)


@pytest.mark.parametrize(
    ("dotted", "value"), [("status", "interrupted"), ("runtime/resumed", True)]
)
def test_logs_of_other_runs_may_lack_steps(
    logged: tuple[Path, Path], dotted: str, value: object
) -> None:
    write(logged[1] / "training_logs.json", log(LOSSES, [2.0] * 19))
    changed(logged[1] / "training_summary.json", edit(dotted, value))
    changed(logged[1] / "training_summary.json", edit("results/eval_loss", MEAN))
    assert "losses" in [item.key for item in compare(logged).tables]


def test_a_missing_log_is_noted(logged: tuple[Path, Path]) -> None:
    (logged[1] / "training_logs.json").unlink()
    comparison = compare(logged)
    assert comparison.notes == (
        "No training_logs.json of 16bit: losses without intervals, and not compared step by step.",
    )


def test_a_loss_without_a_perplexity_has_no_interval_of_one(logged: tuple[Path, Path]) -> None:
    write(logged[1] / "training_logs.json", log([1000.0] * 20, [2.0] * 20))
    changed(logged[1] / "training_summary.json", edit("results/eval_loss", 1000.0))
    shown = texts(compare(logged), "losses", "perplexity_interval")
    assert (shown[0] != "–", shown[1]) == (True, "–")


@pytest.mark.parametrize(
    "dotted",
    ["memory/peak_allocated_bytes", "runtime/train_seconds", "throughput/tokens_per_second"],
)
def test_negative_measures_are_named(logged: tuple[Path, Path], dotted: str) -> None:
    changed(logged[0] / "training_summary.json", edit(dotted, -1))
    message = (
        f"training_summary.json: {dotted.replace('/', '.')} is -1.0, not a number of at least 0"
    )
    with pytest.raises(ResultsError, match=message):
        compare(logged)

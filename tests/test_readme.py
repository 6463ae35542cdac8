"""The README's tables of benchmarks hold what the records under results/benchmarks/ hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"\d{1,2},\d{3}|\b\d{3}\b")
# A row of the README, and its name in the records; a number of conversations may follow.
ROWS = {
    "published recipe": "published",
    "the same recipe through fused layers": "published-fused",
    "PEFT, padded": "peft-full",
    "fused, no checkpointing": "fused-none",
    "fused, selective": "fused-selective",
    "fused, full": "fused-full",
    "fused, offload": "fused-offload",
    "fused, `--memory lean`": "fused-lean",
    "fused, one conversation": "fused-lean-1",
    "fused ": "fused-none",
    "fused, 28": "fused-none",
    "Unsloth": "unsloth-pad",
    "TRL": "trl-pad",
}


def records(pattern: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted((ROOT / "results" / "benchmarks").glob(pattern)):
        found += json.loads(path.read_text(encoding="utf-8"))["measurements"]
    return found


def table(first: str) -> list[list[str]]:
    """The rows under a heading that holds `first`."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and first in line)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def numbers(rows: list[dict[str, Any]]) -> set[str]:
    return {
        f"{m[key]:,.0f}"
        for m in rows
        for key in ("tokens_per_second", "median_tokens_per_second")
    }  # fmt: skip


def of_row(name: str, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    way = next(way for text, way in ROWS.items() if f"{name} ".startswith(text))
    return [m for m in measured if m["way"].partition("@")[0] == way]


@pytest.mark.parametrize(
    ("heading", "pattern", "columns"),
    [
        ("NF4 tokens/s, first host", "training_*nf4_first_host.json", [1]),
        ("NF4 tokens/s, first host", "training_nf4_second_host.json", [2]),
        ("NF4 tokens/s, first host", "training_*bf16_*.json", [4]),
        ("median to Unsloth's", "training_peers_*.json", [1, 2]),
    ],
)
def test_tokens_a_second_are_those_of_the_records(
    heading: str, pattern: str, columns: list[int]
) -> None:
    measured = records(pattern)
    compared = 0
    for row in table(heading):
        known = numbers(of_row(row[0], measured))
        for column in columns:
            shown = NUMBER.findall(row[column])
            assert set(shown) <= known, (row[0], column)
            compared += len(shown)
    assert compared >= 4


def test_table_at_the_top_holds_numbers_of_the_others() -> None:
    measured = records("training_*.json")
    known = numbers(measured)
    peaks = {f"{(m['peak_allocated_bytes'] or 0) / 2**30:.1f}" for m in measured}
    lean = next(m for m in measured if m["way"] == "fused-lean")
    # Its paged optimizer states, 0.30 GiB, lie beside what torch counts.
    peaks.add(f"{lean['peak_allocated_bytes'] / 2**30 + 0.30:.1f}")
    cells = [cell for row in table("| others | here |") for cell in row[1:] if "tokens/s" in cell]
    assert len(cells) == 7
    for cell in cells:
        found = re.fullmatch(r"([\d,]+) tokens/s, ([\d.]+) GiB", cell)
        assert found is not None and found[1] in known and found[2] in peaks, cell


def test_peaks_are_those_of_the_records() -> None:
    for column, pattern in ((3, "training_*nf4_*.json"), (5, "training_*bf16_*.json")):
        measured = [m for m in records(pattern) if m["peak_allocated_bytes"]]
        for row in table("NF4 tokens/s, first host"):
            known = {f"{m['peak_allocated_bytes'] / 2**30:.2f}" for m in of_row(row[0], measured)}
            shown = row[column].partition(" +")[0]
            assert shown == "–" or shown in known, (row[0], column)


def test_agreement_in_bfloat16_is_that_of_the_records() -> None:
    auto = {m["name"]: m for m in records("scoring_smollm2_bf16_and_float32.json")}
    none = {m["name"]: m for m in records("scoring_smollm2_bf16_and_float32_kernels_none.json")}
    ways = [auto["lm-eval hf, batch size 16"], auto["packed"], none["packed"]]
    shown = {row[0]: row[1:] for row in table("`kernels=none` |")}
    assert shown == {
        "mean difference from float32, nats": [f"{m['float32_difference']:.3f}" for m in ways],
        "the letter of float32, %": [f"{100 * m['float32_predictions']:.2f}" for m in ways],
        "the letter of `hf`, %": ["–"] + [f"{100 * m['same_predictions']:.2f}" for m in ways[1:]],
        "the letter of `hf` where neither has a tie, %": ["–"]
        + [f"{100 * m['untied_predictions']:.2f}" for m in ways[1:]],
    }
    plain, _, packed = records("scoring_smollm2_bf16.json")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"accuracy {100 * packed['accuracy_difference']:+.2f} points" in text
    assert f"at most {packed['largest_difference']:.2f} nats apart" in text
    assert f"on {100 * packed['same_predictions']:.1f}% of the questions" in text
    assert f"{plain['ties']:,} of the 14,042" in text.replace("\n", " ")
    assert f"(packed: on {packed['ties']:,})" in text.replace("\n", " ")

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
    "the recipe with `--memory fast`": "published-fast",
    "the recipe with `--memory balanced`": "published-balanced",
    "PEFT, padded": "peft-full",
    "fused, no checkpointing": "fused-none",
    "fused, selective": "fused-selective",
    "fused, full": "fused-full",
    "fused, offload": "fused-offload",
    "fused, `--memory lean`": "fused-lean",
    "fused, one conversation": "fused-lean-1",
}
MAIN = "| NF4 tokens/s |"


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
    ("pattern", "speeds", "peaks"),
    [("training_nf4_fourth_host.json", 1, 2), ("training_bf16_fourth_host.json", 3, 4)],
)
def test_training_steps_are_those_of_the_records(pattern: str, speeds: int, peaks: int) -> None:
    measured = records(pattern)
    compared = 0
    for row in table(MAIN):
        mine = of_row(row[0], measured)
        shown = NUMBER.findall(row[speeds])
        assert set(shown) <= numbers(mine), row
        compared += len(shown)
        peak = row[peaks].partition(" +")[0]
        assert peak == "–" or peak in {f"{m['peak_allocated_bytes'] / 2**30:.2f}" for m in mine}
    assert compared >= 9


def test_hosts_are_those_of_the_records() -> None:
    ways = {
        "published recipe": ("training_nf4", "published"),
        "fused, 31 conversations a step": ("training_nf4", "fused-none@31"),
        "fused": ("training_peers_nf4", "fused-none"),
        "fused, 28 conversations a step": ("training_peers_nf4", "fused-none@28"),
        "Unsloth 2026.10.9, padded": ("training_peers_nf4", "unsloth-pad"),
        "TRL 1.16.0 with Liger's kernels, padded": ("training_peers_nf4", "trl-pad"),
    }
    shown = {row[0]: row[1:] for row in table("| first host | second |")}
    assert list(shown) == list(ways)
    medians: dict[str, list[float | None]] = {}
    for name, (kind, way) in ways.items():
        found = [
            {m["way"]: m for m in records(f"{kind}_{host}_host.json")}.get(way)
            for host in ("first", "second", "third", "fourth")
        ]
        medians[name] = [m and m["median_tokens_per_second"] for m in found]
        assert shown[name][:4] == ["–" if n is None else f"{n:,.0f}" for n in medians[name]]
        peaks = {f"{m['peak_allocated_bytes'] / 2**30:.2f}" for m in found if m}
        assert {shown[name][4].partition(" +")[0]} == peaks
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for name, said in (
        ("fused", "is {} to {} with the same"),
        ("fused, 28 conversations a step", "and {} to {} with 28"),
    ):
        theirs = medians["Unsloth 2026.10.9, padded"]
        ratios = [a / b for a, b in zip(medians[name], theirs, strict=True) if a and b]
        assert said.format(f"{min(ratios):.2f}", f"{max(ratios):.2f}") in text


def test_table_at_the_top_holds_numbers_of_the_others() -> None:
    measured = records("training_*_fourth_host.json")
    known = numbers(measured)
    peaks = {f"{m['peak_allocated_bytes'] / 2**30:.1f}" for m in measured}
    # The states of a paged optimizer lie beside what torch counts.
    for way, states in (("fused-lean", 0.30), ("published", 1.19)):
        mine = next(m for m in measured if (m["way"], m["quant"]) == (way, "nf4"))
        peaks.add(f"{mine['peak_allocated_bytes'] / 2**30 + states:.1f}")
    cells = [cell for row in table("| others | here |") for cell in row[1:] if "tokens/s" in cell]
    assert len(cells) == 10
    for cell in cells:
        found = re.fullmatch(r"([\d,]+) tokens/s, ([\d.]+) GiB", cell)
        assert found is not None and found[1] in known and found[2] in peaks, cell


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
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"log-probability on {ways[0]['ties']:,} of the 2,000" in text
    assert [m["ties"] for m in ways[1:]] == [0, 0] and "on none of all 14,042" in text


def test_answer_of_compare_is_that_of_the_published_runs() -> None:
    import qlora_harness as qh
    from qlora_harness.compare.text import differences_line

    folder = ROOT / "results" / "published" / "smollm2"
    if not folder.is_dir():
        pytest.skip("results/published is not part of this copy")
    names = [f"{arm}{seed}" for arm in ("4bit", "16bit") for seed in ("", "_seed1", "_seed2")]
    comparison = qh.compare([folder / name for name in (*names, "base_4bit", "base_16bit")])
    printed = f"{comparison}\n{differences_line(comparison)}"
    shown = "\n".join(f"    {line}" for line in printed.splitlines())
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")

"""Times are compared only where each run had its device to itself; memory is what a run needs."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from compare_runs import FIRST, SECOND, evaluation, summary, texts, write_run

from qlora_harness.compare.comparison import Comparison, compare
from qlora_harness.compare.exports import to_csv


def merged(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        inner = isinstance(value, dict) and isinstance(record.get(key), dict)
        record[key] = merged(record[key], value) if inner else value
    return record


def run(folder: Path, quant: str, **changes: Any) -> Path:
    marks = FIRST if quant == "nf4" else SECOND
    write_run(folder, merged(summary(quant), changes), evaluation(marks))
    return folder


def two(tmp_path: Path, first: dict[str, Any], other: dict[str, Any]) -> Comparison:
    return compare(
        [run(tmp_path / "4bit", "nf4", **first), run(tmp_path / "16bit", "bf16", **other)]
    )


def at(begin: int, end: int, host: str = "a" * 16, device: str = "b" * 16) -> dict[str, Any]:
    return {
        "started": f"2026-11-24T{begin:02}:00:00+00:00",
        "finished": f"2026-11-24T{end:02}:00:00+00:00",
        "process": {"host": host},
        "environment": {"device": {"id": device}},
    }


@pytest.mark.parametrize(
    ("first", "other", "reason"),
    [
        (at(8, 10), at(9, 11), "4bit and 16bit ran at the same time on the same host and device"),
        (at(8, 12), at(9, 10), "4bit and 16bit ran at the same time on the same host and device"),
        (at(8, 10), at(10, 11), None),
        (at(8, 10), at(9, 11, host="c" * 16), None),
        (at(8, 10), at(9, 11, device="c" * 16), None),
        (
            {"environment": {"cpu_threads": 1}},
            {"environment": {"cpu_threads": 2}},
            "4bit had 1 CPU threads, and 16bit 2",
        ),
        ({"environment": {"cpu_threads": 2}}, {"environment": {"cpu_threads": 2}}, None),
        ({"environment": {"cpu_threads": 2}}, {}, None),
        ({"memory": {"other_processes": 0, "other_bytes": 5 * 2**20}}, {}, None),
        ({}, {"memory": {"other_processes": 2}}, "2 other processes used the GPU of 16bit"),
        ({"memory": {"other_bytes": 3 * 2**30}}, {}, "others held 3.0 GiB of the GPU of 4bit"),
    ],
)
def test_times_of_runs_that_were_disturbed_are_no_result(
    tmp_path: Path, first: dict[str, Any], other: dict[str, Any], reason: str | None
) -> None:
    comparison = two(tmp_path, first, other)
    notes = [note for note in comparison.notes if note.startswith("Training time")]
    for key in ("train_seconds", "tokens_per_second"):
        known = [text for text in texts(comparison, "training", key) if text != "–"]
        assert len(known) == (4 if reason is None else 0)
    assert notes == (
        []
        if reason is None
        else [
            "Training time, throughput and the memory of the whole device are not compared: "
            f"{reason}."
        ]
    )
    assert any("training time" in line for line in comparison.verdict) == (reason is None)


def test_peak_memory_is_allocated_and_managed_and_both_parts_are_shown(tmp_path: Path) -> None:
    paged = {"memory": {"peak_allocated_bytes": 4 * 2**30, "peak_managed_bytes": 2**30}}
    plain = {"memory": {"peak_allocated_bytes": 6 * 2**30, "peak_managed_bytes": 0}}
    comparison = two(tmp_path, paged, plain)
    assert texts(comparison, "training", "peak_gpu_gib") == ["5.00", "6.00", "+1.00", "1.20×"]
    assert texts(comparison, "training", "peak_gpu_allocated_gib")[:2] == ["4.00", "6.00"]
    assert texts(comparison, "training", "peak_gpu_managed_gib")[:2] == ["1.00", "0.00"]


@pytest.mark.parametrize(
    ("optimizer", "managed", "told"),
    [
        ("paged_adamw_32bit", None, True),
        ("paged_adamw_32bit", 2**30, False),
        ("adamw_torch", None, False),
    ],
)
def test_peaks_without_the_managed_memory_of_a_paged_optimizer_are_told(
    tmp_path: Path, optimizer: str, managed: int | None, told: bool
) -> None:
    memory = {"memory": {"peak_managed_bytes": managed}, "settings": {"optimizer": optimizer}}
    comparison = two(tmp_path, memory, {})
    assert any("managed memory" in note for note in comparison.notes) == told


@pytest.mark.parametrize(("share", "told"), [(0.89, True), (0.05, False), (None, False)])
def test_nf4_that_is_mostly_16_bits_is_noted(
    tmp_path: Path, share: float | None, told: bool
) -> None:
    comparison = two(tmp_path, {"quantization": {"unquantised_share": share}}, {})
    notes = [note for note in comparison.notes if note.startswith("4bit is quantised in part only")]
    assert [("89%" in note) for note in notes] == ([True] if told else [])


def test_no_cell_of_the_csv_is_a_formula(tmp_path: Path) -> None:
    one, other = run(tmp_path / "4bit", "nf4"), run(tmp_path / "16bit", "bf16")
    comparison = compare([one, other], labels=["=HYPERLINK(1)", "@other"])
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert {row["run"] for row in rows} == {"'=HYPERLINK(1)", "'@other"}
    assert all(not row["text"].startswith(("=", "@")) for row in rows)

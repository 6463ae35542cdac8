"""The tables of a comparison of small made-up runs, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from compare_runs import (
    FAMILY,
    FIRST,
    GIB,
    SECOND,
    cells,
    evaluation,
    summary,
    table,
    texts,
    write_harness,
    write_run,
)

from qlora_harness.compare import report
from qlora_harness.compare.comparison import compare
from qlora_harness.compare.tables.number_text import duration


def test_training_table(pair: tuple[Path, Path]) -> None:
    comparison = compare(pair)
    assert [column.heading for column in table(comparison, "training").columns] == [
        "4bit",
        "16bit",
        "difference",
        "ratio",
    ]
    rows = {row.key: [cell.text for cell in row.cells] for row in comparison.tables[0].rows}
    assert rows == {
        "peak_gpu_gib": ["6.50", "14.50", "+8.00", "2.23×"],
        "peak_gpu_reserved_gib": ["7.00", "15.00", "+8.00", "2.14×"],
        "train_seconds": ["1:23:20", "1:06:40", "−0:16:40", "0.80×"],
        "tokens_per_second": ["400.0", "500.0", "+100.0", "1.25×"],
        "final_train_loss": ["1.2500", "1.0000", "−0.2500", "0.800×"],
        "eval_loss": ["1.5000", "1.5000", "0.0000", "1.000×"],
        "perplexity": ["4.482", "4.482", "0.000", "1.000×"],
    }
    assert cells(comparison, "training", "peak_gpu_gib")[2].value == 8.0
    assert cells(comparison, "training", "train_seconds")[3].value == 0.8


def test_memory_of_the_device_is_that_of_all_processes(pair: tuple[Path, Path]) -> None:
    write_run(pair[0], summary(memory__peak_device_used_bytes=20 * GIB))
    rows = {row.key: row for row in table(compare(pair), "training").rows}
    assert rows["peak_gpu_device_gib"].name == "Peak GPU memory, device, all processes (GiB)"
    assert rows["peak_gpu_device_gib"].cells[0].text == "20.00"


def test_mmlu_table(pair: tuple[Path, Path]) -> None:
    comparison = compare(pair)
    assert table(comparison, "mmlu").title == f"MMLU: {FAMILY}, 20 questions"
    # 12 and 10 of 20 right; sqrt(.6*.4/19) = .11239, sqrt(.5*.5/19) = .11471.
    assert texts(comparison, "mmlu", "acc") == ["60.00 ± 11.24", "50.00 ± 11.47", "−10.00 ± 16.06"]
    micro = cells(comparison, "mmlu", "acc")[2]
    assert micro.value == pytest.approx(-10.0)
    assert micro.stderr == pytest.approx(100 * math.sqrt(0.24 / 19 + 0.25 / 19))
    assert texts(comparison, "mmlu", "acc_macro") == [
        "60.00 ± 12.50",
        "50.00 ± 12.50",
        "−10.00 ± 17.68",
    ]
    assert texts(comparison, "mmlu", "category.stem")[0] == "70.00 ± 15.28"
    assert texts(comparison, "mmlu", "category.humanities")[2] == "0.00 ± 23.57"
    assert texts(comparison, "mmlu", "ties") == ["1", "1", "0"]
    assert "unpaired" in table(comparison, "mmlu").columns[-1].heading


def test_paired_table(pair: tuple[Path, Path]) -> None:
    comparison = compare(pair)
    found = {row.key: row.cells[0] for row in table(comparison, "paired").rows}
    counted = ("both", "only_first", "only_second", "neither")
    assert [found[key].value for key in counted] == [7, 5, 3, 5]
    assert found["difference"].value == -10.0
    # b = 5, c = 3, n = 20.
    assert found["difference"].stderr == pytest.approx(100 * math.sqrt(8 - 4 / 20) / 20)
    assert found["difference"].text == "−10.00 ± 13.96"
    assert found["mcnemar_p"].text == "0.73"
    assert found["mcnemar_p"].value == pytest.approx(
        2 * sum(math.comb(8, k) for k in range(4)) / 2**8
    )
    assert found["interval"].text == "–"  # eight changed answers are too few
    assert found["macro"].value == pytest.approx(-10.0)
    assert found["agreement"].text == "100.00"  # all choose the first letter, see `sample`


def test_differences_by_category_and_subject(pair: tuple[Path, Path]) -> None:
    comparison = compare(pair)
    (stem,) = table(comparison, "categories").rows
    assert (stem.key, stem.name) == ("categories.stem", "STEM (n = 10)")
    (details,) = comparison.details
    assert [row.key for row in details.rows] == ["subjects.anatomy", "subjects.law"]
    by_subject = [row.cells[0].value for row in details.rows]
    assert sum(float(value or 0) for value in by_subject) / 2 == pytest.approx(-10.0)
    assert "subjects" in [item["key"] for item in report.to_json(comparison)["tables"]]
    assert "MMLU, paired, by subject" in report.to_markdown(comparison)


def test_bootstrap_follows_its_seed(pair: tuple[Path, Path]) -> None:
    worse = {"anatomy": "0" * 10, "law": "0" * 10}
    write_run(pair[1], None, evaluation(worse))
    write_harness(pair[1], worse)

    def interval(seed: int) -> object:
        found = compare(pair, draws=200, seed=seed)
        return cells(found, "paired", "interval")[0].interval

    assert interval(1) == interval(1)
    assert interval(1) != interval(2)


def test_three_runs_are_compared_with_the_first(pair: tuple[Path, Path], tmp_path: Path) -> None:
    third = write_run(tmp_path / "results" / "fp4", summary(), evaluation(FIRST))
    comparison = compare([*pair, third])
    assert [column.heading for column in table(comparison, "training").columns] == [
        "4bit",
        "16bit",
        "Δ 16bit",
        "16bit ×",
        "fp4",
        "Δ fp4",
        "fp4 ×",
    ]
    memory = texts(comparison, "training", "peak_gpu_gib")
    assert memory == ["6.50", "14.50", "+8.00", "2.23×", "6.50", "0.00", "1.00×"]
    assert texts(comparison, "mmlu", "acc")[3:] == ["60.00 ± 11.24", "0.00 ± 15.89"]
    # Only the second has samples to pair with the first.
    assert [column.run for column in table(comparison, "paired").columns] == [1]
    assert len(comparison.verdict) == 2
    assert "(unpaired): no difference shown" in comparison.verdict[1]
    assert any(
        "mmlu_progress file of fp4: the difference is unpaired" in note for note in comparison.notes
    )


def test_tests_of_several_runs_are_labelled_as_corrected(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = [row.key for row in table(compare(pair), "paired").rows]
    assert "mcnemar_p" in rows
    assert "mcnemar_p_holm" not in rows  # one test needs no correction
    # Of the 12 right answers of the first run it lost six: p = 2/2⁶ alone, twice that among two.
    worse = {"anatomy": "1111000000", "law": "1100000000"}
    third = write_run(tmp_path / "results" / "fp4", summary(), evaluation(worse))
    write_harness(third, worse)
    comparison = compare([*pair, third])
    found = {row.key: row for row in table(comparison, "paired").rows}
    assert found["mcnemar_p_holm"].name == "  after Holm's correction over 2 runs"
    assert [cell.value for cell in found["mcnemar_p"].cells] == pytest.approx([0.7265625, 2 / 2**6])
    assert [cell.value for cell in found["mcnemar_p_holm"].cells] == pytest.approx(
        [0.7265625, 4 / 2**6]
    )
    assert (
        "no difference is shown (McNemar p = 0.0625 after Holm's correction over 2 runs)"
        in comparison.verdict[1]
    )
    rows = next(item for item in report.to_json(comparison)["tables"] if item["key"] == "paired")
    values = {row["key"]: row["cells"][1]["value"] for row in rows["rows"]}
    assert (values["mcnemar_p"], values["mcnemar_p_holm"]) == pytest.approx((0.03125, 0.0625))


def scored(folder: Path, quant: str, seed: int, marks: dict[str, str]) -> Path:
    write_run(folder, summary(quant, settings__seed=seed), evaluation(marks))
    write_harness(folder, marks)
    return folder


def test_other_seeds_of_the_baseline_are_not_among_the_corrected(tmp_path: Path) -> None:
    worse = {"anatomy": "1111000000", "law": "1100000000"}
    runs = [
        scored(tmp_path / "n0", "nf4", 0, FIRST),
        scored(tmp_path / "n1", "nf4", 1, worse),
        scored(tmp_path / "b0", "bf16", 0, worse),
        scored(tmp_path / "b1", "bf16", 1, SECOND),
    ]
    comparison = compare(runs)
    found = {row.key: row for row in table(comparison, "paired").rows}
    assert found["mcnemar_p_holm"].name == "  after Holm's correction over 2 runs"
    raw = [2 / 2**6, 2 / 2**6, 0.7265625]
    assert [cell.value for cell in found["mcnemar_p"].cells] == pytest.approx(raw)
    holm = [cell.value for cell in found["mcnemar_p_holm"].cells]
    assert holm == [None, pytest.approx(4 / 2**6), pytest.approx(0.7265625)]
    assert "(McNemar p = 0.0312, uncorrected: only the seed differs)" in comparison.verdict[0]
    assert "p = 0.0625 after Holm's correction over 2 runs)" in comparison.verdict[1]
    assert (
        "Only the seed differs between n0 and n1: no comparison of interest, so the p of McNemar's "
        "test is uncorrected there, and Holm's correction is over the other runs."
    ) in comparison.notes
    # With one run left there is nothing to correct.
    rows = [row.key for row in table(compare(runs[:3]), "paired").rows]
    assert "mcnemar_p_holm" not in rows


def test_runs_of_which_none_is_scored_are_compared_by_training(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / quant, summary(quant)) for quant in ("nf4", "bf16")]
    comparison = compare(runs)
    assert [item.key for item in comparison.tables] == ["training"]
    assert "No run has an MMLU evaluation." in comparison.notes


def test_memory_of_cpu_runs_stays_out_of_the_gpu_row(pair: tuple[Path, Path]) -> None:
    for folder, quant, size in zip(pair, ("nf4", "bf16"), (2, 3), strict=True):
        memory = {"device_type": "cpu", "cpu_peak_rss_bytes": size * GIB}
        write_run(folder, summary(quant, memory=memory))
    comparison = compare(pair)
    assert texts(comparison, "training", "peak_gpu_gib") == ["–", "–", "–", "–"]
    assert texts(comparison, "training", "peak_cpu_gib") == ["2.00", "3.00", "+1.00", "1.50×"]
    assert "uses 1.00 GiB more peak CPU memory (1.50×)" in comparison.verdict[0]


def test_an_interrupted_run_may_lack_numbers(pair: tuple[Path, Path]) -> None:
    write_run(pair[0], summary(status="interrupted", results=None, throughput=...))
    comparison = compare(pair)
    assert texts(comparison, "training", "final_train_loss") == ["–", "1.0000", "–", "–"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3599.5, "1:00:00"), (1e5, "27:46:40")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text

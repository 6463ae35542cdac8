"""lm_eval's own results and samples as runs to compare."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from compare_runs import FAMILY, FIRST, SECOND, harness, texts, write_harness

from qlora_harness.compare.comparison import compare
from qlora_harness.compare.evaluation import split_task
from qlora_harness.errors import ResultsError
from qlora_harness.record import scrub


def test_answers_are_recomputed_when_asked(pair: tuple[Path, Path]) -> None:
    before = compare(pair).tables
    assert compare(pair, rescore=True).tables == before
    (path,) = pair[1].glob("gpt2/samples_*_law_*.jsonl")
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    first["filtered_resps"].reverse()
    path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    compare(pair)  # the counts still add up
    with pytest.raises(ResultsError) as caught:
        compare(pair, rescore=True)
    assert (
        f"{path.name}, line 1: acc is 1, but the best log-probability is that of choice 3"
        in str(caught.value)
    )


def test_a_foreign_model_has_no_training(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_harness(tmp_path / "foreign", SECOND)
    comparison = compare([pair[0], tmp_path / "foreign"])
    assert texts(comparison, "training", "peak_gpu_gib") == ["6.50", "–", "–", "–"]
    assert texts(comparison, "mmlu", "acc")[1] == "50.00 ± 11.47"
    assert texts(comparison, "mmlu", "ties") == ["1", "0", "−1"]
    assert comparison.runs[1].model == "gpt2"
    assert "No training summary: foreign." in comparison.notes
    different = {row.key: [cell.text for cell in row.cells] for row in comparison.settings.rows}
    assert different["training (as a whole)"] == ["recorded", "–"]
    assert different["evaluation.model.base"] == ["llama", "gpt2"]
    # The harness says "8" and "torch.bfloat16" where our record says 8 and bfloat16.
    assert "evaluation.settings.batch_size" not in different
    assert "evaluation.settings.dtype" not in different


def test_a_results_file_can_be_named_itself(tmp_path: Path) -> None:
    files = [
        write_harness(tmp_path / "a", FIRST, nested_groups=True),
        write_harness(tmp_path / "b", SECOND),
    ]
    comparison = compare(files, labels=["one", "two"])
    assert texts(comparison, "mmlu", "acc")[:2] == ["60.00 ± 11.24", "50.00 ± 11.47"]
    assert texts(comparison, "mmlu", "category.stem")[0] == "70.00 ± 15.28"
    assert [item.key for item in comparison.tables] == ["mmlu", "paired", "categories"]


def test_an_undefined_standard_error_is_left_out(tmp_path: Path) -> None:
    files = [write_harness(tmp_path / name, FIRST, samples=False) for name in "ab"]
    comparison = compare(files)
    assert texts(comparison, "mmlu", "acc_macro") == ["60.00", "60.00", "0.00"]


def test_the_newest_harness_file_is_used_and_named(tmp_path: Path) -> None:
    old = write_harness(tmp_path / "a", SECOND, date="2026-11-23T23-59-59")
    new = write_harness(tmp_path / "a", FIRST)
    other = write_harness(tmp_path / "b", FIRST)
    comparison = compare([tmp_path / "a", other])
    assert comparison.runs[0].evaluation == scrub(str(new))
    assert texts(comparison, "mmlu", "acc")[0] == "60.00 ± 11.24"
    note = f"a: {scrub(str(new))} is the newest of 2 harness files with {FAMILY}: used."
    assert note in comparison.notes
    # By the date in the name: a copy has the time of its copying.
    os.utime(old, (9e9, 9e9))
    assert compare([tmp_path / "a", other]).runs[0].evaluation == scrub(str(new))


def test_two_harness_files_of_one_date_must_be_the_same(tmp_path: Path) -> None:
    file = write_harness(tmp_path / "a", FIRST)
    other = write_harness(tmp_path / "b", FIRST)
    copied = tmp_path / "a" / "copy" / file.name
    copied.parent.mkdir()
    copied.write_bytes(file.read_bytes())
    compare([tmp_path / "a", other])
    copied.write_text(json.dumps(harness(SECOND)))
    with pytest.raises(ResultsError, match="have the same date"):
        compare([tmp_path / "a", other])


def test_all_files_of_the_newest_date_must_be_equal(tmp_path: Path) -> None:
    for name, marks in (("a/x", FIRST), ("a/y", FIRST), ("a/z", SECOND)):
        write_harness(tmp_path / name, marks)
    other = write_harness(tmp_path / "b", FIRST)
    with pytest.raises(ResultsError, match="have the same date"):
        compare([tmp_path / "a", other])


def test_a_newer_file_without_the_family_is_passed_over(tmp_path: Path) -> None:
    wanted = write_harness(tmp_path / "a", FIRST)
    write_harness(tmp_path / "a", FIRST, date="2026-12-31T00-00-00", family="mmlu_qlora_0shot")
    other = write_harness(tmp_path / "b", FIRST)
    assert compare([tmp_path / "a", other]).runs[0].evaluation == scrub(str(wanted))


def test_an_older_harness_file_that_contradicts_ours_gives_way(pair: tuple[Path, Path]) -> None:
    file = write_harness(pair[0], SECOND)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"date": 1000.0}))
    comparison = compare(pair)
    assert texts(comparison, "mmlu", "acc")[0] == "60.00 ± 11.24"
    assert [item.key for item in comparison.tables] == ["training", "mmlu"]
    assert any("the newer one is used" in note for note in comparison.notes)


def test_answers_are_joined_by_number_not_by_line(pair: tuple[Path, Path]) -> None:
    before = compare(pair).tables[2]
    for path in pair[0].rglob("samples_*.jsonl"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join(reversed(lines)) + "\n")
    assert compare(pair).tables[2] == before


def test_ties_are_counted_in_samples(tmp_path: Path) -> None:
    files = [write_harness(tmp_path / name, FIRST) for name in "ab"]
    path = next((tmp_path / "b").rglob("samples_*_law_*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["filtered_resps"] = [[-1.0, False], [-1.0, False], [-2.0, False], [-3.0, False]]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert texts(compare(files), "mmlu", "ties") == ["0", "1", "+1"]


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("mmlu_qlora_5shot", ("mmlu_qlora_5shot", "")),
        ("mmlu_qlora_5shot_val", ("mmlu_qlora_5shot_val", "")),
        ("mmlu_qlora_5shot_val_anatomy", ("mmlu_qlora_5shot_val", "anatomy")),
        ("mmlu_qlora_0shot_us_history", ("mmlu_qlora_0shot", "us_history")),
        ("mmlu_qlora_demo::mmlu_qlora_demo_stem", ("mmlu_qlora_demo", "stem")),
        ("mmlu", None),
    ],
)
def test_task_names_are_split(task: str, parts: tuple[str, str] | None) -> None:
    assert split_task(task) == parts

"""`qlora-harness compare` from the files of small made-up runs to its tables and refusals."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_harness.compare import command, report
from qlora_harness.compare.comparison import compare, default_labels
from qlora_harness.compare.evaluation import split_task
from qlora_harness.compare.report import Comparison
from qlora_harness.compare.tables import Cell, Table, duration
from qlora_harness.errors import ComparisonError, HarnessError, ResultsError, SettingsError
from qlora_harness.record import scrub

FAMILY = "mmlu_qlora_5shot"
DATE = "2026-11-24T08-14-04.277787"
GIB = 2**30
CATEGORY_OF = {"anatomy": "stem", "law": "humanities", "virology": "other"}
# Ten questions each: right in both 4 + 3, only first 3 + 2, only second 1 + 2, neither 2 + 3.
FIRST = {"anatomy": "1111111000", "law": "1111100000"}
SECOND = {"anatomy": "1111000100", "law": "1110011000"}

Edit = Callable[[dict[str, Any]], None]


# --- made-up runs ------------------------------------------------------------------------------


def put(value: dict[str, Any], dotted: str, new: object) -> None:
    """Sets value["a"]["b"] for "a.b"; a missing value is removed."""
    *keys, last = dotted.split("/")
    for key in keys:
        value = value[key]
    if new is ...:
        del value[last]
    else:
        value[last] = new


def edit(dotted: str, new: object) -> Edit:
    return lambda record: put(record, dotted, new)


def summary(quant: str = "nf4", **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "schema_version": 1,
        "kind": "training_summary",
        "status": "completed",
        "arm": "4bit" if quant == "nf4" else "16bit",
        "quant": quant,
        "started": "2026-11-24T08:00:00+00:00",
        "finished": "2026-11-24T09:00:00+00:00",
        "model": {"name": "llama", "revision": None, "commit": "a" * 40, "random_weights": False},
        "quantization": {"quant": quant, "double_quant": quant == "nf4"},
        "settings": {"dataset": "oasst1", "learning_rate": 2e-4, "max_steps": 20},
        "data": {
            "dataset": "oasst1",
            "train": {"conversations": 90, "tokens": 9000, "fingerprint": "sha256:" + "1" * 64},
            "eval": {"conversations": 10, "tokens": 1000, "fingerprint": "sha256:" + "2" * 64},
            "dropped": {"deleted": 3},
            "truncated": 0,
        },
        "memory": {
            "device_type": "cuda",
            "peak_allocated_bytes": 6.5 * GIB if quant == "nf4" else 14.5 * GIB,
            "peak_reserved_bytes": 7.0 * GIB if quant == "nf4" else 15.0 * GIB,
            "peak_device_used_bytes": None,
            "cpu_peak_rss_bytes": 3 * GIB,
        },
        "runtime": {"train_seconds": 5000.0 if quant == "nf4" else 4000.0, "resumed": False},
        "throughput": {"tokens_per_second": 400.0 if quant == "nf4" else 500.0},
        "results": {
            "steps": 20,
            "final_train_loss": 1.25 if quant == "nf4" else 1.0,
            "eval_loss": 1.5,
            "perplexity": math.exp(1.5),
        },
        "environment": {
            "versions": {"torch": "2.13.0"},
            "git": {"revision": "b" * 40, "dirty": False},
            "device": {"name": "NVIDIA H100", "total_memory_bytes": 80 * GIB, "count": 1},
            "world_size": 1,
            "command": f"train.py --quant {quant}",
        },
        "failure": None,
    }
    for dotted, value in changes.items():
        put(record, dotted.replace("__", "/"), value)
    return record


def accuracy(marks: str) -> float:
    return marks.count("1") / len(marks)


def stderr(marks: str) -> float | None:
    n, p = len(marks), accuracy(marks)
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def scores(marks: Mapping[str, str], **changes: Any) -> dict[str, Any]:
    """Returns one family of evaluation_results.json."""
    every = "".join(marks.values())
    subject_accuracies = [accuracy(item) for item in marks.values()]
    record: dict[str, Any] = {
        "acc": accuracy(every),
        "acc_stderr": stderr(every),
        "acc_macro": sum(subject_accuracies) / len(subject_accuracies),
        "acc_macro_stderr": 0.125,
        "n": len(every),
        "n_total": len(every),
        "ties": 1,
        "truncated": 0,
        "prompts_sha256": "c" * 64,
        "subjects": {
            name: {
                "acc": accuracy(item),
                "acc_stderr": stderr(item),
                "n": len(item),
                "correct": item.count("1"),
            }
            for name, item in marks.items()
        },
        "categories": {
            CATEGORY_OF[name]: {
                "acc": accuracy(item),
                "acc_stderr": stderr(item),
                "acc_macro": accuracy(item),
                "n": len(item),
            }
            for name, item in marks.items()
        },
    }
    record.update(changes)
    return record


def evaluation(
    marks: Mapping[str, str], families: Sequence[str] = (FAMILY,), **changes: Any
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "kind": "evaluation_results",
        "arm": "4bit",
        "model": {"base": "llama", "revision": None, "quant": "nf4", "peft": "adapter"},
        "tasks": {family: scores(marks, **changes) for family in families},
        "settings": {"batch_size": 8, "dtype": "bfloat16", "max_length": 2048},
        "environment": {"versions": {"lm_eval": "0.4.13"}, "device": "NVIDIA H100"},
    }


def metrics(name: str, marks: str, macro: float) -> dict[str, Any]:
    return {
        "name": name,
        "alias": name,
        "sample_len": len(marks),
        "acc,none": accuracy(marks),
        "acc_stderr,none": stderr(marks) or "N/A",
        "acc_macro,none": macro,
        "acc_macro_stderr,none": "N/A",
    }


def harness(
    marks: Mapping[str, str],
    family: str = FAMILY,
    total: int | None = None,
    nested_groups: bool = False,
) -> dict[str, Any]:
    """Returns lm_eval's results JSON; inline groups are named "parent::child" there."""
    prefix = f"{family}::" if nested_groups else ""
    macro = sum(map(accuracy, marks.values())) / len(marks)
    results = {
        f"{family}_{name}": metrics(f"{family}_{name}", item, accuracy(item))
        for name, item in marks.items()
    }
    groups = {
        f"{prefix}{family}_{CATEGORY_OF[name]}": metrics("category", item, accuracy(item))
        for name, item in marks.items()
    }
    groups[family] = metrics(family, "".join(marks.values()), macro)
    return {
        "results": {**results, **groups},
        "groups": groups,
        "group_subtasks": {},
        "configs": {},
        "versions": {family: "1.0"},
        "n-samples": {
            f"{family}_{name}": {"original": total or len(item), "effective": len(item)}
            for name, item in marks.items()
        },
        "config": {
            "model": "hf",
            "model_args": {"pretrained": "gpt2", "dtype": "bfloat16"},
            "model_dtype": "torch.bfloat16",
            "batch_size": "8",
            "limit": None,
            "use_cache": None,
        },
        "pretty_env_info": "PyTorch version: 2.13.0\nGPU models and configuration: GPU 0: H100\n",
        "transformers_version": "5.23.0",
        "lm_eval_version": "0.4.13",
        "max_length": 2048,
        "chat_template_sha": None,
    }


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def sample(subject: str, doc_id: int, right: bool) -> dict[str, Any]:
    """Returns a logged sample as lm_eval writes it: log-probabilities as text, the first best."""
    return {
        "doc_id": doc_id,
        "doc": {},
        "target": "0" if right else "1",
        "filtered_resps": [[str(-0.5 - choice), "False"] for choice in range(4)],
        "filter": "none",
        "metrics": ["acc", "acc_macro"],
        "doc_hash": digest("doc", subject, doc_id),
        "prompt_hash": digest("prompt", subject, doc_id),
        "target_hash": digest("target", subject, doc_id),
        "acc": float(right),
        "acc_macro": float(right),
    }


def write(path: Path, value: object, seconds: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    if seconds is not None:
        os.utime(path, (seconds, seconds))
    return path


def write_harness(
    folder: Path,
    marks: Mapping[str, str],
    *,
    date: str = DATE,
    seconds: float = 2000.0,
    samples: bool = True,
    **options: Any,
) -> Path:
    family = options.get("family", FAMILY)
    if samples:
        for subject, item in marks.items():
            lines = [
                json.dumps(sample(subject, index, mark == "1")) for index, mark in enumerate(item)
            ]
            name = f"samples_{family}_{subject}_{date}.jsonl"
            write(folder / "gpt2" / name, "\n".join(lines) + "\n")
    path = folder / "gpt2" / f"results_{date}.json"
    return write(path, harness(marks, **options), seconds)


def write_run(
    folder: Path,
    training: dict[str, Any] | None = None,
    scored: dict[str, Any] | None = None,
) -> Path:
    if training is not None:
        write(folder / "training_summary.json", training)
    if scored is not None:
        write(folder / "evaluation_results.json", scored, 1000.0)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two complete runs: summary, evaluation, harness JSON and samples."""
    folders = tmp_path / "results" / "4bit", tmp_path / "results" / "16bit"
    for folder, quant, marks in zip(folders, ("nf4", "bf16"), (FIRST, SECOND), strict=True):
        write_run(folder, summary(quant), evaluation(marks))
        write_harness(folder, marks)
    return folders


def table(comparison: Comparison, key: str) -> Table:
    return next(item for item in comparison.tables if item.key == key)


def cells(comparison: Comparison, key: str, row: str) -> list[Cell]:
    return list(next(item for item in table(comparison, key).rows if item.key == row).cells)


def texts(comparison: Comparison, key: str, row: str) -> list[str]:
    return [cell.text for cell in cells(comparison, key, row)]


def changed(path: Path, change: Edit) -> None:
    record = json.loads(path.read_text())
    before = path.stat()
    change(record)
    path.write_text(json.dumps(record))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def main(*words: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


# --- the two tables ------------------------------------------------------------------------------


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


def test_equivalence_is_said_for_the_margin_asked(pair: tuple[Path, Path]) -> None:
    assert "is not shown to be within ±1 points" in compare(pair).verdict[0]
    wide = compare(pair, margin=0.4).verdict[0]
    assert "no difference is shown (McNemar p = 0.73), and it is shown to be within ±40" in wide


def test_bootstrap_follows_its_seed(pair: tuple[Path, Path]) -> None:
    worse = {"anatomy": "0" * 10, "law": "0" * 10}
    write_run(pair[1], None, evaluation(worse))
    write_harness(pair[1], worse)

    def interval(seed: int) -> object:
        found = compare(pair, draws=200, seed=seed)
        return cells(found, "paired", "interval")[0].interval

    assert interval(1) == interval(1)
    assert interval(1) != interval(2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--margin", "0"], "--margin 0. Give percentage points, above 0."),
        (["--draws", "10"], "--draws 10 --seed 0. Draw 100 samples or more, from a seed >= 0."),
    ],
)
def test_flags_of_the_statistics_are_checked(
    pair: tuple[Path, Path], flags: list[str], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        main(*pair, *flags)
    assert str(caught.value) == message


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
    assert any("No logged samples of fp4" in note for note in comparison.notes)


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


def test_runs_of_which_none_is_scored_are_compared_by_training(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / quant, summary(quant)) for quant in ("nf4", "bf16")]
    comparison = compare(runs)
    assert [item.key for item in comparison.tables] == ["training"]
    assert "No run has an MMLU evaluation." in comparison.notes


# --- the harness's own JSON ----------------------------------------------------------------------


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
    old = write_harness(tmp_path / "a", SECOND, date="2026-12-31T00-00-00", seconds=1000)
    new = write_harness(tmp_path / "a", FIRST, seconds=2000)
    other = write_harness(tmp_path / "b", FIRST)
    comparison = compare([tmp_path / "a", other])
    assert comparison.runs[0].evaluation == scrub(str(new))
    assert texts(comparison, "mmlu", "acc")[0] == "60.00 ± 11.24"
    note = f"a: {scrub(str(new))} is the newest of 2 harness files with {FAMILY}: used."
    assert note in comparison.notes
    # Newest by time of modification, not by name, and never two at once.
    assert old.name > new.name
    os.utime(old, (2000, 2000))
    with pytest.raises(ResultsError, match="have the same modification time"):
        compare([tmp_path / "a", other])


def test_a_newer_file_without_the_family_is_passed_over(tmp_path: Path) -> None:
    wanted = write_harness(tmp_path / "a", FIRST, seconds=1000)
    write_harness(
        tmp_path / "a", FIRST, date="2026-12-31T00-00-00", family="mmlu_qlora_0shot", seconds=2000
    )
    other = write_harness(tmp_path / "b", FIRST)
    assert compare([tmp_path / "a", other]).runs[0].evaluation == scrub(str(wanted))


def test_an_older_harness_file_that_contradicts_ours_gives_way(pair: tuple[Path, Path]) -> None:
    os.utime(write_harness(pair[0], SECOND), (500, 500))
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


# --- settings and notes --------------------------------------------------------------------------


def test_every_setting_that_differs_is_listed(pair: tuple[Path, Path]) -> None:
    write_run(
        pair[1], summary("bf16", settings__max_steps=40, environment__versions={"torch": "2.11.0"})
    )
    changed(pair[1] / "evaluation_results.json", edit("settings/batch_size", 16))
    comparison = compare(pair)
    assert {row.key: [cell.text for cell in row.cells] for row in comparison.settings.rows} == {
        # Once, although the records say it three times; and not the arm's name, which follows.
        "training.quant": ["nf4", "bf16"],
        "training.quantization.double_quant": ["true", "false"],
        "training.settings.max_steps": ["20", "40"],
        "training.environment.versions.torch": ["2.13.0", "2.11.0"],
        "evaluation.settings.batch_size": ["8", "16"],
    }
    # The two left out above are neither listed nor the same.
    same = sum(value is not None for value in _same_conditions(pair, comparison))
    assert comparison.same_settings == same - 2


def _same_conditions(pair: tuple[Path, Path], comparison: Comparison) -> list[object]:
    from qlora_harness.compare.runs import load_run

    run = load_run(pair[0], "a")
    assert run.training is not None
    different = {row.key for row in comparison.settings.rows}
    conditions = {**run.training.conditions, **run.evaluations[FAMILY].conditions}
    assert "training.environment.command" not in conditions
    return [value for key, value in conditions.items() if key not in different]


def test_a_setting_that_json_cannot_hold_is_shown_as_text(pair: tuple[Path, Path]) -> None:
    write_run(pair[0], summary(settings__learning_rate=math.nan))
    assert main(*pair) == 0
    record = json.loads((pair[0].parent / "comparison.json").read_text())
    rows = {row["key"]: row["cells"] for row in record["settings_that_differ"]["rows"]}
    assert [cell["value"] for cell in rows["training.settings.learning_rate"]] == ["nan", 2e-4]


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


def test_a_family_has_the_settings_of_its_own_time(pair: tuple[Path, Path]) -> None:
    own = {"batch_size": 4, "dtype": "bfloat16", "max_length": 2048}
    changed(pair[1] / "evaluation_results.json", edit(f"tasks/{FAMILY}/settings", own))
    rows = {row.key: [cell.value for cell in row.cells] for row in compare(pair).settings.rows}
    assert rows["evaluation.settings.batch_size"] == [8, 4]


def test_a_resumed_time_is_not_in_the_verdict(pair: tuple[Path, Path]) -> None:
    write_run(pair[0], summary(runtime__resumed=True))
    assert "training time" not in compare(pair).verdict[0]


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


# --- choosing the family -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "asked", "chosen"),
    [
        (("mmlu_qlora_5shot", "mmlu_qlora_0shot"), ("mmlu_qlora_0shot", FAMILY), None, FAMILY),
        (("mmlu_qlora_5shot", "mmlu_qlora_demo"), ("mmlu_qlora_demo",), None, "mmlu_qlora_demo"),
        ((FAMILY, "mmlu_qlora_0shot"), (FAMILY, "mmlu_qlora_0shot"), "mmlu_qlora_0shot", ...),
    ],
)
def test_family_compared(
    tmp_path: Path, first: Sequence[str], second: Sequence[str], asked: str | None, chosen: object
) -> None:
    runs = [
        write_run(tmp_path / name, None, evaluation(FIRST, families))
        for name, families in (("a", first), ("b", second))
    ]
    assert compare(runs, task=asked).family == (asked if chosen is ... else chosen)


@pytest.mark.parametrize(
    ("first", "second", "asked", "message"),
    [
        ([FAMILY], ["mmlu_qlora_0shot"], None, "the runs have no evaluation in common .found .*"),
        (
            ["mmlu_qlora_0shot", "mmlu_qlora_demo"],
            ["mmlu_qlora_0shot", "mmlu_qlora_demo"],
            None,
            "several evaluations in common: mmlu_qlora_0shot, mmlu_qlora_demo. "
            "Choose one, for example --task mmlu_qlora_0shot",
        ),
        ([FAMILY], [FAMILY], "mmlu", "--task mmlu: .*a has no such evaluation"),
    ],
)
def test_family_refused(
    tmp_path: Path, first: Sequence[str], second: Sequence[str], asked: str | None, message: str
) -> None:
    runs = [
        write_run(tmp_path / name, None, evaluation(FIRST, families))
        for name, families in (("a", first), ("b", second))
    ]
    with pytest.raises(ComparisonError, match=message):
        compare(runs, task=asked)


# --- refusals ------------------------------------------------------------------------------------


def in_summary(dotted: str, new: object) -> Callable[[Path], object]:
    return lambda folder: changed(folder / "training_summary.json", edit(dotted, new))


def in_evaluation(dotted: str, new: object) -> Callable[[Path], object]:
    return lambda folder: changed(folder / "evaluation_results.json", edit(dotted, new))


def in_harness(dotted: str, new: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / "evaluation_results.json").unlink()
        changed(next(folder.rglob("results_*.json")), edit(dotted, new))

    return spoil


def in_sample(dotted: str, new: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = next(folder.rglob("samples_*_anatomy_*.jsonl"))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        put(lines[2], dotted, new)
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")

    return spoil


def in_text(pattern: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = next(folder.rglob(pattern))
        path.write_text(change(path.read_text()))

    return spoil


def half(text: str) -> str:
    return text[: len(text) // 2]


def rescored(marks: Mapping[str, str], **changes: Any) -> Callable[[Path], object]:
    """Replaces every evaluation of a run, without samples."""

    def spoil(folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.name.startswith(("results_", "samples_")):
                path.unlink()
        write_run(folder, None, evaluation(marks, **changes))

    return spoil


LESS = {"anatomy": "1111111000", "law": "1111"}
ANATOMY = f"results/{FAMILY}_anatomy"

REFUSALS: dict[str, tuple[Callable[[Path], object], type[HarnessError], str]] = {
    # training_summary.json
    "failed": (
        lambda folder: changed(
            folder / "training_summary.json",
            lambda record: record.update(status="failed", failure={"problem": "loss is nan"}),
        ),
        ComparisonError,
        r'training_summary.json: status is "failed": loss is nan. Mend the cause',
    ),
    "running": (
        in_summary("status", "running"),
        ComparisonError,
        r'status is "running": the training has not ended',
    ),
    "status": (in_summary("status", "done"), ResultsError, r"status is 'done', not running"),
    "half a summary": (
        in_text("training_summary.json", half),
        ResultsError,
        r"training_summary.json, line 1: not valid JSON",
    ),
    "empty summary": (
        in_text("training_summary.json", lambda text: ""),
        ResultsError,
        r"training_summary.json, line 1: not valid JSON",
    ),
    "a list": (
        in_text("training_summary.json", lambda text: "[]"),
        ResultsError,
        r"expected a JSON object, found list",
    ),
    "kind": (
        in_summary("kind", "evaluation_results"),
        ResultsError,
        r"""expected "kind": "training_summary", found 'evaluation_results'""",
    ),
    "no kind": (in_summary("kind", ...), ResultsError, r'"training_summary", found None'),
    "newer schema": (
        in_summary("schema_version", 2),
        ResultsError,
        r"schema_version 2 is newer than this program knows \(1\). Update qlora-harness",
    ),
    "no schema": (in_summary("schema_version", ...), ResultsError, r"schema_version is None"),
    "missing loss": (
        in_summary("results/final_train_loss", None),
        ResultsError,
        r"training_summary.json: results.final_train_loss is missing",
    ),
    "NaN loss": (
        in_summary("results/eval_loss", math.nan),
        ResultsError,
        r"results.eval_loss is nan, not a finite number",
    ),
    "text for a number": (
        in_summary("runtime/train_seconds", "60"),
        ResultsError,
        r"runtime.train_seconds is '60', not a number",
    ),
    "number for a text": (
        in_summary("model/name", 7),
        ResultsError,
        r"model.name is 7, not a string",
    ),
    "a number too large": (
        in_summary("runtime/train_seconds", 10**400),
        ResultsError,
        r"runtime.train_seconds is inf, not a finite number",
    ),
    "environment is a text": (
        in_summary("environment", "Linux"),
        ResultsError,
        r"environment is a str, not an object",
    ),
    "no fingerprint": (
        in_summary("data/train/fingerprint", ...),
        ResultsError,
        r"data.train.fingerprint is missing",
    ),
    "training data": (
        in_summary("data/train/fingerprint", "sha256:" + "9" * 64),
        ComparisonError,
        r"different data: data.train.fingerprint is 4bit sha256:111111111111, 16bit sha256:9{12}.*"
        r"--allow-different-data",
    ),
    "evaluation data": (
        in_summary("data/eval/fingerprint", "sha256:" + "9" * 64),
        ComparisonError,
        r"different data: data.eval.fingerprint",
    ),
    # evaluation_results.json
    "half an evaluation": (
        in_text("evaluation_results.json", half),
        ResultsError,
        r"evaluation_results.json, line 1: not valid JSON",
    ),
    "evaluation kind": (
        in_evaluation("kind", "training_summary"),
        ResultsError,
        r'evaluation_results.json: expected "kind": "evaluation_results"',
    ),
    "NaN accuracy": (
        in_evaluation(f"tasks/{FAMILY}/acc", math.nan),
        ResultsError,
        rf"tasks.{FAMILY}.acc is nan, not a finite number",
    ),
    "missing macro": (
        in_evaluation(f"tasks/{FAMILY}/acc_macro", ...),
        ResultsError,
        rf"tasks.{FAMILY}.acc_macro is missing",
    ),
    "accuracy in percent": (
        in_evaluation(f"tasks/{FAMILY}/acc", 45.3),
        ResultsError,
        r"acc is 45.3, not between 0 and 1",
    ),
    "half a question": (
        in_evaluation(f"tasks/{FAMILY}/n", 19.5),
        ResultsError,
        r"n is 19.5, not a whole number",
    ),
    "subjects is a list": (
        in_evaluation(f"tasks/{FAMILY}/subjects", []),
        ResultsError,
        r"subjects is a list, not an object",
    ),
    "no subjects": (
        in_evaluation(f"tasks/{FAMILY}/subjects", {}),
        ResultsError,
        r"holds no answered question",
    ),
    "accuracy against its subjects": (
        in_evaluation(f"tasks/{FAMILY}/acc", 0.9),
        ResultsError,
        r"acc is 0.900000, but its subjects give 0.500000. The file contradicts itself",
    ),
    "macro against its subjects": (
        in_evaluation(f"tasks/{FAMILY}/acc_macro", 0.9),
        ResultsError,
        r"acc_macro is 0.900000, but its subjects give",
    ),
    "n against its subjects": (
        in_evaluation(f"tasks/{FAMILY}/n", 21),
        ResultsError,
        r"n is 21 of 20, but its subjects have 20 questions",
    ),
    "prompts": (
        in_evaluation(f"tasks/{FAMILY}/prompts_sha256", "d" * 64),
        ComparisonError,
        r"4bit and 16bit answered different questions: prompts_sha256 is c{12} and d{12}",
    ),
    # lm_eval's JSON
    "contradiction": (
        lambda folder: write_harness(folder, FIRST, seconds=1000.0),
        ResultsError,
        r"evaluation_results.json and .*results_2026-11-24T08-14-04.277787.json contradict each "
        r"other on mmlu_qlora_5shot: acc 0.500000 of 20 questions in 2 subjects, "
        r"and acc 0.600000 of 20 in 2. Remove",
    ),
    "other subjects in the harness": (
        in_text("results_*.json", lambda text: text.replace("_law", "_jurisprudence")),
        ResultsError,
        r"contradict each other",
    ),
    "half a results file": (
        in_text("results_*.json", half),
        ResultsError,
        r"results_2026.*.json, line 1: not valid JSON",
    ),
    "foreign results file": (
        lambda folder: write(folder / "x" / "results_1.json", {"accuracy": 1}),
        ResultsError,
        r'results_1.json: not a results file of lm_eval \(no object "results"\)',
    ),
    "NaN in the harness": (
        in_harness(f"{ANATOMY}/acc,none", math.nan),
        ResultsError,
        r"_anatomy.acc,none is nan",
    ),
    "metric missing in the harness": (
        in_harness(f"results/{FAMILY}/acc_macro,none", ...),
        ResultsError,
        rf"results.{FAMILY}.acc_macro,none is missing",
    ),
    "count missing in the harness": (
        in_harness(f"n-samples/{FAMILY}_law/effective", ...),
        ResultsError,
        rf"n-samples.{FAMILY}_law.effective is missing",
    ),
    "limit in the harness": (
        in_harness(f"n-samples/{FAMILY}_law/original", 100),
        ComparisonError,
        r"16bit answered only 20 of 110 questions of mmlu_qlora_5shot \(--limit or .*--allow-limit",
    ),
    # samples
    "half a sample": (
        in_text("samples_*_law_*.jsonl", lambda text: text[:-30]),
        ResultsError,
        r"samples_.*_law_.*.jsonl, line 10: not valid JSON",
    ),
    "half the samples": (
        in_text("samples_*_law_*.jsonl", lambda text: "".join(text.splitlines(True)[:4])),
        ResultsError,
        r"3 right of 4 samples, but the results file says 5 of 10",
    ),
    "a sample file missing": (
        lambda folder: next(folder.rglob("samples_*_law_*.jsonl")).unlink(),
        ResultsError,
        r"_law_.*jsonl is missing \(1 of 2 sample files are\)",
    ),
    "a sample twice": (
        in_sample("doc_id", 1),
        ResultsError,
        r"samples_.*_anatomy_.*, line 3: doc_id 1 is there twice",
    ),
    "no doc_id": (in_sample("doc_id", ...), ResultsError, r"line 3: doc_id is missing"),
    "no hash": (in_sample("doc_hash", ...), ResultsError, r"line 3: doc_hash is missing"),
    "NaN log-probability": (
        in_sample("filtered_resps", [["nan", "False"]] * 4),
        ResultsError,
        r"line 3: filtered_resps holds NaN",
    ),
    "generated text": (
        in_sample("filtered_resps", ["A"]),
        ResultsError,
        r"line 3: filtered_resps does not hold four",
    ),
    "another document": (
        in_sample("doc_hash", "x"),
        ComparisonError,
        r"4bit and 16bit answered different questions: anatomy, doc_id 2: the document hash diff",
    ),
    "another prompt": (
        in_sample("prompt_hash", "x"),
        ComparisonError,
        r"anatomy, doc_id 2: the prompt hash differs. Score all runs with the same task",
    ),
    "another place": (
        in_sample("doc_id", 99),
        ComparisonError,
        r"anatomy, doc_id 2 is in only one of them",
    ),
    # questions
    "fewer questions": (
        rescored(LESS),
        ComparisonError,
        r"4bit and 16bit answered different questions: law has 10 and 4 questions",
    ),
    "other subjects": (
        rescored({"anatomy": "1111111000"}),
        ComparisonError,
        r"answered different questions: subjects in only one of them: law",
    ),
    "limit": (
        rescored(LESS, n_total=20),
        ComparisonError,
        r"16bit answered only 14 of 20 questions of mmlu_qlora_5shot \(--limit or .*evaluation_res",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(pair: tuple[Path, Path], name: str) -> None:
    spoil, error, message = REFUSALS[name]
    spoil(pair[1])
    before = sorted(pair[0].parent.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        main(*pair)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert sorted(pair[0].parent.rglob("*")) == before


def test_fewer_than_two_runs_are_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ComparisonError, match="two or more runs, found none"):
        main()
    with pytest.raises(ComparisonError, match="two or more runs, found only .*4bit"):
        main(pair[0])
    with pytest.raises(ComparisonError, match="the run .*4bit is named twice"):
        main(pair[0], pair[0])


def test_folders_without_records_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="nowhere does not exist"):
        main(pair[0], tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ComparisonError, match=r"empty holds no training_summary.json, no eval"):
        main(pair[0], tmp_path / "empty")
    with pytest.raises(ComparisonError, match=r"results is not a run but holds 2: 16bit, 4bit"):
        main(pair[0], tmp_path / "results")
    foreign = harness(FIRST)
    foreign["results"] = {"arc_easy": {"acc,none": 0.5}}
    write(tmp_path / "arc" / "results_1.json", foreign)
    with pytest.raises(ComparisonError, match="holds no whole MMLU family .* only arc_easy"):
        main(pair[0], tmp_path / "arc")


def test_a_trained_run_and_a_scored_model_have_nothing_to_compare(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", summary()),
        write_run(tmp_path / "b", None, evaluation(FIRST)),
    ]
    with pytest.raises(ComparisonError, match="no numbers of the same sort"):
        compare(runs)


def test_different_data_can_be_allowed(pair: tuple[Path, Path]) -> None:
    in_summary("data/train/fingerprint", "sha256:" + "9" * 64)(pair[1])
    comparison = compare(pair, allow_different_data=True)
    assert comparison.notes == (
        "Different data (data.train.fingerprint: 4bit sha256:111111111111, 16bit "
        "sha256:999999999999): the training losses are not comparable.",
    )
    assert "evaluation loss" not in comparison.verdict[0]


def test_equal_limits_can_be_allowed(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        rescored(LESS, n_total=20)(folder)
    comparison = compare(pair, allow_limit=True)
    assert table(comparison, "mmlu").title == f"MMLU: {FAMILY}, 14 of 20 questions"
    assert any(
        note.startswith("Only 14 of 20 questions of mmlu_qlora_5shot were asked: this is not")
        for note in comparison.notes
    )


def test_different_limits_are_refused_even_so(pair: tuple[Path, Path]) -> None:
    rescored(LESS, n_total=20)(pair[0])
    with pytest.raises(ComparisonError, match="different limits: 4bit 14 of 20, 16bit 20 of 20"):
        compare(pair, allow_limit=True)
    rescored({"anatomy": "1111", "law": "1111111000"}, n_total=20)(pair[1])
    with pytest.raises(ComparisonError, match="anatomy has 10 and 4 questions"):
        compare(pair, allow_limit=True)


def test_unproven_questions_are_noted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_harness(tmp_path / "foreign", SECOND, samples=False)
    notes = compare([pair[0], tmp_path / "foreign"]).notes
    assert any("could be checked only by their number per subject" in note for note in notes)


# --- the command ---------------------------------------------------------------------------------


def test_command_writes_beside_the_runs(
    pair: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(*pair) == 0
    out = capsys.readouterr().out
    results = pair[0].parent
    assert f"Wrote {results / 'comparison.md'}" in out
    assert f"Wrote {results / 'comparison.json'}" in out
    # The tables fit 80 columns; only the paths of the files may be longer.
    tables_part = out[out.index("Training") : out.index("Wrote")]
    assert max(map(len, tables_part.splitlines())) <= 80
    record = json.loads((results / "comparison.json").read_text())
    assert (record["schema_version"], record["kind"], record["task"]) == (1, "comparison", FAMILY)
    assert [item["key"] for item in record["tables"]] == [
        "training",
        "mmlu",
        "paired",
        "categories",
        "subjects",
    ]
    row = record["tables"][0]["rows"][0]
    assert (row["key"], row["unit"]) == ("peak_gpu_gib", "GiB")
    assert row["cells"][1] == {
        "run": "16bit",
        "kind": "value",
        "value": 14.5,
        "stderr": None,
        "interval": None,
        "text": "14.50",
    }
    # The terminal, Markdown and JSON show the same cells.
    markdown = (results / "comparison.md").read_text()
    for shown in record["tables"]:
        for row in shown["rows"]:
            for cell in row["cells"]:
                assert cell["text"] in out or shown["key"] == "subjects"  # too long for it
                assert cell["text"] in markdown
    assert record["verdict"][0] in " ".join(out.split())
    # A second time it replaces its own files and nothing else.
    assert main(*pair) == 0


def test_json_follows_the_published_schema(pair: tuple[Path, Path], tmp_path: Path) -> None:
    import jsonschema

    path = Path(report.__file__).with_name("comparison.schema.json")
    schema = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    third = write_run(tmp_path / "results" / "fp4", summary(), evaluation(FIRST))
    for runs in (pair, [*pair, third]):
        record = json.loads(json.dumps(report.to_json(compare(runs))))
        jsonschema.validate(record, schema)
        del record["tables"][0]["rows"][0]["cells"][0]["run"]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(record, schema)


def test_command_writes_where_it_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["--markdown", tmp_path / "new" / "a.md", "--json", tmp_path / "new" / "a.json"]
    assert main(*pair, *words, "--labels", "NF4,bf16") == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.json", "a.md"]
    assert not (tmp_path / "results" / "comparison.md").exists()
    assert (tmp_path / "new" / "a.md").read_text().startswith("# Comparison of NF4, bf16\n")


def test_command_overwrites_nothing_foreign(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for flag, path in (
        ("--json", pair[0] / "training_summary.json"),
        ("--markdown", write(tmp_path / "README.md", "# Mine\n")),
        ("--markdown", tmp_path),
    ):
        with pytest.raises(SettingsError, match="exists and is not a comparison of ours"):
            main(*pair, flag, path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    with pytest.raises(SettingsError, match="--markdown and --json are both"):
        main(*pair, "--markdown", tmp_path / "a", "--json", tmp_path / "a")


def test_command_says_that_it_cannot_write(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write(tmp_path / "file", "")
    with pytest.raises(ResultsError, match="file/a.md can't be written: "):
        main(*pair, "--markdown", tmp_path / "file" / "a.md")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("a", "--labels a: 1 names for 2 runs"),
        ("a,a", "--labels a,a: a name is empty or there twice"),
        ("a,", "--labels a,: a name is empty"),
    ],
)
def test_labels_are_checked(pair: tuple[Path, Path], labels: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        main(*pair, "--labels", labels)


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["results/4bit", "results/16bit"], ["4bit", "16bit"]),
        (["a/4bit", "b/4bit"], ["a/4bit", "b/4bit"]),
        (["results/4bit", "out/gpt2/results_1.json"], ["4bit", "gpt2"]),
        (
            ["out/gpt2/results_1.json", "out/gpt2/results_2.json"],
            ["results_1.json", "results_2.json"],
        ),
    ],
)
def test_default_labels(paths: Sequence[str], labels: Sequence[str]) -> None:
    assert default_labels([Path(path) for path in paths]) == labels


def test_common_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.common_folder([Path("results/4bit"), Path("results/16bit")]) == Path("results")
    assert command.common_folder([Path("a"), Path("b")]) == Path()
    assert command.common_folder([Path("/a/b"), Path("/c/d")]) == Path()
    assert command.common_folder([Path("/a/b"), Path("/a/d")]) == Path("/a")


# --- Markdown and the terminal -------------------------------------------------------------------


def test_markdown_tables_are_whole(pair: tuple[Path, Path]) -> None:
    comparison = compare(pair, labels=["a|b", "*c*"])
    markdown = report.to_markdown(comparison)
    assert markdown.startswith("# Comparison of a\\|b, \\*c\\*\n")
    blocks = [block for block in markdown.split("\n\n") if block.startswith("|")]
    wanted = [*comparison.tables, *comparison.details, comparison.settings]
    assert len(blocks) == len(wanted) == 6
    for block, shown in zip(blocks, wanted, strict=True):
        head, align, *rows = [
            line.replace("\\|", "").strip("|").split("|") for line in block.splitlines()
        ]
        width = len(shown.columns) + 1
        assert len(head) == len(align) == width
        assert align[1:] == (["---:"] if shown.numeric else [":---"]) * (width - 1)
        assert [[cell.strip() for cell in row[1:]] for row in rows] == [
            [cell.text for cell in row.cells] for row in shown.rows
        ]


def test_a_wide_table_is_split_between_runs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    more = [
        write_run(tmp_path / "results" / f"run{index}", summary(), evaluation(FIRST))
        for index in range(3)
    ]
    shown = table(compare([*pair, *more]), "training")
    parts = list(report.split_table(shown, 80))
    assert [column.heading for column in parts[0].columns][:3] == [
        "4bit",
        "16bit",
        "Δ 16bit",
    ]
    assert all(part.columns[0].heading == "4bit" for part in parts)
    assert [column for part in parts for column in part.columns if column.run] == list(
        shown.columns[1:]
    )
    assert list(report.split_table(shown, 500)) == [shown]


def test_brackets_are_not_markup(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare(pair, labels=["[red]", "[/b]"])
    report.print_comparison(comparison, Console(highlight=False, width=120))
    assert "[/b], against [red]," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3599.5, "1:00:00"), (1e5, "27:46:40")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import pkgutil, sys, qlora_harness.compare as package\n"
        "for module in pkgutil.iter_modules(package.__path__, 'qlora_harness.compare.'):\n"
        "    __import__(module.name)\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

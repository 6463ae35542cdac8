"""`qlora-harness runs` and `show`: what they print, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare_runs import FAMILY, FIRST, GIB, changed, edit, evaluation, summary, write_run

from qlora_harness.cli import main
from qlora_harness.compare.column_widths import break_words, fit_columns


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "results" / "4bit", summary("nf4"), evaluation(FIRST))
    write_run(tmp_path / "results" / "16bit", summary("bf16", status="interrupted"))
    write_run(tmp_path / "results" / "base", None, evaluation(FIRST))
    return tmp_path / "results"


def printed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_each_run_is_a_line(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    head, *lines = printed(capsys)
    assert head == ["run", "model", "data", "base", "status", "GiB", "loss", "MMLU", "%"]
    assert [line[0] for line in lines] == ["16bit", "4bit", "base"]
    by_name = {line[0]: line for line in lines}
    assert by_name["4bit"][3:] == ["nf4", "completed", "6.50", "1.500", "60.00"]
    assert by_name["16bit"][4] == "interrupted"
    assert by_name["base"][4:] == ["scored", "–", "–", "60.00"]


def test_a_broken_record_does_not_hide_the_others(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "16bit" / "training_summary.json").write_text("{")
    assert main(["runs", str(results)]) == 0
    out = capsys.readouterr().out
    assert "4bit" in out
    assert "Not listed: " in out
    assert "16bit/training_summary.json" in out.replace("\n", "")


def test_random_weights_are_named(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(results / "4bit" / "training_summary.json", edit("model/random_weights", True))
    assert main(["runs"]) == 0
    assert "weights)" in capsys.readouterr().out


def test_show_prints_results_settings_and_accuracies(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "results/4bit"]) == 0
    lines = printed(capsys)
    assert ["peak", "memory,", "GiB", "6.50"] in lines
    assert ["eval", "loss", "1.5000"] in lines
    assert ["mmlu_qlora_5shot"] in lines
    assert ["questions", "20", "of", "20"] in lines
    assert any(line[:2] == ["STEM", "0.7000"] for line in lines)


def test_both_parts_of_the_memory_that_a_run_needs_are_shown(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = summary(memory__peak_managed_bytes=GIB, memory__peak_needed_bytes=7.5 * GIB)
    write_run(results / "4bit", record)
    assert main(["show", "results/4bit"]) == 0
    lines = printed(capsys)
    assert ["peak", "memory,", "GiB", "7.50"] in lines
    assert ["-", "allocated", "6.50"] in lines
    assert ["-", "managed,", "of", "a", "paged", "optimizer", "1.00"] in lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs", "nowhere"], "nowhere does not exist. Name the folder that holds the runs."),
        (["show", "results"], "results holds no training_summary.json or evaluation_results.json."),
        (["runs", "empty"], "empty holds no run (no training_summary.json or"),
    ],
)
def test_folders_without_runs_are_refused(
    results: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_long_cells_leave_every_column_its_words(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("16bit_seed1", "4bit_seed1"):
        write_run(
            results / name,
            summary(settings__dataset="oasst1_validation.jsonl", model__name="smollm2"),
            evaluation(FIRST, n_total=1710),
        )
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for word in ("16bit_seed1", "smollm2", "oasst1_validation.jsonl", "nf4", "completed"):
        assert word in out
    head, *lines = printed_lines(out)
    assert head.split() == ["run", "model", "data", "base", "status", "GiB", "loss", "MMLU", "%"]
    # The cell of the accuracy goes on in the next lines, at a space.
    (place,) = (i for i, line in enumerate(lines) if line.startswith("4bit_seed1"))
    cell = [line[head.index("MMLU") - 2 :].strip() for line in lines[place : place + 4]]
    assert " ".join(cell) == "60.00 (5shot, 20 of 1710)"


def printed_lines(out: str) -> list[str]:
    return [line.rstrip() for line in out.splitlines() if line.strip()]


@pytest.mark.parametrize("width", [40, 60, 200])
def test_a_list_fits_other_widths(
    results: Path,
    width: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    write_run(results / "part", summary(), evaluation(FIRST, n_total=1710))
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= max(width, 50)
    assert "4bit" in out


def test_columns_are_narrowed_in_stages() -> None:
    assert fit_columns([10, 20], [(5, 5)], 30) == [10, 20]
    assert fit_columns([10, 20], [(5, 5)], 24) == [10, 14]
    assert fit_columns([10, 20], [(10, 15), (5, 5)], 22) == [10, 12]
    assert fit_columns([10, 20], [(10, 15)], 9) == [10, 15]
    assert fit_columns([0, 3], [(0, 0)], 1) == [1, 1]


@pytest.mark.parametrize(
    ("text", "width", "broken"),
    [
        ("one two", 3, "one two"),
        ("results/4bit_seed1", 12, "results/\n4bit_seed1"),
        ("abcdefgh", 3, "abc\ndef\ngh"),
        ("  indented", 8, "  indented"),
    ],
)
def test_words_are_broken_only_where_they_must(text: str, width: int, broken: str) -> None:
    assert break_words(text, width) == broken


@pytest.mark.parametrize(
    ("file", "dotted", "value", "problem"),
    [
        ("training_summary", "results", [1], "results is a list, not an object"),
        ("training_summary", "settings", ["a"], "settings is a list, not an object"),
        ("training_summary", "runtime/train_seconds", float("nan"), "train_seconds is nan, not a"),
        ("training_summary", "runtime/train_seconds", -1, "train_seconds is -1.0, not a number of"),
        ("training_summary", "kind", "other", 'expected "kind": "training_summary", found'),
        ("training_summary", "schema_version", 99, "schema_version 99 is newer than this program"),
        ("evaluation_results", f"tasks/{FAMILY}/n", ..., f"tasks.{FAMILY}.n is missing"),
        ("evaluation_results", f"tasks/{FAMILY}", 3, f"tasks.{FAMILY} is a int, not an object"),
        ("evaluation_results", "kind", ..., 'expected "kind": "evaluation_results", found None'),
    ],
)
def test_broken_fields_are_one_line(
    results: Path,
    file: str,
    dotted: str,
    value: object,
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed(results / "4bit" / f"{file}.json", edit(dotted, value))
    assert main(["show", "results/4bit"]) == 2
    shown = capsys.readouterr()
    assert problem in shown.err
    assert (shown.out, len(shown.err.splitlines())) == ("", 1)
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    if "train_seconds" not in dotted:  # not in the list
        assert "Not listed: results/4bit/" in out
        assert [line.split()[0] for line in out.splitlines()[1:3]] == ["16bit", "base"]

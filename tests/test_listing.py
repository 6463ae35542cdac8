"""`qlora-harness runs` and `show`: what they print, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare_runs import FIRST, changed, edit, evaluation, summary, write_run

from qlora_harness.cli import main


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

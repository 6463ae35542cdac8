"""What runs are compared on, and every setting in which they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from compare_runs import (
    FAMILY,
    FIRST,
    LESS,
    SECOND,
    changed,
    edit,
    evaluation,
    in_summary,
    main,
    rescored,
    summary,
    table,
    write_harness,
    write_run,
)

from qlora_harness.compare.comparison import compare
from qlora_harness.compare.report import Comparison
from qlora_harness.errors import ComparisonError, ResultsError


def test_every_setting_that_differs_is_listed(pair: tuple[Path, Path]) -> None:
    write_run(
        pair[1], summary("bf16", settings__max_steps=40, environment__versions={"torch": "2.11.0"})
    )
    changed(pair[1] / "evaluation_results.json", edit("settings/batch_size", 16))
    changed(pair[0] / "evaluation_results.json", edit("model/verify", 16))
    comparison = compare(pair)
    assert {row.key: [cell.text for cell in row.cells] for row in comparison.settings.rows} == {
        # Once, although the records say it three times; and not the arm's name, which follows, nor
        # that some texts were scored twice.
        "training.quant": ["nf4", "bf16"],
        "training.quantization.double_quant": ["true", "false"],
        "training.settings.max_steps": ["20", "40"],
        "training.environment.versions.torch": ["2.13.0", "2.11.0"],
        "evaluation.settings.batch_size": ["8", "16"],
    }
    # The three left out above are neither listed nor the same.
    same = sum(value is not None for value in _same_conditions(pair, comparison))
    assert len(comparison.shared.rows) == same - 3


def _same_conditions(pair: tuple[Path, Path], comparison: Comparison) -> list[object]:
    from qlora_harness.compare.runs import load_run

    run = load_run(pair[0], "a")
    assert run.training is not None
    different = {row.key for row in comparison.settings.rows}
    conditions = {**run.training.conditions, **run.evaluations[FAMILY].conditions}
    assert "training.environment.command" not in conditions
    return [value for key, value in conditions.items() if key not in different]


def test_a_setting_that_json_cannot_hold_is_refused(pair: tuple[Path, Path]) -> None:
    write_run(pair[0], summary(settings__learning_rate=math.nan))
    with pytest.raises(ResultsError, match=r"settings\.learning_rate is nan"):
        main(*pair)


def test_a_family_has_the_settings_of_its_own_time(pair: tuple[Path, Path]) -> None:
    own = {"batch_size": 4, "dtype": "bfloat16", "max_length": 2048}
    changed(pair[1] / "evaluation_results.json", edit(f"tasks/{FAMILY}/settings", own))
    rows = {row.key: [cell.value for cell in row.cells] for row in compare(pair).settings.rows}
    assert rows["evaluation.settings.batch_size"] == [8, 4]


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


def test_settings_that_are_lists_may_differ(pair: tuple[Path, Path]) -> None:
    languages = (["en"], ["de", "en"])
    for folder, value in zip(pair, languages, strict=True):
        in_summary("settings/languages", value)(folder)
        in_summary("data/languages", value)(folder)  # said again: listed once
        in_summary("settings/stages", [{"steps": len(value)}, value])(folder)
    comparison = compare(pair)
    shown = {row.key: [cell.text for cell in row.cells] for row in comparison.settings.rows}
    assert shown == {
        "training.quant": ["nf4", "bf16"],
        "training.quantization.double_quant": ["true", "false"],
        "training.settings.languages": ['["en"]', '["de", "en"]'],
        "training.settings.stages": ['[{"steps": 1}, ["en"]]', '[{"steps": 2}, ["de", "en"]]'],
    }

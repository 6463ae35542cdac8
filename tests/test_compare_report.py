"""One comparison as JSON, as Markdown and in the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compare_runs import FIRST, evaluation, summary, table, write_run
from rich.console import Console

from qlora_harness.compare import report
from qlora_harness.compare.comparison import compare


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

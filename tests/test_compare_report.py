"""One comparison as JSON, as Markdown and in the terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from compare_runs import FIRST, evaluation, four, main, summary, table, texts, write_run
from rich.console import Console

from qlora_harness.compare import report
from qlora_harness.compare.comparison import compare
from qlora_harness.compare.tables.number_text import decimals, signed


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


def printed(runs: list[Path], capsys: pytest.CaptureFixture[str], width: int = 80) -> list[str]:
    report.print_comparison(compare(runs), Console(highlight=False, width=width))
    return capsys.readouterr().out.splitlines()


def named(folder: Path, names: list[str]) -> list[Path]:
    memory = summary()["memory"] | {"peak_device_used_bytes": 20 * 2**30}
    return [
        write_run(folder / name, summary(settings__seed=seed, memory=memory), evaluation(FIRST))
        for seed, name in enumerate(names)
    ]


def test_words_of_headings_stay_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(named(tmp_path, ["4bit", "4bit_seed1", "16bit_seed12"]), capsys)
    tables = lines[lines.index("Training") :]
    assert max(map(len, tables)) <= 80
    words = {word for line in tables[: tables.index("Notes")] for word in line.split()}
    assert {"4bit_seed1", "16bit_seed12", "Throughput", "(GiB)", "processes"} <= words
    assert not {"4bit_seed", "16bit_seed1", "16bit_see"} & words
    (head,) = (i for i, line in enumerate(tables) if "4bit_seed1   4bit_seed1" in line)
    assert tables[head].split() == ["4bit", "4bit_seed1", "4bit_seed1", "×"]


def test_runs_that_were_not_trained_have_no_training_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = four(tmp_path)
    lines = printed([runs[2], runs[0], runs[1], runs[3]], capsys, width=60)
    starts = [i for i, line in enumerate(lines) if line == "Training"]
    assert len(starts) == 1
    part = lines[starts[0] : lines.index("", starts[0])]
    assert "nf4_tuned" in " ".join(part)
    assert "Δ bf16 " not in " ".join(part)
    shown = table(compare([runs[2], runs[0], runs[3]]), "training")
    (kept,) = report.split_table(shown, 500)
    assert {column.run for column in kept.columns} == {0, 2}


def test_rows_that_belong_to_another_are_indented_everywhere(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ["--html", tmp_path / "a.html", "--latex", tmp_path / "a.tex"]
    assert main(*pair, *flags) == 0
    markdown = (pair[0].parent / "comparison.md").read_text()
    assert "| &emsp;95% interval, bootstrap |" in markdown
    assert "\n| Difference, paired (points) |" in markdown
    latex = (tmp_path / "a.tex").read_text()
    assert "\n\\quad 95\\% interval, bootstrap & " in latex
    page = (tmp_path / "a.html").read_text()
    assert '<td class="under">  95% interval, bootstrap</td>' in page
    assert "<td>Difference, paired (points)</td>" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.004, "0.00"), (-0.004, "0.00"), (0.006, "+0.01"), (-1.5, "−1.50")],
)
def test_what_is_written_as_zero_has_no_sign(value: float, text: str) -> None:
    assert signed(value, decimals(2)) == text
    assert decimals(2)(value) == text.replace("+", "")


def test_a_time_that_is_written_as_zero_has_no_sign(pair: tuple[Path, Path]) -> None:
    write_run(pair[1], summary("bf16", runtime__train_seconds=4999.9))
    assert texts(compare(pair), "training", "train_seconds")[2] == "0:00:00"


def test_the_terminal_shows_the_total_of_the_common_questions(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = table(compare(pair, intersect=True), "common")
    rows = tuple(replace(shown.rows[0], key=f"common.{i}", name=f"task{i}") for i in range(3))
    comparison = compare(pair, intersect=True)
    tables = (replace(shown, rows=(shown.rows[0], *rows)),)
    longer = replace(comparison, tables=tables, details=())
    report.print_comparison(longer, Console(highlight=False, width=80))
    out = capsys.readouterr().out
    assert "All tasks" in out
    assert "task0" not in out
    assert "(3 more rows, by task, in the files)" in out
    assert "task2" in report.to_markdown(longer)

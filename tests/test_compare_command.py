"""The commands and the Python interface: what they print, write and return."""

# Endpoints without a value are None, on which arithmetic fails a test as it should.
# mypy: disable-error-code="operator,union-attr"
from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from compare_runs import (
    FAMILY,
    FIRST,
    changed,
    edit,
    evaluation,
    main,
    summary,
    write,
    write_run,
)

import qlora_harness as qh
from qlora_harness import cli
from qlora_harness.compare import page, text
from qlora_harness.compare.checks import differing
from qlora_harness.errors import SettingsError
from qlora_harness.results.runs import default_labels

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published" / "smollm2"
SEEDS = [f"{arm}{seed}" for seed in ("", "_seed1", "_seed2") for arm in ("4bit", "16bit")]
BASES = ["base_4bit", "base_16bit"]


@pytest.fixture(scope="module")
def published() -> qh.Comparison:
    if not PUBLISHED.is_dir():
        pytest.skip("results/published is not part of this copy")
    return qh.compare([PUBLISHED / name for name in (*SEEDS, *BASES)])


def test_answer_first_in_twelve_lines_and_one_for_another_task(published: qh.Comparison) -> None:
    two = qh.compare([PUBLISHED / "4bit", str(PUBLISHED / "16bit")])
    for comparison in (two, published):
        lines = str(comparison).splitlines()
        assert comparison.benchmarks == ["mmlu_qlora_5shot_val"]
        assert len(lines) <= 12 + 1
        assert max(map(len, lines)) <= 80
        assert [re.split(r"  +", line)[0] for line in lines[2:7]] == [
            "peak memory", "train time", "eval loss", "accuracy", "NLL",
        ]  # fmt: skip
        assert lines[1].split() == ["NF4", "bf16", "difference", "95%", "interval"]
    assert text.differences_line(published).startswith("Nothing recorded differs besides")


def test_of_ten_arms_five_have_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for rank in range(10):
        folder = tmp_path / f"run{rank}"
        write_run(
            folder, summary("nf4" if rank else "bf16", settings__lora_r=rank), evaluation(FIRST)
        )
        runs.append(folder)
    main(*runs)
    lines = capsys.readouterr().out.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("Besides quantisation"))
    assert end <= 12
    assert max(map(len, lines[:end])) <= 80
    assert sum(line.startswith("NF4 r ") for line in lines) == 5
    assert "… and 4 more arms" in lines


def test_numbers_of_the_published_runs(published: qh.Comparison) -> None:
    """Those that an independent statistician computed from the same records."""
    item = published.contrasts[0]
    seeds = qh.compare([PUBLISHED / name for name in ("4bit", "16bit")]).contrasts[0]
    assert 100 * seeds["accuracy"].difference == pytest.approx(0.61, abs=0.005)
    assert 100 * seeds["accuracy"].stderr == pytest.approx(0.25, abs=0.005)
    assert item["nll"].difference == pytest.approx(0.097, abs=0.0005)
    assert item["nll"].clustered_stderr == pytest.approx(0.013, abs=0.0005)
    assert item["brier"].difference == pytest.approx(0.056, abs=0.0005)
    assert seeds.detail.calibration == pytest.approx((0.235, 0.142), abs=0.0005)
    assert 100 * seeds.detail.flips == pytest.approx(24.4, abs=0.05)
    bases = published.contrasts[1]
    assert 100 * bases["letter_centred"].difference == pytest.approx(-1.36, abs=0.005)
    centred = {one.arm: 100 * one.centred for one in published.chance}
    assert centred["bf16 base"] == pytest.approx(1.55, abs=0.005)
    assert centred["NF4 base"] == pytest.approx(0.18, abs=0.005)


def test_files_hold_everything(pair: tuple[Path, Path]) -> None:
    main(*pair)
    folder = pair[0].parent
    record = json.loads((folder / "comparison.json").read_text())
    assert (record["kind"], record["task"]) == ("comparison", FAMILY)
    endpoint = record["contrasts"][0]["endpoints"]["accuracy"]
    # Right in the first only 3 + 2, in the second only 1 + 2, of 20.
    assert endpoint["difference"] == pytest.approx((5 - 3) / 20)
    detail = record["contrasts"][0]["detail"]
    assert (detail["won"], detail["lost"]) == (5, 3)
    markdown = (folder / "comparison.md").read_text()
    assert markdown.startswith(text.MARKDOWN_TITLE)
    for name in ("Runs", "NF4 against bf16", "Settings that differ", "Settings that agree"):
        assert f"\n## {name}\n" in markdown
    schema = qh.Comparison.model_json_schema()
    jsonschema.validate(record, schema)


@pytest.mark.parametrize("kind", cli._SCHEMAS)
def test_schemas_are_printed_and_hold(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", kind]) == 0
    schema = json.loads(capsys.readouterr().out)
    for path in PUBLISHED.glob(f"4bit/{kind}*.json"):
        record = json.loads(path.read_text())
        if isinstance(record.get("environment", {}).get("device"), str):
            continue  # of an earlier version
        jsonschema.validate(record, schema)
    assert all("description" in field for field in schema["properties"].values())


def test_command_writes_where_it_is_told_and_over_nothing_foreign(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    new = tmp_path / "new"
    words = ["--markdown", new / "a.md", "--json", new / "a.json", "--html", new / "a.html"]
    for _ in range(2):  # a second time it replaces its own
        main(*pair, *words)
    assert sorted(path.name for path in new.iterdir()) == ["a.html", "a.json", "a.md"]
    mine = write(tmp_path / "README.md", "# Mine\n")
    for flag, path in (
        ("--json", pair[0] / "training_summary.json"),
        ("--markdown", mine),
        ("--html", mine),
    ):
        with pytest.raises(SettingsError, match="was not written by qlora-harness compare"):
            main(*pair, flag, path)
    assert mine.read_text() == "# Mine\n"
    with pytest.raises(SettingsError, match="--markdown and --json are both"):
        main(*pair, "--markdown", tmp_path / "a", "--json", tmp_path / "a")
    with pytest.raises(SettingsError, match=r"README\.md is a file"):
        main(*pair, "--markdown", mine / "a.md")
    with pytest.raises(SettingsError, match="is a folder"):
        main(*pair, "--markdown", tmp_path)


@pytest.mark.parametrize("words", [["compare"], ["runs"]])
def test_a_reader_may_close_the_pipe(pair: tuple[Path, Path], words: list[str]) -> None:
    paths = {"compare": list(pair), "runs": [pair[0].parent]}[words[0]]
    code = "import sys; from qlora_harness.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, *map(str, paths)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()  # before the first line
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")


def test_names_and_texts_of_records_are_only_texts(pair: tuple[Path, Path]) -> None:
    evil = "<script>x | `a` \x1b[2J [b](c)"
    pair = (pair[0].rename(pair[0].with_name(evil)), pair[1])
    changed(pair[0] / "training_summary.json", edit("model/name", evil))
    html = pair[0].parent / "page.html"
    main(*pair, "--html", html)
    markdown = (pair[0].parent / "comparison.md").read_text()
    outside = markdown.split("```")[2]
    assert "\x1b" not in markdown
    assert "<script>x" not in outside.replace("\\<", "")
    body = html.read_text().split("</head>")[1]
    assert "<script>x" not in body
    assert "&lt;script&gt;x" in body


def test_page_shows_headlines_then_figures_and_folds_tables(published: qh.Comparison) -> None:
    html = page.to_html(published)
    body = html.split("</head>")[1]
    assert [tile.name for tile in page.tiles(published)] == [
        "Peak memory", "Train time", "Eval loss", "Accuracy", "mmlu_qlora_5shot_val acc",
    ]  # fmt: skip
    assert published.verdict.split(".")[0] in body
    assert body.index('class="tiles"') < body.index("plotly-graph-div") < body.index("<table")
    assert body.count('role="img" aria-label="') == body.count('class="plotly-graph-div"') == 8
    assert 'src="http' not in html
    assert '<link rel="stylesheet' not in html
    notebook = published._repr_html_()
    assert notebook.count('class="tile"') == 5
    assert published.verdict[:40] in notebook
    assert "plotly" not in notebook


def test_python_interface(published: qh.Comparison) -> None:
    assert set(qh.__all__) <= set(dir(qh))
    for name in qh.__all__:
        assert getattr(qh, name).__doc__
    frame = published.to_frame()
    assert {"contrast", "key", "difference", "low", "high", "word"} <= set(frame.columns)
    assert len(published.answers()) == 8 * 14_042
    assert [path.name for path in qh.runs(PUBLISHED)] == sorted([*SEEDS, *BASES])
    with pytest.raises(AttributeError, match="no attribute 'x'"):
        qh.x  # noqa: B018


@pytest.mark.parametrize(
    "module", ["qlora_harness", "qlora_harness.compare.comparison", "qlora_harness.results.runs"]
)
def test_examples_of_docstrings(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not PUBLISHED.is_dir():
        pytest.skip("results/published is not part of this copy")
    monkeypatch.chdir(ROOT)
    outcome = doctest.testmod(import_module(module))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_labels_are_the_shortest_that_differ() -> None:
    paths = [Path("/a/x/4bit"), Path("/a/y/4bit"), Path("/a/y/16bit")]
    assert default_labels(paths) == ["x/4bit", "y/4bit", "y/16bit"]
    assert default_labels([Path("/a/b/results_1.json"), Path("/a/c/results_1.json")]) == ["b", "c"]


def test_settings_that_differ_without_what_follows(pair: tuple[Path, Path]) -> None:
    changed(pair[1] / "training_summary.json", edit("settings/learning_rate", 1e-4))
    changed(pair[1] / "training_summary.json", edit("settings/output_dir", "elsewhere"))
    runs = [qh.load_run(path) for path in pair]
    different, same = differing(runs, FAMILY)
    names = {setting.name: setting.values for setting in different}
    assert names["training.settings.learning_rate"] == [2e-4, 1e-4]
    assert names["training.quant"] == ["nf4", "bf16"]
    following = {"training.arm", "training.settings.output_dir", "training.quantization.quant"}
    assert not following & names.keys()
    assert "training.settings.dataset" in {setting.name for setting in same}
    assert qh.compare(pair).besides == ["learning_rate"]


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
    assert cli.main(["runs"]) == 0
    head, *lines = printed(capsys)
    assert head == ["run", "model", "data", "quant", "status", "GiB", "loss", "MMLU", "%"]
    assert [line[0] for line in lines] == ["16bit", "4bit", "base"]
    by_name = {line[0]: line for line in lines}
    assert by_name["4bit"][3:] == ["nf4", "completed", "6.50", "1.500", "60.00"]
    assert by_name["16bit"][4] == "interrupted"
    assert by_name["base"][4:] == ["scored", "–", "–", "60.00"]
    (results / "16bit" / "training_summary.json").write_text("{")
    assert cli.main(["runs", str(results)]) == 0
    out = capsys.readouterr().out
    assert "4bit" in out
    assert "Not listed: " in out


def test_plan_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan-study", "--margin", "1", "--discordance", "0.1"]) == 0
    rows: Any = [line for line in printed(capsys) if line[0].isdecimal()]
    assert [row[0] for row in rows] == ["1", "2", "3", "5", "10"]
    # (1.6449 + 1.2816)² 0.1 / 0.01² and (1.9600 + 0.8416)² 0.1 / 0.01², a little more by Student.
    assert rows[0][1:] == ["8,565", "7,851"]
    assert cli.main(["plan-study", "--discordance", "0"]) == 2

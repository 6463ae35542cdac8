"""The command: its flags, the files it writes, and the names of the runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from compare_runs import FAMILY, main, write

from qlora_harness.compare import command
from qlora_harness.compare.comparison import default_labels
from qlora_harness.errors import ResultsError, SettingsError


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


@pytest.mark.parametrize("words", [["compare"], ["runs"], ["show"]])
def test_a_reader_may_close_the_pipe(pair: tuple[Path, Path], words: list[str]) -> None:
    results = pair[0].parent
    paths = {"compare": list(pair), "runs": [results], "show": [pair[0]]}[words[0]]
    code = "import sys; from qlora_harness.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, *map(str, paths)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()  # before the first line: whatever is printed meets a closed pipe
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    if words == ["compare"]:
        assert sorted(path.name for path in results.glob("comparison.*")) == [
            "comparison.json",
            "comparison.md",
        ]


def test_comparisons_of_the_results_folder_are_not_in_git() -> None:
    ignored = Path(__file__).parent.parent.joinpath(".gitignore").read_text().splitlines()
    assert {"results/**/comparison.md", "results/**/comparison.json"} <= set(ignored)


def test_command_says_that_it_cannot_write(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write(tmp_path / "file", "")
    with pytest.raises(ResultsError, match="file/a.md can't be written: "):
        main(*pair, "--markdown", tmp_path / "file" / "a.md")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--margin", "0"], "--margin 0. Give percentage points, above 0 and below 100."),
        (["--margin", "150"], "--margin 150. Give percentage points, above 0 and below 100."),
        (["--draws", "10"], "--draws 10 --seed 0. Draw 100 samples or more, from a seed >= 0."),
    ],
)
def test_flags_of_the_statistics_are_checked(
    pair: tuple[Path, Path], flags: list[str], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        main(*pair, *flags)
    assert str(caught.value) == message


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


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import pkgutil, sys, qlora_harness.compare as package\n"
        "for module in pkgutil.walk_packages(package.__path__, 'qlora_harness.compare.'):\n"
        "    __import__(module.name)\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_of_any_bytes_can_be_compared(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    strange = pair[0].rename(pair[0].with_name("4bit\udcff\x1b[31m"))
    files = [pair[0].parent / name for name in ("a.md", "a.json", "a.csv", "a.tex")]
    flags = zip(("--markdown", "--json", "--csv", "--latex"), files, strict=True)
    assert main(strange, pair[1], *(word for flag in flags for word in flag)) == 0
    for text in (capsys.readouterr().out, *(path.read_text(encoding="utf-8") for path in files)):
        assert "4bit" in text
        assert all(character.isprintable() or character == "\n" for character in text)

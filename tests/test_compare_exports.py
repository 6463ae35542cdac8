"""CSV, LaTeX and pictures hold what the comparison says, and overwrite nothing foreign."""

from __future__ import annotations

import csv
import shutil
import struct
from pathlib import Path

import pytest
from compare_runs import main, write

from qlora_harness.compare.comparison import compare
from qlora_harness.errors import SettingsError

BROWSER = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))


def test_csv_has_a_line_for_every_cell(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert main(*pair, "--csv", tmp_path / "cells.csv") == 0
    comparison = compare(pair)
    with (tmp_path / "cells.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    tables = [*comparison.tables, *comparison.details, comparison.settings]
    assert len(lines) == sum(len(t.columns) * len(t.rows) for t in tables)
    (difference,) = (line for line in lines if line["row"] == "difference")
    assert (float(difference["value"]), difference["low"]) == (-10.0, "")
    (memory,) = (
        line
        for line in lines
        if (line["row"], line["run"], line["kind"]) == ("peak_gpu_gib", "16bit", "value")
    )
    assert (memory["value"], memory["unit"], memory["text"]) == ("14.5", "GiB", "14.50")


def test_latex_escapes_and_balances(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert main(*pair, "--labels", "a_b,50%&c", "--latex", tmp_path / "tables.tex") == 0
    text = (tmp_path / "tables.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 4
    assert r" & a\_b & 50\%\&c & difference & ratio \\" in text
    assert r"$-$10.00 $\pm$ 13.96" in text
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert not any(sign in line for line in body for sign in "−±×–")


@pytest.mark.skipif(not BROWSER, reason="no Chrome or Chromium on this machine")
def test_pictures_are_drawn(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert main(*pair, "--png", tmp_path / "pictures") == 0
    assert main(*pair, "--png", tmp_path / "pictures") == 0  # its own are replaced
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [
        "accuracy-by-category-95-intervals.png",
        "accuracy-by-subject.png",
        "peak-memory-and-training-time.png",
        "training-loss.png",
    ]
    data = (tmp_path / "pictures" / names[0]).read_bytes()
    assert struct.unpack(">I", data[16:20])[0] == 1800


@pytest.mark.parametrize("flag", ["--csv", "--latex"])
def test_foreign_files_are_kept(pair: tuple[Path, Path], tmp_path: Path, flag: str) -> None:
    other = write(tmp_path / "mine", "mine")
    with pytest.raises(SettingsError, match="exists and is not a comparison of ours"):
        main(*pair, flag, other)
    assert other.read_text() == "mine"


def test_folder_with_other_things_is_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write(tmp_path / "thesis" / "chapter.tex", "mine")
    with pytest.raises(SettingsError, match=r"holds something else \(chapter.tex\)"):
        main(*pair, "--png", tmp_path / "thesis")


def test_pictures_never_take_the_place_of_other_outputs(
    pair: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(SettingsError, match="is replaced as a whole, and index.html would lie in"):
        main(*pair, "--png", tmp_path / "out", "--html", tmp_path / "out" / "index.html")
    write(tmp_path / "photos" / "mine.png", "mine")
    with pytest.raises(SettingsError, match=r"holds something else \(mine.png\)"):
        main(*pair, "--png", tmp_path / "photos")


def test_outputs_must_differ(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is another output, too"):
        main(*pair, "--csv", tmp_path / "a", "--latex", tmp_path / "a")

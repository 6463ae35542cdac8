"""The page: what it says is what the JSON says, and a browser shows it without the network."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from compare_runs import changed, edit, four, main, step_log, summary, write, write_run

from qlora_harness.compare.comparison import compare
from qlora_harness.compare.figures import COLOURS, figures, smooth
from qlora_harness.errors import SettingsError

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Cells(HTMLParser):
    """Collects the texts of table cells by table and row, and every address the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[str, str], list[str]] = {}
        self.loaded: list[str] = []
        self._table = self._row = ""
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loaded += [str(found[name]) for name in ("src", "href") if name in found]
        if tag == "table":
            self._table = str(found.get("id"))
        if tag == "tr":
            self._row = str(found.get("data-key"))
            self.rows.setdefault((self._table, self._row), [])
        if tag == "td":
            self._in_cell = True
            self.rows[self._table, self._row].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[self._table, self._row][-1] += data


@pytest.fixture
def page(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    for folder, start in zip(pair, (2.0, 1.9), strict=True):
        losses = [start - 0.01 * i for i in range(1, 21)]
        write(folder / "training_logs.json", step_log(losses))
    for folder in pair:
        for path in folder.glob("gpt2/samples_*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in rows:
                row["doc"] = {"input": "Shots.\n\nWhat is <b>this</b>?\nA. x\nB. y\nAnswer:"}
            path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert main(*pair, "--html", tmp_path / "report.html") == 0
    return tmp_path / "report.html"


def parsed(path: Path) -> Cells:
    cells = Cells()
    cells.feed(path.read_text(encoding="utf-8"))
    return cells


def test_numbers_are_those_of_the_json(page: Path, pair: tuple[Path, Path]) -> None:
    cells = parsed(page)
    record = json.loads((pair[0].parent / "comparison.json").read_text())
    for table in [*record["tables"], record["settings_that_differ"]]:
        for row in table["rows"]:
            shown = cells.rows[f"table-{table['key']}", row["key"]]
            assert shown == [row["name"], *(cell["text"] for cell in row["cells"])]
    assert record["verdict"][0] in page.read_text()


def test_settings_and_environment_that_agree_are_there(page: Path, pair: tuple[Path, Path]) -> None:
    rows = parsed(page).rows
    agreed = compare(pair).shared.rows
    assert {row.key: row.cells[0].text for row in agreed} == {
        key: shown[-1]
        for (name, key), shown in rows.items()
        if name in ("table-shared", "table-environment") and shown
    }
    assert rows["table-shared", "training.settings.max_steps"][-1] == "20"
    assert rows["table-environment", "evaluation.environment.versions.lm_eval"][-1] == "0.4.13"
    assert ("table-environment", "training.settings.max_steps") not in rows


def test_nothing_is_loaded(page: Path) -> None:
    assert [address for address in parsed(page).loaded if address != "data:,"] == []


def test_changed_answers_stand_there_with_their_text(page: Path) -> None:
    rows = parsed(page).rows["table-flips", "None"]
    assert len(rows) == 7 * 8  # five became wrong, three right
    assert rows[:6] == ["16bit", "anatomy", "4", "wrong", "A → A", "A"]
    assert rows[6] == "What is <b>this</b>?\nA. x\nB. y"  # shown as text, not as markup


def test_figures_hold_the_values(page: Path) -> None:
    text = page.read_text()
    for number in range(4):
        assert text.count(f'id="figure-{number}"') == 1
    assert "Training loss" in text
    assert "Accuracy by subject" in text


def test_a_run_has_one_colour_in_every_figure(tmp_path: Path) -> None:
    runs = four(tmp_path)  # of which the last two are trained
    drawn = dict(figures(compare(runs).evidence))
    wanted = {path.name: COLOURS[place] for place, path in enumerate(runs)}
    (bars, *_) = drawn["Peak memory and training time"].data
    assert dict(zip(bars.y, bars.marker.color, strict=True)) == {
        name: wanted[name] for name in ("bf16_tuned", "nf4_tuned")
    }
    curves = [trace for trace in drawn["Training loss"].data if trace.name]
    assert {trace.name: trace.line.color for trace in curves} == {
        name: wanted[name] for name in ("bf16_tuned", "nf4_tuned")
    }
    for heading in ("Accuracy by category, 95% intervals", "Accuracy by subject"):
        named = [trace for trace in drawn[heading].data if trace.name]
        assert {trace.name: trace.marker.color for trace in named} == wanted


@pytest.mark.parametrize(
    ("seconds", "title", "shown"),
    [(3599.0, "Training time, minutes", "59.98"), (7200.0, "Training time, hours", "2.00")],
)
def test_short_times_are_shown_in_minutes(
    tmp_path: Path, seconds: float, title: str, shown: str
) -> None:
    runs = [
        write_run(tmp_path / name, summary(runtime__train_seconds=each))
        for name, each in (("a", seconds), ("b", 1800.0))
    ]
    figure = dict(figures(compare(runs).evidence))["Peak memory and training time"]
    assert figure.layout.annotations[1].text == title
    assert figure.data[1].text[0] == shown


def test_titles_and_names_of_rows(tmp_path: Path) -> None:
    runs = four(tmp_path)
    assert main(*runs, "--html", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    assert "<title>bf16, nf4, bf16_tuned and nf4_tuned: comparison</title>" in text
    # A wide table is moved sideways under the names of its rows.
    assert ".wide td:first-child, .wide thead th:first-child { position: sticky; left: 0;" in text


def test_smoothing_has_no_bias_at_its_start() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    # 0.9 * 0.1 * 1 + 0.1 * 2, over 0.9 * 0.1 + 0.1.
    assert smooth([1.0, 2.0])[1] == pytest.approx((0.09 * 1 + 0.1 * 2) / 0.19)


def test_foreign_files_are_not_overwritten(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write(tmp_path / "mine.html", "<p>mine</p>")
    with pytest.raises(SettingsError, match="exists and is not a comparison of ours"):
        main(*pair, "--html", other)
    assert other.read_text() == "<p>mine</p>"


def test_page_is_replaced_by_its_successor(page: Path, pair: tuple[Path, Path]) -> None:
    changed(pair[0] / "training_summary.json", edit("runtime/train_seconds", 1.0))
    before = page.read_text()
    assert main(*pair, "--html", page) == 0
    assert page.read_text() != before


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("size", ["1280,2000", "390,2000"])
def test_browser_shows_every_figure_without_an_error(page: Path, tmp_path: Path, size: str) -> None:
    words: list[Any] = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    words += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}"]
    words += ["--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count('class="plot-container') == 4
    assert done.stdout.count('class="main-svg"') >= 4

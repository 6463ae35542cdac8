"""The comparison as one HTML page with figures, which needs no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora_harness.compare.numbers import difference, interval, value, word
from qlora_harness.compare.record import ComparisonRecord, Contrast
from qlora_harness.compare.tables import tables
from qlora_harness.compare.text import differences_line, title
from qlora_harness.compare.verdict import verdict
from qlora_harness.errors import SettingsError
from qlora_harness.results.answers import questions_of
from qlora_harness.schema.mmlu import LETTERS
from qlora_harness.units import NOTHING

_FLIPS = 200  # shown on the page
_TILES = ("memory", "time", "eval_loss", "accuracy")
# No Plotly logo and no selection tools: nothing here reacts to a selection.
_BUTTONS = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
}


class Tile(NamedTuple):
    """One headline: a quantity, its difference, its values with the interval, and a word."""

    name: str
    difference: str
    values: str
    word: str
    kind: str


class Flip(NamedTuple):
    """A question that one arm got right and the other wrong, first runs."""

    subject: str
    item: str
    better: bool
    letters: str
    answer: str
    question: str


def check_packages() -> None:
    """Raises SettingsError if Plotly is missing, before anything is computed."""
    if find_spec("plotly") is None:
        raise SettingsError("--html needs plotly", "pip install 'qlora-harness[reports]'")


def tiles(comparison: ComparisonRecord) -> list[Tile]:
    """Returns the headlines of the leading contrast."""
    shown = []
    for key in _TILES if comparison.primary else ():
        endpoint = comparison.primary[0].endpoints.get(key)
        if endpoint is None:
            continue
        sizes = f"{value(endpoint, endpoint.arm)} vs {value(endpoint, endpoint.baseline)}"
        if endpoint.arm is None:
            sizes = endpoint.reason or ""
        ends = interval(endpoint)
        shown.append(
            Tile(
                endpoint.name.capitalize(),
                difference(endpoint),
                f"{ends} · {sizes}" if ends else sizes,
                word(endpoint),
                "unclear" if endpoint.letters else endpoint.word.split()[0],
            )
        )
    return shown


def flips(comparison: ComparisonRecord) -> tuple[int, list[Flip]]:
    """Returns how many questions only one arm of the leading contrast got right, and the first."""
    item = comparison.primary[0] if comparison.primary else None
    labels = [] if item is None else _first_runs(comparison, item)
    if item is None or len(labels) < 2:
        return 0, []
    one, two = (comparison.source.frames[label] for label in labels)
    change = one["score"].to_numpy() - two["score"].to_numpy()
    if not set(np.unique(change)) <= {-1.0, 0.0, 1.0}:
        return 0, []  # neither right nor wrong
    change = -change if item["accuracy"].lower_is_better else change
    rows = np.flatnonzero(change)
    texts = _texts(comparison, labels, set(one["prompt"].iloc[rows[:_FLIPS]]))

    def letter(position: int) -> str:
        return LETTERS[position] if 0 <= position < len(LETTERS) else NOTHING

    shown = [
        Flip(
            str(one["subject"].iloc[row]).replace("_", " "),
            str(one["item"].iloc[row]),
            bool(change[row] > 0),
            f"{letter(two['choice'].iloc[row])} → {letter(one['choice'].iloc[row])}",
            letter(one["answer"].iloc[row]),
            texts.get(one["prompt"].iloc[row], ""),
        )
        for row in rows[:_FLIPS]
    ]
    return len(rows), shown


def _first_runs(comparison: ComparisonRecord, item: Contrast) -> list[str]:
    """Labels of the first runs of arm and baseline whose answers are known."""
    frames, labels = comparison.source.frames, []
    for arm in (item.arm, item.baseline):
        labels += [r.label for r in comparison.runs if r.arm == arm and r.label in frames][:1]
    return labels


def _texts(comparison: ComparisonRecord, labels: list[str], prompts: set[str]) -> dict[str, str]:
    """Texts of questions by prompt hash, from the first of some runs that logged them."""
    for run in comparison.source.runs:
        harness = next((scored.harness for scored in run.scored.values()), None)
        if run.label in labels and harness is not None:
            texts = questions_of(harness, comparison.task or "", prompts)
            if texts:
                return texts
    return {}


def to_html(comparison: ComparisonRecord) -> str:
    """Returns the page."""
    import plotly.io
    import plotly.offline

    from qlora_harness.compare.figures import figures

    def html(plot: Any) -> str:
        return str(
            plotly.io.to_html(plot, full_html=False, include_plotlyjs=False, config=_BUTTONS)
        )

    count, shown = flips(comparison)
    return str(
        _template().render(
            comparison=comparison,
            verdict=verdict(comparison),
            title=title(comparison),
            tiles=tiles(comparison),
            difference=differences_line(comparison),
            plots=[(figure, html(figure.plot)) for figure in figures(comparison)],
            tables=tables(comparison),
            flips=shown,
            flips_in_all=count,
            plotly=plotly.offline.get_plotlyjs(),
        )
    )


def head(comparison: ComparisonRecord) -> str:
    """Returns the headlines and the answer in sentences, for a notebook."""
    macros = _template().module
    return str(macros.head(title(comparison), tiles(comparison), verdict(comparison)))


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")

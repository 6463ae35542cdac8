"""The comparison as one HTML page with figures, which needs no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora_harness.compare.comparison import Comparison
from qlora_harness.compare.numbers import difference, interval, value, word
from qlora_harness.compare.tables import tables
from qlora_harness.compare.text import differences_line, title
from qlora_harness.errors import SettingsError
from qlora_harness.families import LETTERS
from qlora_harness.results.answers import questions_of
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
    """Checks before anything is computed that the page can be made.

    Raises:
        SettingsError: Plotly is missing.
    """
    if find_spec("plotly") is None:
        raise SettingsError("--html needs plotly", "pip install 'qlora-harness[reports]'")


def tiles(comparison: Comparison) -> list[Tile]:
    """Returns the headlines of the leading contrast."""
    found = []
    for key in _TILES if comparison.primary else ():
        item = comparison.primary[0]
        endpoint = item.endpoints.get(key)
        if endpoint is None:
            continue
        sizes = f"{value(endpoint, endpoint.arm)} vs {value(endpoint, endpoint.baseline)}"
        if endpoint.arm is None:
            sizes = endpoint.reason or ""
        ends = interval(endpoint)
        found.append(
            Tile(
                endpoint.name.capitalize(),
                difference(endpoint),
                f"{ends} · {sizes}" if ends else sizes,
                word(endpoint),
                "unclear" if endpoint.letters else endpoint.word.split()[0],
            )
        )
    return found


def flips(comparison: Comparison) -> tuple[int, list[Flip]]:
    """Returns how many questions only one arm of the leading contrast got right, and the first."""
    item = comparison.primary[0] if comparison.primary else None
    arms = {run.label: run.arm for run in comparison.runs if run.label in comparison._answers}
    labels = [
        next((label for label, arm in arms.items() if item and arm == name), None)
        for name in ((item.arm, item.baseline) if item else ())
    ]
    if len(labels) < 2 or None in labels:
        return 0, []
    one, two = (comparison._answers[str(label)] for label in labels)
    change = one["score"].to_numpy() - two["score"].to_numpy()
    if not set(np.unique(change)) <= {-1.0, 0.0, 1.0}:
        return 0, []  # neither right nor wrong
    assert item is not None
    change = -change if item["accuracy"].lower_is_better else change
    rows = np.flatnonzero(change)
    shown = rows[:_FLIPS]
    texts: dict[str, str] = {}
    prompts = set(one["prompt"].iloc[shown])
    for run in comparison._runs:
        harness = next((scored.harness for scored in run.scored.values()), None)
        if run.label in labels and harness is not None and not texts:
            texts = questions_of(harness, comparison.task or "", prompts)

    def letter(place: int) -> str:
        return LETTERS[place] if 0 <= place < len(LETTERS) else NOTHING

    found = [
        Flip(
            str(one["subject"].iloc[row]).replace("_", " "),
            str(one["item"].iloc[row]),
            bool(change[row] > 0),
            f"{letter(two['choice'].iloc[row])} → {letter(one['choice'].iloc[row])}",
            letter(one["answer"].iloc[row]),
            texts.get(one["prompt"].iloc[row], ""),
        )
        for row in shown
    ]
    return len(rows), found


def to_html(comparison: Comparison) -> str:
    """Returns the page."""
    import plotly.io
    import plotly.offline

    from qlora_harness.compare.figures import figures

    plots = [
        (
            figure,
            plotly.io.to_html(
                figure.plot, full_html=False, include_plotlyjs=False, config=_BUTTONS
            ),
        )
        for figure in figures(comparison)
    ]
    count, shown = flips(comparison)
    return str(
        _template().render(
            comparison=comparison,
            title=title(comparison),
            tiles=tiles(comparison),
            difference=differences_line(comparison),
            plots=plots,
            tables=tables(comparison),
            flips=shown,
            flips_in_all=count,
            plotly=plotly.offline.get_plotlyjs(),
        )
    )


def head(comparison: Comparison) -> str:
    """Returns the headlines and the answer in sentences, for a notebook."""
    macros = _template().module
    return str(macros.head(title(comparison), tiles(comparison), comparison.verdict))


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html")

"""The comparison as one HTML page with figures, which needs no network."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

from qlora_harness.compare.endpoint import heading
from qlora_harness.compare.methods import methods
from qlora_harness.compare.numbers import difference, interval, value, word
from qlora_harness.compare.record import ComparisonRecord
from qlora_harness.compare.tables import tables
from qlora_harness.compare.text import differences_line, title
from qlora_harness.compare.verdict import verdict
from qlora_harness.errors import SettingsError

_TILES = ("memory", "time", "eval_loss", "accuracy")
# Without logo and selection tools: nothing here reacts to a selection.
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


def check_packages() -> None:
    """Raises SettingsError if Plotly is missing."""
    if find_spec("plotly") is None:
        raise SettingsError("--html needs plotly", "pip install 'qlora-harness[reports]'")


def tiles(comparison: ComparisonRecord) -> list[Tile]:
    """Returns the headlines of the leading contrast."""
    shown = []
    for key in (*_TILES, *comparison.benchmarks) if comparison.primary else ():
        endpoint = comparison.headline.endpoints.get(key)
        if endpoint is None:
            continue
        sizes = f"{value(endpoint, endpoint.arm)} vs {value(endpoint, endpoint.baseline)}"
        if endpoint.arm is None:
            sizes = endpoint.reason or ""
        ends = interval(endpoint)
        shown.append(
            Tile(
                heading(endpoint),
                difference(endpoint),
                f"{ends} · {sizes}" if ends else sizes,
                word(endpoint),
                "unclear" if endpoint.letters else endpoint.word.split()[0],
            )
        )
    return shown


def to_html(comparison: ComparisonRecord) -> str:
    """Returns the page."""
    import plotly.offline

    from qlora_harness.compare.figures import figures

    return str(
        template("compare/page.html").render(
            comparison=comparison,
            verdict=verdict(comparison),
            title=title(comparison),
            tiles=tiles(comparison),
            difference=differences_line(comparison),
            plots=[(figure, plot_html(figure.plot)) for figure in figures(comparison)],
            tables=tables(comparison),
            methods=methods(comparison.source.runs),
            plotly=plotly.offline.get_plotlyjs(),
        )
    )


def head(comparison: ComparisonRecord) -> str:
    """Returns the headlines and the verdict, for a notebook."""
    macros = template("compare/page.html").module
    return str(macros.head(title(comparison), tiles(comparison), verdict(comparison)))


def template(name: str) -> Any:
    """Returns a Jinja template by its path in the package."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("qlora_harness", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def plot_html(plot: Any, **config: Any) -> str:
    """Returns a plot as HTML for a page that includes Plotly."""
    import plotly.io

    config = {**_BUTTONS, **config}
    return str(plotly.io.to_html(plot, full_html=False, include_plotlyjs=False, config=config))

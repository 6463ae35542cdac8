"""Surveys as one HTML page with figures, which needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_harness.survey.survey import Survey, length_bars, turn_bars
from qlora_harness.survey.text import rows


def to_html(surveys: Sequence[Survey]) -> str:
    """Returns the page."""
    import jinja2
    import plotly.offline

    package = Path(__file__).parent
    environment = jinja2.Environment(
        # The styles are those of the comparison's page.
        loader=jinja2.FileSystemLoader([package, package.parent / "compare"]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = [
        {
            "survey": survey,
            "rows": list(rows(survey)),
            "plots": [
                (f"{survey.unit} of a conversation", _plot(length_bars(survey.lengths))),
                ("turns of a conversation", _plot(turn_bars(survey.turns))),
            ],
        }
        for survey in surveys
    ]
    page = environment.get_template("survey.html")
    return str(page.render(parts=parts, plotly=plotly.offline.get_plotlyjs()))


def _plot(bars: Mapping[str, int]) -> str:
    import plotly.graph_objects as go
    import plotly.io

    trace = go.Bar(x=list(bars), y=list(bars.values()))
    figure = go.Figure(trace.update(marker_color="#0072B2"))
    figure.update_layout(
        height=280,
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#808890"},
        xaxis={"type": "category", "automargin": True},
        yaxis={"automargin": True, "gridcolor": "rgba(128,128,128,0.25)"},
    )
    options: dict[str, Any] = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return str(plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, config=options))

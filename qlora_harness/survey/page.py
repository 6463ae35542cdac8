"""Surveys as one HTML page with figures, which needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_harness.survey.survey import Survey, length_bars, turn_bars
from qlora_harness.survey.text import rows


def to_html(surveys: Sequence[Survey]) -> str:
    """Returns the page."""
    import plotly.offline

    from qlora_harness.compare.page import template

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
    page = template("survey/survey.html")
    return str(page.render(parts=parts, plotly=plotly.offline.get_plotlyjs()))


def _plot(bars: Mapping[str, int]) -> str:
    import plotly.graph_objects as go

    from qlora_harness.compare.page import plot_html

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
    return plot_html(figure, displayModeBar=False)

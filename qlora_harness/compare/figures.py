"""The figures of a comparison, made with Plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_harness.compare.evaluation import CATEGORIES
from qlora_harness.compare.evidence import Cost, Evidence
from qlora_harness.compare.intersection import common_words
from qlora_harness.compare.losses import StepLog
from qlora_harness.compare.statistics import Z95

# Okabe and Ito's colours, which the colour-blind can tell apart and which show on light and dark.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HEADINGS = (
    "Peak memory and training time",
    "Training loss",
    "Accuracy by category, 95% intervals",
    "Accuracy by subject",
)
_SMOOTHING = 0.9


def figures(evidence: Evidence) -> list[tuple[str, Any]]:
    """Returns the figures that there are data for, by their headings.

    Args:
        evidence: Of the comparison.
    """
    # One colour a run in every figure, also where a figure has not all runs.
    colours = {label: COLOURS[place % len(COLOURS)] for place, label in enumerate(evidence.labels)}
    made = (
        _costs(evidence.costs, colours),
        _curves(evidence.logs, colours),
        _categories(evidence, colours),
        _subjects(evidence, colours),
    )
    named = zip(HEADINGS, made, strict=True)
    return [(heading, figure) for heading, figure in named if figure is not None]


def _layout(figure: Any, height: int, **options: Any) -> Any:
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": 40, "b": 8},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"font": {"family": "system-ui, sans-serif"}},
        **options,
    )
    figure.update_xaxes(automargin=True, gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    figure.update_yaxes(automargin=True, gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    return figure


def _costs(costs: Sequence[Cost], colours: Mapping[str, str]) -> Any:
    from plotly.subplots import make_subplots

    if not costs:
        return None
    kind = "GPU memory, GiB" if all(c.on_gpu for c in costs) else "memory, GiB"
    short = max((c.hours for c in costs if c.hours is not None), default=1.0) < 1
    unit, scale = ("minutes", 60) if short else ("hours", 1)
    times = [None if c.hours is None else scale * c.hours for c in costs]
    titles = (f"Peak {kind}", f"Training time, {unit}")
    figure = make_subplots(rows=2, cols=1, subplot_titles=titles)
    for row, values in ((1, [c.memory_gib for c in costs]), (2, times)):
        figure.add_bar(
            x=values,
            y=[
                c.label if c.on_gpu or kind.startswith("GPU") else f"{c.label} (CPU)" for c in costs
            ],
            orientation="h",
            marker_color=[colours[c.label] for c in costs],
            text=["" if value is None else f"{value:.2f}" for value in values],
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
            row=row,
            col=1,
        )
    figure.update_yaxes(autorange="reversed", type="category")
    return _layout(figure, 160 + 80 * len(costs), showlegend=False)


def _curves(logs: Mapping[str, StepLog], colours: Mapping[str, str]) -> Any:
    import plotly.graph_objects as go

    if not logs:
        return None
    figure = go.Figure()
    for label, log in logs.items():
        figure.add_scatter(
            x=log.steps,
            y=log.losses,
            mode="lines",
            line={"color": colours[label], "width": 1},
            opacity=0.35,
            showlegend=False,
            hovertemplate=f"{label}, step %{{x}}: %{{y:.4f}}<extra></extra>",
        )
        figure.add_scatter(
            x=log.steps,
            y=smooth(log.losses),
            mode="lines",
            name=label,
            line={"color": colours[label], "width": 2.5},
            hovertemplate=f"{label}, smoothed, step %{{x}}: %{{y:.4f}}<extra></extra>",
        )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss, nats per token")
    return _layout(figure, 380)


def smooth(values: Sequence[float]) -> list[float]:
    """Returns an exponential moving average, corrected for its start as Adam's moments are.

    Args:
        values: One a step.
    """
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        found.append(mean / weight)
    return found


def _categories(evidence: Evidence, colours: Mapping[str, str]) -> Any:
    import plotly.graph_objects as go

    if not evidence.evaluations:
        return None
    names = ["All", *CATEGORIES.values()]
    figure = go.Figure()
    count = len(evidence.evaluations)
    for index, (label, evaluation) in enumerate(evidence.evaluations.items()):
        rows = [(0, evaluation.acc, evaluation.acc_stderr)]
        rows += [
            (place, score.acc, score.acc_stderr)
            for place, key in enumerate(CATEGORIES, start=1)
            if (score := evaluation.categories.get(key)) is not None
        ]
        # Side by side, so that no interval hides another.
        shift = (index - (count - 1) / 2) * min(0.25, 0.8 / count)
        figure.add_scatter(
            x=[100 * acc for _, acc, _ in rows],
            y=[place + shift for place, _, _ in rows],
            customdata=[names[place] for place, _, _ in rows],
            mode="markers",
            name=label,
            marker={"color": colours[label], "size": 9},
            error_x={"array": [100 * Z95 * stderr if stderr else None for _, _, stderr in rows]},
            hovertemplate=f"{label}, %{{customdata}}: %{{x:.2f}}%<extra></extra>",
        )
    figure.update_xaxes(title=_accuracy_title(evidence))
    figure.update_yaxes(
        range=[len(names) - 0.5, -0.5], tickvals=list(range(len(names))), ticktext=names
    )
    return _layout(figure, 220 + 40 * count)


def _subjects(evidence: Evidence, colours: Mapping[str, str]) -> Any:
    import plotly.graph_objects as go

    if len(evidence.evaluations) < 2:
        return None
    evaluations = list(evidence.evaluations.items())
    first, last = evaluations[0][1].subjects, evaluations[-1][1].subjects
    names = sorted(first, key=lambda name: last[name].acc - first[name].acc)
    shown = [f"{_short(name)} ({first[name].n:,})" for name in names]
    figure = go.Figure()
    for name, text in zip(names, shown, strict=True):
        values = [100 * evaluation.subjects[name].acc for _, evaluation in evaluations]
        figure.add_scatter(
            x=[min(values), max(values)],
            y=[text, text],
            mode="lines",
            line={"color": "rgba(128,128,128,0.6)", "width": 2},
            showlegend=False,
            hoverinfo="skip",
        )
    for label, evaluation in evaluations:
        figure.add_scatter(
            x=[100 * evaluation.subjects[name].acc for name in names],
            y=shown,
            mode="markers",
            name=label,
            marker={"color": colours[label], "size": 9},
            hovertemplate=f"{label}, %{{y}}: %{{x:.1f}}%<extra></extra>",
        )
    figure.update_xaxes(title=_accuracy_title(evidence), side="top")
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], dtick=1, tickfont={"size": 11})
    figure = _layout(figure, 110 + 20 * len(names))
    figure.update_layout(legend={"y": 0, "yanchor": "top"}, margin={"t": 60})
    return figure


def _accuracy_title(evidence: Evidence) -> str:
    return f"accuracy, %{common_words(evidence.common)}"


def _short(subject: str) -> str:
    words = subject.replace("_", " ")
    for long, short in (("high school", "HS"), ("college", "col."), ("professional", "prof.")):
        words = words.replace(long, short)
    return words

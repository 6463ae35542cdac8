"""The figures of a comparison, made with Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from qlora_harness.compare.endpoint import heading
from qlora_harness.compare.numbers import difference, interval, word
from qlora_harness.compare.record import (
    ComparisonRecord,
    Contrast,
    Endpoint,
    GroupDifference,
    LossCurve,
)
from qlora_harness.compare.statistics import wilson
from qlora_harness.schema.training_records import TrainingLog

# Okabe and Ito's colours, distinct to the colour-blind, on light and dark pages.
_BASELINE = "#7a828a"
_COLOURS = ("#009E73", "#D55E00", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#6A51A3",
            "#B15928", "#3B7C8C")  # fmt: skip
_WORDS = {"better": "#009E73", "worse": "#D55E00", "same": "#0072B2"}
_SMOOTHING = 0.1  # weight of a step in the moving average


class Figure(NamedTuple):
    """A Plotly plot with its heading and its alternative text."""

    heading: str
    alt: str
    plot: Any
    wide: bool = False  # over the whole width of the page
    folded: bool = False


def figures(comparison: ComparisonRecord) -> list[Figure]:
    """Returns the figures for which the comparison has numbers."""
    baseline = comparison.primary[0].baseline if comparison.primary else None
    leading = [item.arm for item in comparison.primary]
    others = [arm for arm in dict.fromkeys([*leading, *comparison.arms]) if arm != baseline]
    colours = {arm: _COLOURS[number % len(_COLOURS)] for number, arm in enumerate(others)}
    if baseline is not None:
        colours[baseline] = _BASELINE
    keys = ("eval_loss", "nll", "accuracy", *comparison.benchmarks)
    made = [
        *(_differences(comparison, key) for key in keys),
        _memory_and_loss(comparison, colours),
        _curves(comparison, colours),
        _held_out(comparison, colours),
        *_groups(comparison, colours),
    ]
    return [figure for figure in made if figure is not None]


def _layout(figure: Any, height: int) -> Any:
    legend = sum(trace.showlegend is not False for trace in figure.data) > 1
    figure.update_layout(
        height=height,
        # Plotly's buttons are above the legend.
        margin={"l": 8, "r": 12, "t": 56 if legend else 28, "b": 8},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128,128,128,0.9)"},
    )
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(automargin=True, gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    return figure


def _error_bars(
    values: list[float], ends: list[tuple[float, float]], colour: str
) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in zip(values, ends, strict=True)],
        "arrayminus": [value - low for value, (low, _) in zip(values, ends, strict=True)],
        "color": colour,
        "thickness": 1.5,
    }


def _differences(comparison: ComparisonRecord, key: str) -> Figure | None:
    """Every arm on one endpoint, by dose, with its interval and word; hollow before training."""
    baselines = {item.baseline for item in comparison.primary}
    rows: list[tuple[str, list[Endpoint]]] = []  # after training, and before it if known
    for item in comparison.primary:
        label = item.arm if len(baselines) == 1 else f"{item.arm}<br>vs {item.baseline}"
        base = item if key == "eval_loss" else comparison.before(item)
        before = base.endpoints.get("loss_before" if base is item else key) if base else None
        known = [one for one in (item.endpoints.get(key), before) if one and one.low is not None]
        if known and known[0] is not before:
            rows.append((label, known))
    if not rows:
        return None
    first = rows[0][1][0]
    scale = 100 if first.unit == "share" else 1
    figure, notes = go.Figure(), []
    if first.margin is not None:
        ends = {"x0": -scale * first.margin, "x1": scale * first.margin}
        figure.add_vrect(**ends, fillcolor="rgba(128,128,128,0.18)", line_width=0)
        notes.append("margin shaded")
    if any(len(known) > 1 for _, known in rows):
        notes.append("◇ before training")
    figure.add_vline(x=0, line={"color": "rgba(128,128,128,0.8)", "width": 1})
    alt = [
        _add_interval(figure, label, one, scale, place + 0.3 * hollow, hollow)
        for place, (label, known) in enumerate(rows)
        for hollow, one in enumerate(known)
    ]
    figure.update_yaxes(
        range=[len(rows) - 0.5, -0.5],
        tickvals=list(range(len(rows))),
        ticktext=[label for label, _ in rows],
    )
    unit = {"share": ", points", "nats": ", nats"}.get(first.unit, "")
    figure.update_xaxes(title=f"difference{unit}")
    less = f"minus {baselines.pop()}'s" if len(baselines) == 1 else "in every arm"
    remarks = f" ({', '.join(notes)})" if notes else ""
    title = f"{heading(first)} {less}{remarks}"
    return Figure(title, "; ".join(alt), _layout(figure, 110 + 46 * len(rows)))


def _add_interval(figure: Any, label: str, one: Endpoint, scale: int, y: float, hollow: int) -> str:
    """Adds a point with its interval to a figure, and returns it as text."""
    colour = _BASELINE if one.letters else _WORDS.get(one.word, _BASELINE)
    text = f"{difference(one)} ({interval(one)}): {word(one)}"
    values = [scale * (one.difference or 0)]
    bars = _error_bars(values, [(scale * (one.low or 0), scale * (one.high or 0))], colour)
    symbol = "diamond-open" if hollow else "circle"
    figure.add_scatter(
        x=values, y=[y], mode="markers", error_x=bars, showlegend=False,
        marker={"size": 10, "color": colour, "symbol": symbol},
        hovertemplate=f"{text}<extra></extra>",
    )  # fmt: skip
    return f"{label.replace('<br>', ' ')} {text}"


def _memory_and_loss(comparison: ComparisonRecord, colours: dict[str, str]) -> Figure | None:
    points: dict[str, tuple[float, float, float]] = {}  # memory, loss, half of its interval
    for item in comparison.contrasts:
        memory, loss = item.measured("memory"), item.measured("eval_loss")
        if memory is None or loss is None:
            continue
        half = 0.0 if loss.high is None else loss.high - (loss.difference or 0)
        points.setdefault(item.baseline, (memory.baseline or 0, loss.baseline or 0, 0.0))
        points[item.arm] = (memory.arm or 0, loss.arm or 0, half)
    if len(points) < 2:
        return None
    figure = go.Figure()
    named = len(points) < 5  # more names would overlap
    for arm, (size, height, half) in points.items():
        figure.add_scatter(
            x=[size / 2**30],
            y=[height],
            mode="markers+text" if named else "markers",
            name=arm,
            text=[f"{arm} "],
            textposition="middle left",
            marker={"size": 12, "color": colours[arm]},
            error_y={"type": "data", "array": [half], "color": colours[arm]},
            showlegend=not named,
            hovertemplate=f"{arm}: %{{x:.2f}} GiB, %{{y:.4f}}<extra></extra>",
        )
    figure.update_xaxes(title="peak memory, GiB", rangemode="tozero")
    low = min(loss - half for _, loss, half in points.values())
    high = max(loss + half for _, loss, half in points.values())
    room = max(high - low, 0.01) / 8
    figure.update_yaxes(title="evaluation loss, nats", range=[low - room, high + room])
    alt = "; ".join(f"{arm} {m / 2**30:.2f} GiB, loss {v:.3f}" for arm, (m, v, _) in points.items())
    return Figure("Memory and loss", alt, _layout(figure, 320 + 12 * len(points)))


def _curves(comparison: ComparisonRecord, colours: dict[str, str]) -> Figure | None:
    """Training losses: thin lines are runs, thick lines arms, diamonds the loss before training."""
    arms: dict[str, list[TrainingLog]] = {}
    arm_of = {run.label: run.arm for run in comparison.runs}
    for run in comparison.source.runs:
        if run.log is not None and run.log.steps:
            arms.setdefault(arm_of[run.label], []).append(run.log)
    if not arms:
        return None
    figure = go.Figure()
    alt = [_add_curves(figure, arm, logs, colours[arm]) for arm, logs in arms.items()]
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss, nats per token")
    heading = "Loss before (◆), during and after training"
    return Figure(heading, "; ".join(alt), _layout(figure, 360), wide=True)


def _add_curves(figure: Any, arm: str, logs: Sequence[TrainingLog], colour: str) -> str:
    """Adds the losses of an arm to a figure, and returns their ends as text."""
    steps = min(len(log.steps) for log in logs)
    numbers = [row.step for row in logs[0].steps[:steps]]
    losses = np.array([[row.loss for row in log.steps[:steps]] for log in logs])
    for row in losses:
        figure.add_scatter(
            x=numbers, y=row, mode="lines", line={"color": colour, "width": 1}, opacity=0.3,
            showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    smooth = pd.Series(losses.mean(axis=0)).ewm(alpha=_SMOOTHING).mean().tolist()
    figure.add_scatter(
        x=numbers, y=smooth, mode="lines", name=arm, line={"color": colour, "width": 2.5},
        hovertemplate=f"{arm}, smoothed, step %{{x}}: %{{y:.4f}}<extra></extra>",
    )  # fmt: skip
    before = [log.evaluation.loss_before for log in logs if log.evaluation.nll_before]
    start = float(np.mean(before)) if before else float(losses[:, 0].mean())
    what = "evaluation loss before training" if before else "first step, before any update"
    figure.add_scatter(
        x=[0 if before else numbers[0]], y=[start], mode="markers", showlegend=False,
        marker={"color": colour, "size": 11, "symbol": "diamond"},
        hovertemplate=f"{arm}, {what}: %{{y:.4f}}<extra></extra>",
    )  # fmt: skip
    return f"{arm} {start:.3f} at the start, {smooth[-1]:.3f} at the end"


def _held_out(comparison: ComparisonRecord, colours: dict[str, str]) -> Figure | None:
    """Held-out losses during training; step 0, far above, would flatten the rest."""
    if not comparison.curves:
        return None
    figure = go.Figure()
    alt = [_add_held_out(figure, curve, colours[curve.arm]) for curve in comparison.curves]
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="held-out loss, nats per token")
    several = any(curve.seeds > 1 for curve in comparison.curves)
    bands = " (bands: lowest to highest seed)" if several else ""
    heading = f"Held-out loss during training{bands}"
    return Figure(heading, "; ".join(alt), _layout(figure, 360), wide=True)


def _add_held_out(figure: Any, curve: LossCurve, colour: str) -> str:
    """Adds an arm's mean over seeds and the range of its seeds, and returns its ends as text."""
    first = 1 if curve.steps[0] == 0 else 0
    steps, mean = curve.steps[first:], curve.mean[first:]
    if curve.seeds > 1:
        figure.add_scatter(
            x=[*steps, *reversed(steps)], y=[*curve.high[first:], *reversed(curve.low[first:])],
            mode="lines", line={"width": 0}, fill="toself", fillcolor=colour, opacity=0.18,
            showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    figure.add_scatter(
        x=steps, y=mean, mode="lines+markers", name=curve.arm,
        line={"color": colour, "width": 2.5}, marker={"size": 7},
        hovertemplate=f"{curve.arm}, step %{{x}}: %{{y:.4f}}<extra></extra>",
    )  # fmt: skip
    return f"{curve.arm} {mean[0]:.3f} at step {steps[0]}, {mean[-1]:.3f} at step {steps[-1]}"


def _groups(comparison: ComparisonRecord, colours: dict[str, str]) -> list[Figure]:
    """Accuracies by category and by subject; a line marks chance."""
    items = [item for item in comparison.primary if item.groups]
    if not items:
        return []
    letters = items[0].detail.letters if items[0].detail is not None else None
    chance = 100 / len(letters[0]) if letters else None
    made = []
    for kind in ("category", "subject"):
        groups = [group for group in items[0].groups if group.kind == kind]
        groups.sort(key=lambda group: group.arm - group.baseline)
        if groups:
            alt = (f"{g.name} {100 * g.arm:.1f} and {100 * g.baseline:.1f}%" for g in groups)
            plot = _dots(items, groups, colours, chance)
            line = "; dotted line: chance" if chance else ""
            heading = f"Accuracy by {kind} (95% intervals{line})"
            made.append(Figure(heading, "; ".join(alt), plot, wide=True, folded=kind == "subject"))
    return made


def _dots(
    items: Sequence[Contrast],
    groups: Sequence[GroupDifference],
    colours: dict[str, str],
    chance: float | None,
) -> Any:
    arms = [(items[0].baseline, [group.baseline for group in groups])]
    for item in items:
        known = {(group.kind, group.name): group.arm for group in item.groups}
        arms.append((item.arm, [known[group.kind, group.name] for group in groups]))
    names = [f"{_abbreviated(group.name)} ({group.n:,})" for group in groups]
    figure = go.Figure()
    for number, (arm, shares) in enumerate(arms):
        shift = (number - (len(arms) - 1) / 2) * min(0.3, 0.8 / len(arms))
        values = [100 * share for share in shares]
        ends = [wilson(share, group.n) for share, group in zip(shares, groups, strict=True)]
        bars = _error_bars(values, [(100 * low, 100 * high) for low, high in ends], colours[arm])
        figure.add_scatter(
            x=values, y=[row + shift for row in range(len(groups))], customdata=names,
            mode="markers", name=arm, marker={"color": colours[arm], "size": 8}, error_x=bars,
            hovertemplate=f"{arm}, %{{customdata}}: %{{x:.1f}}%<extra></extra>",
        )  # fmt: skip
    if chance is not None:
        figure.add_vline(x=chance, line={"color": "#B8860B", "dash": "dot", "width": 1.5})
    figure.update_xaxes(title="accuracy, %")
    figure.update_yaxes(
        range=[len(groups) - 0.5, -0.5], tickvals=list(range(len(groups))), ticktext=names,
        tickfont={"size": 11 if len(groups) > 10 else 13},
    )  # fmt: skip
    return _layout(figure, 110 + max(22, 14 * len(arms)) * len(groups))


def _abbreviated(subject: str) -> str:
    words = subject.replace("_", " ")
    for long, short in (("high school", "HS"), ("college", "col."), ("professional", "prof.")):
        words = words.replace(long, short)
    return words

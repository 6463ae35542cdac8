"""The figures of a comparison, made with Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_harness.compare.comparison import Comparison
from qlora_harness.compare.contrast import Contrast
from qlora_harness.compare.numbers import difference, interval, word
from qlora_harness.compare.scores import GroupDifference
from qlora_harness.units import GIB

# Okabe and Ito's colours, which the colour-blind can tell apart, as they show on light and dark.
_BASELINE = "#7a828a"
_COLOURS = ("#009E73", "#D55E00", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#6A51A3",
            "#B15928", "#3B7C8C")  # fmt: skip
_SHADE = "rgba(128,128,128,0.18)"
_SMOOTHING = 0.9
_WORDS = {"better": "#009E73", "worse": "#D55E00", "same": "#0072B2"}


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        heading: Above it.
        alt: What it shows, for who can't see it.
        plot: Of Plotly.
        wide: Whether it takes the whole width of the page.
        folded: Whether it is opened by hand.
    """

    heading: str
    alt: str
    plot: Any
    wide: bool = False
    folded: bool = False


def figures(comparison: Comparison) -> list[Figure]:
    """Returns the figures that there are numbers for."""
    colours = _colours(comparison)
    made = [
        _forest(comparison, "accuracy"),
        _forest(comparison, "nll"),
        _memory_and_loss(comparison, colours),
        _curves(comparison, colours),
        *_groups(comparison, colours),
    ]
    return [figure for figure in made if figure is not None]


def _colours(comparison: Comparison) -> dict[str, str]:
    baseline = comparison.primary[0].baseline if comparison.primary else None
    others = [arm for arm in comparison.arms if arm != baseline]
    colours = {arm: _COLOURS[place % len(_COLOURS)] for place, arm in enumerate(others)}
    return {**colours, **({} if baseline is None else {baseline: _BASELINE})}


def _layout(figure: Any, height: int, **options: Any) -> Any:
    legend = sum(trace.showlegend is not False for trace in figure.data) > 1
    figure.update_layout(
        height=height,
        # Plotly's buttons stand above the legend.
        margin={"l": 8, "r": 12, "t": 56 if legend else 28, "b": 8},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128,128,128,0.9)"},
        **options,
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


def _forest(comparison: Comparison, key: str) -> Figure | None:
    """Every contrast on one endpoint, with its interval and what it shows."""
    import plotly.graph_objects as go

    contrasts = [*comparison.contrasts, *comparison.effects]
    items = [(c, c.endpoints[key]) for c in contrasts if key in c.endpoints]
    items = [(item, one) for item, one in items if one.low is not None]
    if not items:
        return None
    first = items[0][1]
    scale, unit = (100, ", points") if first.unit == "share" else (1, "")
    unit = ", nats" if first.unit == "nats" else unit
    figure = go.Figure()
    if first.margin is not None:
        ends = (-scale * first.margin, scale * first.margin)
        figure.add_vrect(x0=ends[0], x1=ends[1], fillcolor=_SHADE, line_width=0)
    figure.add_vline(x=0, line={"color": "rgba(128,128,128,0.8)", "width": 1})
    said = []
    for item, one in items:
        colour = _BASELINE if one.letters else _WORDS.get(one.word, _BASELINE)
        text = f"{difference(one)} ({interval(one)}): {word(one)}"
        values = [scale * (one.difference or 0)]
        bars = _error_bars(values, [(scale * (one.low or 0), scale * (one.high or 0))], colour)
        figure.add_scatter(
            x=values, y=[_versus(item)], mode="markers", marker={"size": 10, "color": colour},
            error_x=bars, showlegend=False, hovertemplate=f"{text}<extra></extra>",
        )  # fmt: skip
        said.append(f"{_versus(item).replace('<br>', ' ')} {text}")
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(title=f"difference of {first.name}{unit}")
    shaded = ", the margin shaded" if first.margin is not None else ""
    heading = f"{first.name[0].upper()}{first.name[1:]}, every contrast{shaded}"
    return Figure(heading, "; ".join(said), _layout(figure, 110 + 46 * len(items)))


def _versus(item: Contrast) -> str:
    return f"{item.arm}<br>vs {item.baseline}"


def _memory_and_loss(comparison: Comparison, colours: dict[str, str]) -> Figure | None:
    import plotly.graph_objects as go

    points: dict[str, tuple[float, float, float]] = {}
    for item in comparison.contrasts:
        memory, loss = item.endpoints.get("memory"), item.endpoints.get("eval_loss")
        if memory is None or loss is None or None in (memory.arm, loss.arm):
            continue
        half = 0.0 if loss.high is None else loss.high - (loss.difference or 0)
        points.setdefault(item.baseline, (memory.baseline or 0, loss.baseline or 0, 0.0))
        points[item.arm] = (memory.arm or 0, loss.arm or 0, half)
    if len(points) < 2:
        return None
    figure = go.Figure()
    for arm, (size, loss_value, half) in points.items():
        figure.add_scatter(
            x=[size / GIB],
            y=[loss_value],
            # So many names would lie on each other.
            mode="markers+text" if len(points) < 5 else "markers",
            name=arm,
            text=[f"{arm} "],
            textposition="middle left",
            marker={"size": 12, "color": colours[arm]},
            error_y={"type": "data", "array": [half], "color": colours[arm]},
            showlegend=len(points) >= 5,
            hovertemplate=f"{arm}: %{{x:.2f}} GiB, %{{y:.4f}}<extra></extra>",
        )
    figure.update_xaxes(title="peak memory, GiB", rangemode="tozero")
    losses = [loss for _, loss, _ in points.values()]
    room = max(max(losses) - min(losses), 0.01)
    figure.update_yaxes(
        title="evaluation loss, nats", range=[min(losses) - room / 2, max(losses) + room]
    )
    alt = "; ".join(f"{arm} {m / GIB:.2f} GiB, loss {v:.3f}" for arm, (m, v, _) in points.items())
    return Figure("Memory against loss", alt, _layout(figure, 320 + 12 * len(points)))


def _curves(comparison: Comparison, colours: dict[str, str]) -> Figure | None:
    """Training losses: thin lines are runs, thick ones arms; points before the first step."""
    import plotly.graph_objects as go

    arms: dict[str, list[Any]] = {}
    arm_of = {run.label: run.arm for run in comparison.runs}
    for run in comparison._runs:
        if run.log is not None and run.log.steps:
            arms.setdefault(arm_of[run.label], []).append(run.log)
    if not arms:
        return None
    figure = go.Figure()
    said = []
    for arm, logs in arms.items():
        colour = colours.get(arm, _BASELINE)
        steps = min(len(log.steps) for log in logs)
        numbers = [row.step for row in logs[0].steps[:steps]]
        losses = np.array([[row.loss for row in log.steps[:steps]] for log in logs])
        for row in losses:
            figure.add_scatter(
                x=numbers, y=row, mode="lines", line={"color": colour, "width": 1}, opacity=0.3,
                showlegend=False, hoverinfo="skip",
            )  # fmt: skip
        smooth = smoothed(losses.mean(axis=0))
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
        said.append(f"{arm} {start:.3f} at the start, {smooth[-1]:.3f} at the end")
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss, nats per token")
    return Figure(
        "Loss before (◆), during and after training", "; ".join(said), _layout(figure, 360), True
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Returns an exponential moving average, corrected for its start as Adam's moments are."""
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * float(value)
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        found.append(mean / weight)
    return found


def _groups(comparison: Comparison, colours: dict[str, str]) -> list[Figure]:
    """Accuracies by category and by subject, with the line of chance where there is one."""
    items = [item for item in comparison.primary if item.groups]
    if not items:
        return []
    letters = items[0].detail.letters if items[0].detail is not None else None
    chance = 100 / len(letters[0]) if letters else None
    found = []
    for kind in ("category", "subject"):
        groups = [group for group in items[0].groups if group.kind == kind]
        groups.sort(key=lambda group: group.arm - group.baseline)
        if groups:
            said = (f"{g.name} {100 * g.arm:.1f} and {100 * g.baseline:.1f}%" for g in groups)
            plot = _dots(items, groups, colours, chance)
            heading = f"Accuracy by {kind}, 95% intervals{', the line of chance' if chance else ''}"
            found.append(Figure(heading, "; ".join(said), plot, True, kind == "subject"))
    return found


def _dots(
    items: Sequence[Contrast],
    groups: Sequence[GroupDifference],
    colours: dict[str, str],
    chance: float | None,
) -> Any:
    import plotly.graph_objects as go

    by_name = [{(group.kind, group.name): group for group in item.groups} for item in items]
    arms = [(items[0].baseline, [group.baseline for group in groups])]
    for item, known in zip(items, by_name, strict=True):
        arms.append((item.arm, [known[group.kind, group.name].arm for group in groups]))
    shown = [f"{_abbreviated(group.name)} ({group.n:,})" for group in groups]
    figure = go.Figure()
    for place, (arm, shares) in enumerate(arms):
        shift = (place - (len(arms) - 1) / 2) * min(0.3, 0.8 / len(arms))
        values = [100 * share for share in shares]
        ends = [wilson(share, group.n) for share, group in zip(shares, groups, strict=True)]
        bars = _error_bars(values, [(100 * low, 100 * high) for low, high in ends], colours[arm])
        figure.add_scatter(
            x=values, y=[row + shift for row in range(len(groups))], customdata=shown,
            mode="markers", name=arm, marker={"color": colours[arm], "size": 8}, error_x=bars,
            hovertemplate=f"{arm}, %{{customdata}}: %{{x:.1f}}%<extra></extra>",
        )  # fmt: skip
    if chance is not None:
        figure.add_vline(x=chance, line={"color": "#B8860B", "dash": "dot", "width": 1.5})
    figure.update_xaxes(title="accuracy, %")
    figure.update_yaxes(
        range=[len(groups) - 0.5, -0.5], tickvals=list(range(len(groups))), ticktext=shown,
        tickfont={"size": 11 if len(groups) > 10 else 13},
    )  # fmt: skip
    return _layout(figure, 110 + max(22, 14 * len(arms)) * len(groups))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Returns Wilson's 95% interval of a share."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return min(share, middle - half), max(share, middle + half)


def _abbreviated(subject: str) -> str:
    words = subject.replace("_", " ")
    for long, short in (("high school", "HS"), ("college", "col."), ("professional", "prof.")):
        words = words.replace(long, short)
    return words

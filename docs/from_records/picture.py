"""The picture of README.md: the differences of the published study, for light and dark pages."""

from __future__ import annotations

from collections.abc import Iterable

import qlora_harness as qh
from qlora_harness.compare.numbers import difference
from qlora_harness.compare.record import Contrast, Endpoint
from qlora_harness.compare.text import title

STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.note { fill: #59636e; font-size: 12px }
.title, .word { font-weight: 600 }
line { stroke: #59636e; stroke-width: 3; stroke-linecap: round }
.axis { stroke-width: 1; stroke-dasharray: 3 4 }
circle { fill: #59636e }
line.better { stroke: #1a7f37 } .better { fill: #1a7f37 }
line.worse { stroke: #cf222e } .worse { fill: #cf222e }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .note { fill: #9198a1 }
line.better { stroke: #3fb950 } .better { fill: #3fb950 }
line.worse { stroke: #f85149 } .worse { fill: #f85149 }
line, circle { stroke: #9198a1 } circle { stroke: none }
}
</style>"""
KEYS = (("eval_loss", "eval loss, nats"), ("nll", "NLL, nats"), ("accuracy", "accuracy, points"))


def picture(comparison: qh.Comparison) -> str:
    """Returns an SVG of the differences of loss, NLL and accuracy with their intervals."""
    item = comparison.headline
    body, height = _rows(item) if len(comparison.primary) == 1 else _panels(comparison)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" role="img"
 aria-label="{item.arm} minus {item.baseline} with 95% intervals">
{STYLE}
<text class="title" x="12" y="22">{title(comparison, 90)}</text>
{body}
</svg>
"""


def _numbers(endpoint: Endpoint, factor: float) -> tuple[float, float, float]:
    """Low end, difference and high end; without an interval, the difference three times."""
    middle = endpoint.difference or 0.0
    ends = (endpoint.low, middle, endpoint.high)
    low, middle, high = (factor * (middle if end is None else end) for end in ends)
    return low, middle, high


def _interval(word: str, x: Iterable[float], y: float) -> str:
    low, middle, high = x
    return (
        f'<line class="{word}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
        f'<circle class="{word}" cx="{middle:.1f}" cy="{y}" r="4.5"/>'
    )


def _rows(item: Contrast) -> tuple[str, int]:
    """A row for each quantity of the only contrast, and the height of the picture."""
    rows = []
    for number, (key, name, (factor, digits), unit) in enumerate(
        (
            ("memory", "peak memory", (100, 1), "%"),
            ("eval_loss", "eval loss", (1, 3), " nats"),
            ("nll", "NLL, MMLU", (1, 3), " nats"),
            ("accuracy", "accuracy, MMLU", (100, 2), " points"),
        )
    ):
        endpoint = item[key]
        low, middle, high = _numbers(endpoint, factor)
        scale = 130 / max(abs(low), abs(high))
        y = 66 + 34 * number
        text = f"{middle:+.{digits}f}{unit}  [{low:+.{digits}f}, {high:+.{digits}f}]"
        rows.append(
            f'<text x="12" y="{y + 4}">{name}</text>'
            + _interval(endpoint.word, [290 + scale * end for end in (low, middle, high)], y)
            + f'<text x="440" y="{y + 4}">{text.replace("-", "−").replace("+0.00", "0.00")}</text>'
            f'<text class="word {endpoint.word}" x="668" y="{y + 4}">{endpoint.word}'
            + (" (letters)</text>" if endpoint.letters else "</text>")
        )
    body = "\n".join(rows)
    note = f"{item.arm} minus {item.baseline}, 95% intervals; each row has its own scale"
    return (
        f"""<text class="note" x="12" y="42">{note}</text>
<line class="axis" x1="290" x2="290" y1="52" y2="184"/>
{body}
<text class="note" x="290" y="200" text-anchor="middle">0</text>""",
        206,
    )


def _panels(comparison: qh.Comparison) -> tuple[str, int]:
    """A panel for each quantity with a row for each arm, and the height of the picture."""
    note = f"minus {comparison.headline.baseline}; the 95% intervals hold for all arms together"
    parts = [f'<text class="note" x="12" y="42">{note}</text>']
    bottom = 84 + 44 * len(comparison.primary)
    for row, item in enumerate(comparison.primary):
        memory = item.measured("memory")
        parts.append(f'<text class="word" x="12" y="{96 + 44 * row}">{item.arm}</text>')
        if memory is not None:
            size = f"{difference(memory)} memory"
            parts.append(f'<text class="note" x="12" y="{112 + 44 * row}">{size}</text>')
    for column, (key, name) in enumerate(KEYS):
        left, factor = 150 + 220 * column, 100 if key == "accuracy" else 1
        endpoints = [(r, e) for r, c in enumerate(comparison.primary) if (e := c.measured(key))]
        ends = [0.0, *(end for _, e in endpoints for end in _numbers(e, factor))]
        scale = 180 / ((max(ends) - min(ends)) or 1)
        zero = left - scale * min(ends)
        parts += [
            f'<text class="note" x="{left}" y="66">{name}</text>',
            f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="74" y2="{bottom}"/>',
        ]
        for row, endpoint in endpoints:
            x, y = [zero + scale * end for end in _numbers(endpoint, factor)], 100 + 44 * row
            text = difference(endpoint).removesuffix(" pts")
            parts.append(_interval(endpoint.word, x, y))
            parts.append(
                f'<text class="note" x="{x[1]:.1f}" y="{y - 9}" text-anchor="middle">{text}</text>'
            )
    return "\n".join(parts), bottom + 12

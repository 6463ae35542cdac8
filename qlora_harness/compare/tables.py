"""The tables behind the answer, as texts: for --details, comparison.md and the page."""

from __future__ import annotations

import json
from dataclasses import dataclass

from qlora_harness.compare.comparison import Comparison
from qlora_harness.compare.contrast import Contrast
from qlora_harness.compare.numbers import (
    difference,
    inner_interval,
    interval,
    p_text,
    signed,
    value,
    word,
)
from qlora_harness.units import GIB, NOTHING, duration


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What it shows.
        columns: Headings; the first is that of the rows' names.
        rows: Texts.
        numeric: Whether all columns but the first are numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True


def tables(comparison: Comparison) -> list[Table]:
    """Returns all tables that there are numbers for."""
    found = [_runs(comparison)]
    for item in comparison.contrasts:
        found.append(_endpoints(item))
        if item.detail is not None:
            found.append(_detail(item))
    found += [_effects(comparison), _chance(comparison)]
    found += [
        _groups(item, kind) for item in comparison.primary for kind in ("category", "subject")
    ]
    found += _settings(comparison)
    return [table for table in found if table.rows]


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _runs(comparison: Comparison) -> Table:
    rows = []
    for run in comparison.runs:
        error = "" if run.stderr is None else f" ± {100 * run.stderr:.2f}"
        share = run.value is not None and 0 <= run.value <= 1
        peak = None if run.peak_bytes is None else run.peak_bytes / GIB
        time = NOTHING if run.train_seconds is None else duration(run.train_seconds)
        score = f"{100 * (run.value or 0):.2f}%{error}" if share else _number(run.value, "{:.3f}")
        numbers = ((run.eval_loss, "{:.4f}"), (run.perplexity, "{:.3f}"))
        rows.append(
            (run.label, run.arm, _number(run.seed, "{}"), _number(peak, "{:.2f}"), time,
             *(_number(number, form) for number, form in numbers), score)
        )  # fmt: skip
    heads = ("run", "arm", "seed", "peak GiB", "time", "eval loss", "perplexity",
             f"{comparison.metric or 'accuracy'}, as recorded")  # fmt: skip
    return Table("Runs", heads, tuple(rows))


def _endpoints(item: Contrast) -> Table:
    rows = []
    for one in item.endpoints.values():
        notes = [f"90%: {inner_interval(one)}"] if one.within and one.inner_low is not None else []
        notes += [one.reason] if one.reason else []
        shown = f"{word(one)} ({'; '.join(notes)})" if notes else word(one)
        scale, form = (100, "{:.2f}") if one.unit == "share" else (1, "{:.3f}")
        error = None if one.clustered_stderr is None else scale * one.clustered_stderr
        rows.append(
            (one.name, value(one, one.arm), value(one, one.baseline), difference(one),
             interval(one) or NOTHING, _number(error, form), p_text(one.p),
             _number(one.n, "{:,}"), shown)
        )  # fmt: skip
    heads = ("", item.arm, item.baseline, "difference", "95% interval", "SE by subject", "p", "n",
             "shown")  # fmt: skip
    return Table(f"{item.arm} against {item.baseline}", heads, tuple(rows))


def _detail(item: Contrast) -> Table:
    detail = item.detail
    assert detail is not None

    rows = [
        ("best choices that differ", _number(detail.flips, "{:.2%}")),
        ("the same between two seeds of an arm", _number(detail.flips_floor, "{:.2%}")),
        (f"KL({item.baseline} ‖ {item.arm}), nats", _number(detail.divergence, "{:.4f}")),
        ("the same between two seeds of an arm", _number(detail.divergence_floor, "{:.4f}")),
        ("calibration error (ECE)", " and ".join(f"{x:.3f}" for x in detail.calibration)),
        ("questions with tied best choices", " and ".join(f"{x:.2%}" for x in detail.ties)),
        ("first tied choice instead of fractions", f"{signed(100 * detail.tie_effect, 2)} pts"),
    ]
    if detail.letters is not None:
        for arm, mix in zip((item.arm, item.baseline), detail.letters, strict=True):
            shares = ", ".join(f"{100 * part:.0f}" for part in mix)
            rows.append((f"choices of {arm}, in their order", f"{shares}%"))
        explained = signed(100 * (detail.explained or 0), 2)
        rows.append(("accuracy difference that these mixes make", f"{explained} pts"))
    rows.append(("right only in the arm, only in the baseline", f"{detail.won}, {detail.lost}"))
    rows.append(("McNemar's mid-p of these (first runs)", p_text(detail.mcnemar_midp)))
    return Table(f"Answers of {item.arm} and {item.baseline}", ("", ""), tuple(rows))


def _effects(comparison: Comparison) -> Table:
    rows = tuple(
        (f"{item.arm} less {item.baseline}, {one.name}", difference(one), interval(one), one.word)
        for item in comparison.effects
        for one in (item.endpoints.get(key) for key in ("accuracy", "nll"))
        if one is not None
    )
    heads = ("", "difference", "95% interval", "shown")
    return Table("What training gains, and in which arm more", heads, rows)


def _chance(comparison: Comparison) -> Table:
    rows = tuple(
        (one.arm, f"{signed(100 * one.centred, 2)} ± {100 * one.stderr:.2f} pts",
         "not shown above chance" if one.at_chance else "above chance")
        for one in comparison.chance
    )  # fmt: skip
    return Table("Accuracy without letter preference, above that of the letters alone",
                 ("arm", "± standard error", "shown"), rows)  # fmt: skip


def _groups(item: Contrast, kind: str) -> Table:
    rows = tuple(
        (group.name.replace("_", " "), f"{group.n:,}", f"{100 * group.arm:.2f}",
         f"{100 * group.baseline:.2f}", signed(100 * (group.arm - group.baseline), 2),
         f"{signed(100 * group.low, 2)} to {signed(100 * group.high, 2)}", p_text(group.p))
        for group in item.groups
        if group.kind == kind
    )  # fmt: skip
    heads = ("", "n", f"{item.arm} %", f"{item.baseline} %", "difference", "95% interval",
             "p (Holm)")  # fmt: skip
    return Table(f"{item.arm} against {item.baseline} by {kind}", heads, rows)


def _settings(comparison: Comparison) -> list[Table]:
    labels = tuple(run.label for run in comparison.runs)
    different = tuple(
        (setting.name, *(_plain(item) for item in setting.values))
        for setting in comparison.different
    )
    same = tuple((setting.name, _plain(setting.values[0])) for setting in comparison.same)
    return [
        Table("Settings that differ", ("", *labels), different, numeric=False),
        Table("Settings that agree", ("", "value"), same, numeric=False),
    ]


def _plain(item: object) -> str:
    if item is None:
        return NOTHING
    return item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)

"""The tables behind the answer, for comparison.md and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from qlora_harness.compare.numbers import difference, interval, p_text, points, value, word
from qlora_harness.compare.record import ComparisonRecord, Contrast, Detail
from qlora_harness.results.terminal import NOTHING, duration, gib, optional

Row = tuple[str, ...]


class Table(NamedTuple):
    """A table of texts; the first column names the rows, `numeric` columns align right."""

    title: str
    columns: Row
    rows: Sequence[Row]
    numeric: bool = True


def tables(comparison: ComparisonRecord) -> list[Table]:
    """Returns all tables that have rows."""
    made = [_runs(comparison)]
    for item in comparison.contrasts:
        made.append(_endpoints(item))
        if item.detail is not None:
            made.append(_detail(item, item.detail))
    made += [_chance(comparison), _curves(comparison)]
    made += [_groups(item, kind) for item in comparison.primary for kind in ("category", "subject")]
    made += _settings(comparison)
    return [table for table in made if table.rows]


def _runs(comparison: ComparisonRecord) -> Table:
    rows: list[Row] = []
    for run in comparison.runs:
        score = optional(run.value, "{:.3f}")
        if run.value is not None and 0 <= run.value <= 1:
            error = "" if run.stderr is None else f" ± {100 * run.stderr:.2f}"
            score = f"{100 * run.value:.2f}%{error}"
        time = NOTHING if run.train_seconds is None else duration(run.train_seconds)
        loss, perplexity = optional(run.eval_loss, "{:.4f}"), optional(run.perplexity, "{:.3f}")
        others = [optional(run.benchmarks.get(task), "{:.4f}") for task in comparison.benchmarks]
        rows.append(
            (run.label, run.arm, optional(run.seed, "{}"), gib(run.peak_bytes), time, loss,
             perplexity, score, *others)
        )  # fmt: skip
    metric = f"{comparison.metric or 'accuracy'}, as recorded"
    heads = ("run", "arm", "seed", "peak GiB", "time", "eval loss", "perplexity", metric,
             *comparison.benchmarks)  # fmt: skip
    return Table("Runs", heads, rows)


def _endpoints(item: Contrast) -> Table:
    rows: list[Row] = []
    for one in item.endpoints.values():
        notes = (
            [f"90%: {interval(one, inner=True)}"]
            if one.within and one.inner_low is not None
            else []
        )
        notes += [one.reason] if one.reason else []
        shown = f"{word(one)} ({'; '.join(notes)})" if notes else word(one)
        scale, form = (100, "{:.2f}") if one.unit == "share" else (1, "{:.3f}")
        error = None if one.clustered_stderr is None else scale * one.clustered_stderr
        rows.append(
            (one.name, value(one, one.arm), value(one, one.baseline), difference(one),
             interval(one) or NOTHING, optional(error, form), p_text(one.p),
             optional(one.n, "{:,}"), shown)
        )  # fmt: skip
    heads = ("", item.arm, item.baseline, "difference", "95% interval", "SE by subject", "p", "n",
             "shown")  # fmt: skip
    return Table(f"{item.arm} against {item.baseline}", heads, rows)


def _detail(item: Contrast, detail: Detail) -> Table:
    floor = "the same between two seeds of one arm"
    rows = [
        ("questions whose best choice differs", f"{detail.flips:.2%}"),
        (floor, optional(detail.flips_floor, "{:.2%}")),
        (f"KL({item.baseline} ‖ {item.arm}), nats", f"{detail.divergence:.4f}"),
        (floor, optional(detail.divergence_floor, "{:.4f}")),
        ("calibration error (ECE)", " and ".join(f"{x:.3f}" for x in detail.calibration)),
        ("questions with tied best choices", " and ".join(f"{x:.2%}" for x in detail.ties)),
        ("effect of counting the first tied choice only", points(detail.tie_effect, " pts")),
    ]
    if detail.letters is not None:
        for arm, mix in zip((item.arm, item.baseline), detail.letters, strict=True):
            shares = ", ".join(f"{100 * part:.0f}" for part in mix)
            rows.append((f"share of each choice, {arm}", f"{shares}%"))
        explained = points(detail.explained or 0, " pts")
        rows.append(("accuracy difference from these shares alone", explained))
    rows.append(
        (
            f"right only in {item.arm}, only in {item.baseline} (first runs)",
            f"{detail.won}, {detail.lost}",
        )
    )
    return Table(f"Answers of {item.arm} and {item.baseline}", ("", ""), rows)


def _chance(comparison: ComparisonRecord) -> Table:
    rows = [
        (one.arm, f"{points(one.centred)} ± {100 * one.stderr:.2f} pts",
         "not shown above chance" if one.at_chance else "above chance")
        for one in comparison.chance
    ]  # fmt: skip
    title = "Accuracy above chance, without letter preference"
    return Table(title, ("arm", "± standard error", "shown"), rows)


def _curves(comparison: ComparisonRecord) -> Table:
    by_arm = {curve.arm: dict(zip(curve.steps, curve.mean, strict=True))
              for curve in comparison.curves}  # fmt: skip
    steps = sorted({step for losses in by_arm.values() for step in losses})
    rows = [
        (f"{step:,}", *(optional(losses.get(step), "{:.4f}") for losses in by_arm.values()))
        for step in steps
    ]
    title = "Held-out loss by step, nats per token, mean over seeds"
    return Table(title, ("step", *by_arm), rows)


def _groups(item: Contrast, kind: str) -> Table:
    rows = [
        (group.name.replace("_", " "), f"{group.n:,}", f"{100 * group.arm:.2f}",
         f"{100 * group.baseline:.2f}", points(group.arm - group.baseline),
         f"{points(group.low)} to {points(group.high)}", p_text(group.p))
        for group in item.groups
        if group.kind == kind
    ]  # fmt: skip
    heads = ("", "n", f"{item.arm} %", f"{item.baseline} %", "difference", "95% interval",
             "p (Holm)")  # fmt: skip
    return Table(f"{item.arm} against {item.baseline} by {kind}", heads, rows)


def _settings(comparison: ComparisonRecord) -> list[Table]:
    labels = [run.label for run in comparison.runs]
    different = [(one.name, *map(_json, one.values)) for one in comparison.different]
    same = [(one.name, _json(one.values[0])) for one in comparison.same]
    return [
        Table("Settings that differ", ("", *labels), different, numeric=False),
        Table("Settings that agree", ("", "value"), same, numeric=False),
    ]


def _json(item: object) -> str:
    if item is None:
        return NOTHING
    return item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)

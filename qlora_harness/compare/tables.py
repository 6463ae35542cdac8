"""The tables of a comparison as data; the terminal, Markdown and JSON all show these rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qlora_harness.compare.conditions import Conditions
from qlora_harness.compare.design import ArmSeeds, Effect, seed_difference
from qlora_harness.compare.evaluation import CATEGORIES, DEMO_FAMILY, Evaluation
from qlora_harness.compare.intersection import Intersection, Tally
from qlora_harness.compare.losses import LossDifference
from qlora_harness.compare.paired import GroupTest, Interval, PairedStatistics
from qlora_harness.compare.runs import Run, TrainingSummary
from qlora_harness.compare.statistics import Difference, PairedCounts, unpaired_difference
from qlora_harness.record import scrub

NOTHING = "–"
GIB = 2**30
_HASH_SHOWN = 12

ColumnKind = Literal["value", "difference", "ratio"]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: What a person reads.
        value: The number or text behind it, in the unit of the row; None where there is none.
        stderr: Its standard error in the same unit, where there is one.
        interval: Its 95% interval in the same unit, where there is one.
        label: Whose value it is, where that is not the run of its column: a label of a run, the
            name of an arm, or the minuend of a difference of differences.
    """

    text: str = NOTHING
    value: float | int | str | None = None
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    label: str | None = None


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        key: Its name for programs.
        name: Its name for people, with the unit.
        unit: The unit of its values, "" for none.
        cells: One cell per column.
    """

    key: str
    name: str
    unit: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Column:
    """One column after the names of the rows.

    Attributes:
        heading: What stands above it.
        run: Index of the run it belongs to; a difference belongs to the later run.
        kind: "value", "difference" (to the first run) or "ratio" (to the first run).
    """

    heading: str
    run: int
    kind: ColumnKind


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        key: Its name for programs.
        title: Its name for people.
        columns: The columns after the names of the rows.
        rows: The rows.
        numeric: Whether its cells are numbers, to be aligned on the right.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    numeric: bool = True


@dataclass(frozen=True)
class _Measure:
    """One row of the training table: what it shows of a summary and how it is written."""

    key: str
    name: str
    unit: str
    read: Callable[[TrainingSummary], float | None]
    write: Callable[[float], str]
    ratio_digits: int = 2


def cell_label(column: Column, cell: Cell, labels: Sequence[str]) -> str:
    """Returns whose value a cell holds; of a difference, the later of the two.

    Args:
        column: Its column.
        cell: The cell.
        labels: The names of the runs.
    """
    return labels[column.run] if cell.label is None else cell.label


def decimals(digits: int) -> Callable[[float], str]:
    """Returns a function that writes a number with a fixed number of decimals.

    Args:
        digits: Decimals.
    """
    return lambda value: f"{value:,.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Writes a time as h:mm:ss.

    Args:
        seconds: A time of at least 0, seconds.
    """
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


def signed(value: float, write: Callable[[float], str]) -> str:
    """Writes a difference with its sign; exactly 0 has none.

    Args:
        value: The difference.
        write: Writes its size.
    """
    sign = "" if value == 0 else "+" if value > 0 else "−"
    return f"{sign}{write(abs(value))}"


def points(difference: Difference) -> str:
    """Writes a difference of accuracies in percentage points with its standard error.

    Args:
        difference: The difference, as a share.
    """
    text = signed(100 * difference.value, decimals(2))
    if difference.stderr is None:
        return text
    return f"{text} ± {100 * difference.stderr:.2f}"


def gpu_peak_bytes(summary: TrainingSummary) -> float | None:
    """Returns the peak GPU memory held by tensors, bytes; None for a run on the CPU.

    Args:
        summary: A training summary.
    """
    return None if summary.device_type == "cpu" else summary.peak_allocated_bytes


def cpu_peak_bytes(summary: TrainingSummary) -> float | None:
    """Returns the peak resident memory of a run on the CPU, bytes; None for a run on a GPU.

    Args:
        summary: A training summary.
    """
    return summary.cpu_peak_rss_bytes if summary.device_type == "cpu" else None


def training_table(runs: Sequence[Run]) -> Table | None:
    """Builds the table of memory, time and loss; None if no run was trained here.

    Args:
        runs: The runs; those without a training summary get empty cells.
    """
    summaries = [run.training for run in runs]
    known = [summary for summary in summaries if summary is not None]
    if not known:
        return None
    rows = tuple(
        _training_row(measure, summaries)
        for measure in _MEASURES
        if measure.key not in _OPTIONAL or any(measure.read(item) is not None for item in known)
    )
    columns = _columns([run.label for run in runs], ("value", "difference", "ratio"))
    return Table("training", "Training", columns, rows)


def _gib(value: float | None) -> float | None:
    return None if value is None else value / GIB


def _on_gpu(summary: TrainingSummary, value: float | None) -> float | None:
    return None if summary.device_type == "cpu" else _gib(value)


_MEASURES = (
    _Measure(
        "peak_gpu_gib",
        "Peak GPU memory (GiB)",
        "GiB",
        lambda summary: _gib(gpu_peak_bytes(summary)),
        decimals(2),
    ),
    _Measure(
        "peak_gpu_reserved_gib",
        "Peak GPU memory, reserved (GiB)",
        "GiB",
        lambda summary: _on_gpu(summary, summary.peak_reserved_bytes),
        decimals(2),
    ),
    _Measure(
        "peak_gpu_device_gib",
        "Peak GPU memory, device (GiB)",
        "GiB",
        lambda summary: _on_gpu(summary, summary.peak_device_used_bytes),
        decimals(2),
    ),
    _Measure(
        "peak_cpu_gib",
        "Peak CPU memory (RSS, GiB)",
        "GiB",
        lambda summary: _gib(cpu_peak_bytes(summary)),
        decimals(2),
    ),
    _Measure(
        "train_seconds", "Training time (h:mm:ss)", "s", lambda item: item.train_seconds, duration
    ),
    _Measure(
        "tokens_per_second",
        "Throughput (tokens/s)",
        "tokens/s",
        lambda summary: summary.tokens_per_second,
        decimals(1),
    ),
    _Measure(
        "final_train_loss",
        "Final training loss (nats/token)",
        "nats/token",
        lambda summary: summary.final_train_loss,
        decimals(4),
        3,
    ),
    _Measure(
        "eval_loss",
        "Evaluation loss (nats/token)",
        "nats/token",
        lambda summary: summary.eval_loss,
        decimals(4),
        3,
    ),
    _Measure("perplexity", "Perplexity", "", lambda summary: summary.perplexity, decimals(3), 3),
)
# Rows that stand only where some run has a value.
_OPTIONAL = {"peak_gpu_reserved_gib", "peak_gpu_device_gib", "peak_cpu_gib"}


def _training_row(measure: _Measure, summaries: Sequence[TrainingSummary | None]) -> Row:
    values = [None if summary is None else measure.read(summary) for summary in summaries]
    first = values[0]
    cells = []
    for index, value in enumerate(values):
        cells.append(Cell() if value is None else Cell(measure.write(value), value))
        if index == 0:
            continue
        if first is None or value is None:
            cells += [Cell(), Cell()]
            continue
        cells.append(Cell(signed(value - first, measure.write), value - first))
        ratio = value / first if first else None
        cells.append(Cell() if ratio is None else Cell(f"{ratio:.{measure.ratio_digits}f}×", ratio))
    return Row(measure.key, measure.name, measure.unit, tuple(cells))


def mmlu_table(
    labels: Sequence[str],
    evaluations: Sequence[Evaluation | None],
    apart: Collection[int] = (),
) -> Table:
    """Builds the table of accuracies with standard errors and unpaired differences.

    Args:
        labels: The names of the runs.
        evaluations: Their evaluations of one family, None where there is none; at least one.
        apart: Indices of the runs that answered another set of questions than the first: their
            accuracies stand there without a difference.
    """
    known = [evaluation for evaluation in evaluations if evaluation is not None]
    rows = [
        _accuracy_row(
            "acc",
            "Accuracy, micro (%)",
            [None if item is None else (item.acc, item.acc_stderr) for item in evaluations],
            apart,
        ),
        _accuracy_row(
            "acc_macro",
            "Accuracy, macro (%)",
            [
                None if item is None else (item.acc_macro, item.acc_macro_stderr)
                for item in evaluations
            ],
            apart,
        ),
        *_category_rows(evaluations, known, apart),
        _tie_row(evaluations, apart),
    ]
    columns = _columns(labels, ("value", "difference"), " (unpaired, points)")
    title = _mmlu_title(known[0])
    if apart:
        sizes = ", ".join(
            f"{label} {item.n:,}"
            for label, item in zip(labels, evaluations, strict=True)
            if item is not None
        )
        title = f"MMLU: {known[0].family}, each run over its own questions ({sizes})"
    return Table("mmlu", title, columns, tuple(rows))


def _mmlu_title(evaluation: Evaluation) -> str:
    number = f"{evaluation.n:,}"
    if evaluation.limited:
        number += f" of {evaluation.n_total:,}"
    title = f"MMLU: {evaluation.family}, {number} question{'' if number == '1' else 's'}"
    if evaluation.family == DEMO_FAMILY:
        title += " (the embedded demo set, not a benchmark)"
    return title


def _category_rows(
    evaluations: Sequence[Evaluation | None], known: Sequence[Evaluation], apart: Collection[int]
) -> list[Row]:
    found = {key for evaluation in known for key in evaluation.categories}
    rows = []
    for key in [*CATEGORIES, *sorted(found - CATEGORIES.keys())]:
        if key not in found:
            continue
        scores = [None if item is None else item.categories.get(key) for item in evaluations]
        sizes = {score.n for score in scores if score is not None and score.n is not None}
        size = f"n = {sizes.pop():,}, " if len(sizes) == 1 else ""
        rows.append(
            _accuracy_row(
                f"category.{key}",
                f"{CATEGORIES.get(key, key)} ({size}%)",
                [None if score is None else (score.acc, score.acc_stderr) for score in scores],
                apart,
            )
        )
    return rows


def _accuracy_row(
    key: str,
    name: str,
    scores: Sequence[tuple[float, float | None] | None],
    apart: Collection[int],
) -> Row:
    first = scores[0]
    cells = []
    for index, score in enumerate(scores):
        cells.append(Cell() if score is None else _accuracy_cell(*score))
        if index == 0:
            continue
        if first is None or score is None or index in apart:
            cells.append(Cell())
        else:
            cells.append(_difference_cell(unpaired_difference(*first, *score)))
    return Row(key, name, "%", tuple(cells))


def _accuracy_cell(acc: float, stderr: float | None) -> Cell:
    text = f"{100 * acc:.2f}"
    if stderr is None:
        return Cell(text, 100 * acc)
    return Cell(f"{text} ± {100 * stderr:.2f}", 100 * acc, 100 * stderr)


def _difference_cell(difference: Difference) -> Cell:
    stderr = None if difference.stderr is None else 100 * difference.stderr
    return Cell(points(difference), 100 * difference.value, stderr)


def _tie_row(evaluations: Sequence[Evaluation | None], apart: Collection[int]) -> Row:
    ties = [None if item is None else item.ties for item in evaluations]
    cells = []
    for index, count in enumerate(ties):
        cells.append(Cell() if count is None else Cell(f"{count:,}", count))
        if index == 0:
            continue
        if ties[0] is None or count is None or index in apart:
            cells.append(Cell())
        else:
            cells.append(Cell(signed(count - ties[0], decimals(0)), count - ties[0]))
    return Row("ties", "Tied best choices", "questions", tuple(cells))


def common_table(shared: Mapping[int, Intersection]) -> Table:
    """Builds the table of the questions compared and dropped under --intersect.

    Args:
        shared: What each later run has in common with the first, by its index.

    Returns:
        A line for all questions, then one for each task that lost some.
    """
    columns = []
    for index, item in shared.items():
        columns += [
            Column(f"{item.run}: common", index, "value"),
            Column(f"dropped of {item.baseline}", index, "value"),
            Column(f"dropped of {item.run}", index, "value"),
        ]

    def row(key: str, name: str, tallies: Sequence[Tally]) -> Row:
        cells = []
        for tally, item in zip(tallies, shared.values(), strict=True):
            cells += [
                Cell(f"{tally.common:,}", tally.common),
                Cell(f"{tally.dropped_baseline:,}", tally.dropped_baseline, label=item.baseline),
                Cell(f"{tally.dropped_run:,}", tally.dropped_run),
            ]
        return Row(key, name, "questions", tuple(cells))

    none = Tally(0, 0, 0)
    rows = [row("common.all", "All tasks", [item.total for item in shared.values()])]
    for subject in sorted({name for item in shared.values() for name in item.by_subject}):
        tallies = [item.by_subject.get(subject, none) for item in shared.values()]
        if any(tally.dropped for tally in tallies):
            rows.append(row(f"common.{subject}", subject, tallies))
    title = "Questions that both runs answered (--intersect)"
    return Table("common", title, tuple(columns), tuple(rows))


def common_words(size: int | None) -> str:
    """Says over how many questions a number is that all runs have in common.

    Args:
        size: The number of questions, or None where each run answered the same ones.
    """
    return "" if size is None else f", {size:,} questions common to all runs"


def _common_rows(first: str, other: str, paired: Mapping[int, PairedStatistics]) -> list[Row]:
    """The accuracies behind a paired difference, over the common questions."""

    def row(key: str, name: str, share: Callable[[PairedCounts], int], macro: bool) -> Row:
        cells = []
        for item in paired.values():
            groups = [group.counts for group in item.subjects] if macro else [item.counts]
            shares = [share(counts) / counts.total for counts in groups]
            cells.append(_percent(math.fsum(shares) / len(shares)))
        return Row(key, name, "%", tuple(cells))

    def one(counts: PairedCounts) -> int:
        return counts.both + counts.only_first

    def two(counts: PairedCounts) -> int:
        return counts.both + counts.only_second

    words = "common questions (%)"
    return [
        Row(
            "common",
            "Common questions",
            "questions",
            tuple(Cell(f"{i.counts.total:,}", i.counts.total) for i in paired.values()),
        ),
        row("common_acc_first", f"{first}: micro, {words}", one, False),
        row("common_acc_second", f"{other}: micro, {words}", two, False),
        row("common_acc_macro_first", f"{first}: macro, {words}", one, True),
        row("common_acc_macro_second", f"{other}: macro, {words}", two, True),
    ]


_PairedMeasure = tuple[str, str, str, Callable[[PairedStatistics], Cell]]


def paired_table(
    labels: Sequence[str], paired: Mapping[int, PairedStatistics], *, common: bool = False
) -> Table:
    """Builds the table of right and wrong answers, question by question, and what it shows.

    Args:
        labels: The names of the runs.
        paired: For each later run with samples, by index, its statistics against the first run.
        common: Whether they are over the common questions only, so that the accuracies of the
            runs' own evaluations are not those behind the differences.
    """
    first = labels[0]
    other = labels[next(iter(paired))] if len(paired) == 1 else "the other"
    margin = 100 * next(iter(paired.values())).margin
    counted = (
        ("both", "Right in both"),
        ("only_first", f"Right only in {first}"),
        ("only_second", f"Right only in {other}"),
        ("neither", "Wrong in both"),
    )
    rows = _common_rows(first, other, paired) if common else []
    rows += [
        Row(
            key,
            name,
            "questions",
            tuple(
                Cell(f"{getattr(item.counts, key):,}", getattr(item.counts, key))
                for item in paired.values()
            ),
        )
        for key, name in counted
    ]
    several: tuple[_PairedMeasure, ...] = ()
    if len(paired) > 1:
        name = f"  after Holm's correction over {len(paired)} runs"
        several = (("mcnemar_p_holm", name, "", lambda i: _p_cell(i.mcnemar_holm)),)
    shown: tuple[_PairedMeasure, ...] = (
        ("agreement", "Same letter (%)", "%", lambda i: _percent(i.agreement)),
        (
            "difference",
            "Difference, paired (points)",
            "points",
            lambda i: _difference_cell(i.difference),
        ),
        (
            "interval",
            "  95% interval, bootstrap",
            "points",
            lambda i: _interval_cell(i.difference.value, i.interval),
        ),
        ("macro", "Difference of macro accuracy (points)", "points", lambda i: _points(i.macro)),
        (
            "macro_interval",
            "  95% interval, bootstrap within subjects",
            "points",
            lambda i: _interval_cell(i.macro, i.macro_interval),
        ),
        ("mcnemar_p", "p, test of no difference (McNemar)", "", lambda i: _p_cell(i.mcnemar_p)),
        *several,
        (
            "equivalence_p",
            f"p, test of ±{margin:g} points or more",
            "",
            lambda i: _p_cell(i.equivalence_p),
        ),
        (
            "detectable",
            "Difference found 4 times in 5 (points)",
            "points",
            lambda i: Cell(f"{100 * i.detectable:.2f}", 100 * i.detectable),
        ),
    )
    rows += [
        Row(key, name, unit, tuple(make(item) for item in paired.values()))
        for key, name, unit, make in shown
    ]
    columns = tuple(
        Column(f"{labels[index]} against {first}", index, "difference") for index in paired
    )
    title = "MMLU, question by question" + (", common questions only" if common else "")
    return Table("paired", title, columns, tuple(rows))


def losses_table(
    labels: Sequence[str],
    differences: Mapping[int, LossDifference],
    perplexities: Mapping[int, Interval],
) -> Table:
    """Builds the table of loss differences with intervals over conversations.

    Args:
        labels: The names of the runs.
        differences: For each later run, by index, its losses against the first run.
        perplexities: Interval of the perplexity of each run, by index, where it is known.
    """

    def row(key: str, name: str, unit: str, cells: Mapping[int, Cell]) -> Row:
        return Row(key, name, unit, tuple(cells.get(i, Cell()) for i in (0, *differences)))

    write = decimals(4)
    nats = "nats/token"
    count = next(iter(differences.values())).conversations

    def change(value: float | None) -> Cell:
        return Cell() if value is None else Cell(signed(value, write), value)

    intervals = {
        i: Cell(
            f"{signed(d.interval.low, write)} to {signed(d.interval.high, write)}",
            d.evaluation,
            None,
            (d.interval.low, d.interval.high),
        )
        for i, d in differences.items()
        if d.interval is not None
    }
    rows = [
        row(
            "perplexity_interval",
            "Perplexity, 95% interval",
            "",
            {
                i: Cell(f"{p.low:.3f} to {p.high:.3f}", None, None, (p.low, p.high))
                for i, p in perplexities.items()
            },
        ),
        row(
            "eval_difference",
            "Evaluation loss, difference",
            nats,
            {i: change(d.evaluation) for i, d in differences.items()},
        ),
        row("eval_interval", "  95% interval, bootstrap", nats, intervals),
        row(
            "steps_difference",
            "Training loss, mean difference of steps",
            nats,
            {i: change(d.steps) for i, d in differences.items()},
        ),
        row(
            "last_steps_difference",
            "  of the last tenth",
            nats,
            {i: change(d.last_steps) for i, d in differences.items()},
        ),
    ]
    columns = [Column(labels[0], 0, "value")]
    columns += [Column(labels[i], i, "difference") for i in differences]
    title = "Losses on the same data" + (f", {count:,} conversations" if count else "")
    shown = tuple(r for r in rows if any(cell.text != NOTHING for cell in r.cells))
    return Table("losses", title, tuple(columns), shown)


def groups_table(
    labels: Sequence[str],
    paired: Mapping[int, PairedStatistics],
    kind: Literal["subjects", "categories"],
    *,
    common: bool = False,
) -> Table:
    """Builds the table of paired differences by subject or category.

    Args:
        labels: The names of the runs.
        paired: For each later run with samples, by index, its statistics against the first run.
        kind: Which groups.
        common: Whether they are over the common questions only.
    """
    groups: list[dict[str, GroupTest]] = [
        {group.name: group for group in getattr(item, kind)} for item in paired.values()
    ]
    names = list(dict.fromkeys(name for found in groups for name in found))
    if kind == "subjects":
        names.sort()
    columns = []
    for index in paired:
        heading = f"{labels[index]} against {labels[0]}"
        columns += [
            Column(f"{heading} (points)", index, "difference"),
            Column("right only in one (first, second)", index, "value"),
            Column("p, Holm", index, "value"),
        ]
    rows = []
    for name in names:
        cells: list[Cell] = []
        for found in groups:
            group = found.get(name)
            if group is None:  # no question of it is common to these two runs
                cells += [Cell(), Cell(), Cell()]
                continue
            counts = group.counts
            changed = f"{counts.only_first:,}, {counts.only_second:,}"
            cells += [
                _difference_cell(group.difference),
                Cell(changed, changed),
                _p_cell(group.adjusted),
            ]
        totals = [found[name].counts.total if name in found else 0 for found in groups]
        sizes = totals[:1] if len(set(totals)) == 1 else totals
        size = ", ".join(f"{total:,}" for total in sizes)
        shown = CATEGORIES.get(name, name)
        rows.append(Row(f"{kind}.{name}", f"{shown} (n = {size})", "points", tuple(cells)))
    title = "MMLU, paired, by " + ("subject" if kind == "subjects" else "category")
    title += ", common questions only" if common else ""
    return Table(kind, title, tuple(columns), tuple(rows))


def _percent(share: float) -> Cell:
    return Cell(f"{100 * share:.2f}", 100 * share)


def _points(share: float) -> Cell:
    return Cell(signed(100 * share, decimals(2)), 100 * share)


def _interval_cell(value: float, interval: Interval | None) -> Cell:
    if interval is None:
        return Cell()
    return Cell(
        interval_text(interval), 100 * value, None, (100 * interval.low, 100 * interval.high)
    )


def interval_text(interval: Interval) -> str:
    """Writes an interval of a difference in percentage points.

    Args:
        interval: As shares.
    """
    low, high = (signed(100 * end, decimals(2)) for end in (interval.low, interval.high))
    return f"{low} to {high}"


def p_text(p: float) -> str:
    """Writes a p-value.

    Args:
        p: 0 to 1.
    """
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def _p_cell(p: float) -> Cell:
    return Cell(p_text(p), p)


def design_table(found: Sequence[Effect], common: int | None = None) -> Table:
    """Builds the table that separates quantisation from fine-tuning.

    Args:
        found: From `design.effects`.
        common: The number of questions that all runs have in common, where they did not answer
            the same ones.
    """
    how = "paired" if all(effect.paired for effect in found) else "unpaired"
    rows = tuple(
        Row(
            effect.key,
            effect.name,
            "points",
            (
                replace(
                    _difference_cell(Difference(effect.value, effect.stderr, effect.paired)),
                    label=effect.run,
                ),
            ),
        )
        for effect in found
    )
    columns = (Column(f"accuracy, micro (points, {how})", 0, "difference"),)
    title = f"What the 4 bits cost and what fine-tuning gains{common_words(common)}"
    return Table("design", title, columns, rows)


def seeds_table(
    key: str, name: str, unit: str, write: Callable[[float], str], arms: Sequence[ArmSeeds]
) -> Table:
    """Builds the table of a measure over seeds: means, spread, and the seeds' share of differences.

    Args:
        key: Its name for programs.
        name: Its name for people.
        unit: Of its values.
        write: Writes a value.
        arms: From `design.seeds`.

    Returns:
        Three rows: means with ranges and differences; the standard deviation between seeds, pooled
        where it is that of a difference; the relative standard error of each difference.
    """
    first = arms[0]
    columns = [
        Column(f"{arm.name}, {len(arm.values)} seed{'s' * (len(arm.values) > 1)}", 0, "value")
        for arm in arms
    ]
    cells = [
        Cell(
            f"{write(arm.mean)} ({write(min(arm.values))} to {write(max(arm.values))})",
            arm.mean,
            arm.stderr,
            label=arm.name,
        )
        for arm in arms
    ]
    spreads = [
        Cell(label=arm.name) if arm.sd is None else Cell(write(arm.sd), arm.sd, label=arm.name)
        for arm in arms
    ]
    shares = [Cell(label=arm.name) for arm in arms]
    for arm in arms[1:]:
        columns.append(Column(f"{arm.name} less {first.name}, ± of the seeds", 0, "difference"))
        change = seed_difference(first, arm, arms)
        text = signed(change.value, write)
        text += "" if change.stderr is None else f" ± {write(change.stderr)}"
        cells.append(Cell(text, change.value, change.stderr, label=arm.name))
        spread = f"{write(change.pooled_sd)} (pooled)"
        spreads.append(Cell(spread, change.pooled_sd, label=arm.name))
        share = change.relative_stderr
        shares.append(replace(Cell() if share is None else _percent(share), label=arm.name))
    rows = (
        Row(key, name, unit, tuple(cells)),
        Row(f"{key}.sd", "  standard deviation between seeds", unit, tuple(spreads)),
        Row(f"{key}.relative_stderr", "  relative standard error (seeds, %)", "%", tuple(shares)),
    )
    return Table(key, f"{name} over seeds: mean (range)", tuple(columns), rows)


def settings_table(labels: Sequence[str], conditions: Conditions) -> Table:
    """Builds the table of every setting in which the runs differ.

    Args:
        labels: The names of the runs.
        conditions: Their conditions.
    """
    rows = tuple(
        Row(
            setting.name,
            setting.name,
            "",
            tuple(_setting_cell(value) for value in setting.values),
        )
        for setting in conditions.different
    )
    columns = tuple(Column(label, index, "value") for index, label in enumerate(labels))
    return Table("settings", "Settings that differ", columns, rows, numeric=False)


def _setting_cell(value: object) -> Cell:
    if value is None:
        return Cell()
    if isinstance(value, (bool, list)):
        text = json.dumps(value, ensure_ascii=False)
        return Cell(text, text)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return Cell(str(value), value)
    text = scrub(str(value))
    return Cell(_shorten_hash(text), text)


def _shorten_hash(text: str) -> str:
    kind, _, digits = text.rpartition(":")
    is_hash = len(digits) in (40, 64) and all(digit in "0123456789abcdef" for digit in digits)
    if not is_hash:
        return text
    return f"{kind}:{digits[:_HASH_SHOWN]}…" if kind else f"{digits[:_HASH_SHOWN]}…"


def _columns(
    labels: Sequence[str], kinds: Sequence[ColumnKind], unit: str = ""
) -> tuple[Column, ...]:
    columns = [Column(labels[0], 0, "value")]
    for index, label in enumerate(labels[1:], start=1):
        for kind in kinds:
            columns.append(Column(_heading(label, kind, unit, len(labels) == 2), index, kind))
    return tuple(columns)


def _heading(label: str, kind: ColumnKind, unit: str, only_pair: bool) -> str:
    if kind == "value":
        return label
    if only_pair:
        return f"{kind}{unit}"
    # Beside several pairs of runs the heading has to say whose difference it is.
    return f"Δ {label}{unit}" if kind == "difference" else f"{label} ×"

"""The table of accuracies, each run by itself, with unpaired differences."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qlora_harness.compare.evaluation import CATEGORIES, DEMO_FAMILY, Evaluation
from qlora_harness.compare.statistics import unpaired_difference
from qlora_harness.compare.tables.cells import difference_cell
from qlora_harness.compare.tables.number_text import decimals, signed
from qlora_harness.compare.tables.table import Cell, Row, Table, columns_of
from qlora_harness.families import LETTERS


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
        *_letter_rows(evaluations),
    ]
    columns = columns_of(labels, ("value", "difference"), " (unpaired, points)")
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
            cells.append(difference_cell(unpaired_difference(*first, *score)))
    return Row(key, name, "%", tuple(cells))


def _accuracy_cell(acc: float, stderr: float | None) -> Cell:
    text = f"{100 * acc:.2f}"
    if stderr is None:
        return Cell(text, 100 * acc)
    return Cell(f"{text} ± {100 * stderr:.2f}", 100 * acc, 100 * stderr)


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


def _letter_rows(evaluations: Sequence[Evaluation | None]) -> list[Row]:
    """How often each letter was the answer, where the answers are known one by one."""
    shares = [
        None if item is None or item.letters is None else [100 * n / item.n for n in item.letters]
        for item in evaluations
    ]
    if not any(shares):
        return []
    rows = []
    for place, letter in enumerate(LETTERS):
        cells: list[Cell] = []
        for index, share in enumerate(shares):
            cells.append(Cell() if share is None else Cell(f"{share[place]:.1f}", share[place]))
            if index > 0:
                cells.append(Cell())
        rows.append(Row(f"letter.{letter}", f"Answers {letter} (%)", "%", tuple(cells)))
    return rows

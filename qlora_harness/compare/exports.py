"""A comparison's tables as CSV and LaTeX, and its figures as pictures."""

from __future__ import annotations

import csv
import io
import re
from importlib.util import find_spec
from pathlib import Path

from qlora_harness.compare.figures import HEADINGS, figures
from qlora_harness.compare.report import Comparison
from qlora_harness.compare.tables.table import Row, Table, cell_label
from qlora_harness.errors import ResultsError, SettingsError
from qlora_harness.record import new_folder

FIELDS = ("table", "row", "name", "unit", "run", "kind", "value", "stderr", "low", "high", "text")
_PIXELS = 900  # width of a picture; it is drawn at twice this resolution


def to_csv(comparison: Comparison) -> str:
    """Returns every cell of every table as one line.

    Args:
        comparison: The comparison.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    labels = [run.label for run in comparison.runs]
    for table in (*comparison.tables, *comparison.details, comparison.settings):
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                low, high = cell.interval or (None, None)
                run = cell_label(column, cell, labels)
                values = (cell.value, cell.stderr, low, high, cell.text)
                names = [table.key, row.key, row.name, row.unit, run, column.kind]
                writer.writerow([_cell(value) for value in (*names, *values)])
    return out.getvalue()


def _cell(value: object) -> object:
    """A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    number = formula and _is_number(str(value))
    return f"'{value}" if formula and not number else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_latex(comparison: Comparison) -> str:
    """Returns the tables of numbers as LaTeX, for the package booktabs.

    Args:
        comparison: The comparison.
    """
    parts = ["% Made by qlora-harness compare; needs \\usepackage{booktabs}"]
    for table in comparison.tables:
        parts += ["", *_latex_table(table)]
    return "\n".join(parts) + "\n"


def _latex_table(table: Table) -> list[str]:
    def line(texts: list[str], start: str = "") -> str:
        return start + " & ".join(map(_latex, texts)) + r" \\"

    def row_line(row: Row) -> str:
        texts = [row.name.strip(), *(cell.text for cell in row.cells)]
        return line(texts, r"\quad " if row.under else "")

    return [
        rf"% {table.title}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        line(["", *(column.heading for column in table.columns)]),
        r"\midrule",
        *map(row_line, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def check_pictures(folder: Path) -> None:
    """Refuses before any work what would keep pictures from being made.

    Args:
        folder: Where they shall go.

    Raises:
        SettingsError: A package is missing, or the folder holds something else.
    """
    for name in ("plotly", "kaleido"):
        if find_spec(name) is None:
            raise SettingsError(
                f"--png needs the package {name}", "pip install 'qlora-harness[reports]'"
            )
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    foreign = [p.name for p in entries if p.name not in PICTURES or not p.is_file()]
    if foreign or folder.is_file():
        raise SettingsError(
            f"--png {folder} holds something else ({foreign[0] if foreign else 'it is a file'})",
            "Name a folder for the pictures alone",
        )


def _picture(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") + ".png"


PICTURES = frozenset(map(_picture, HEADINGS))


def write_pictures(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes each figure as a PNG file, on white.

    Args:
        comparison: The comparison.
        folder: Replaced as a whole.

    Returns:
        The files.

    Raises:
        ResultsError: No browser was found to draw them.
    """
    names = []
    with new_folder(folder, replace=True) as work:
        for heading, figure in figures(comparison.evidence):
            name = _picture(heading)
            figure.update_layout(
                paper_bgcolor="white", plot_bgcolor="white", font={"color": "black"}
            )
            try:
                figure.write_image(work / name, width=_PIXELS, scale=2)
            except Exception as error:  # Kaleido and its browser raise many kinds
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise ResultsError(
                    f"--png {folder}: the figures can't be drawn ({reason[0]})",
                    "Install Chrome or Chromium, or set BROWSER_PATH; or use --html",
                ) from None
            names.append(name)
    return [folder / name for name in names]

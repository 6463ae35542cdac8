"""Length, repetition and script of answers: what can be counted without judging quality."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from rich.markup import escape
from rich.table import Table

from qlora_harness.data.files import read_rows
from qlora_harness.errors import DataError

_LONG = 12  # characters; shows repetition in languages without spaces, too
_REMEDY = "Name a file that `qlora-harness generate` wrote"


def read_outputs(path: Path) -> list[str]:
    """Returns the outputs in a file of answers; raises DataError if it is not one."""
    rows = list(read_rows(path)) if path.is_file() else []
    if not rows:
        raise DataError(f"{path} holds no answers", _REMEDY)
    for row in rows:
        if not isinstance(row.values.get("output"), str):
            raise DataError(f"{row.place} has no text 'output'", _REMEDY)
    return [row.values["output"] for row in rows]


def distinct_share(units: Sequence[str], n: int) -> float | None:
    """Returns the share of different n-grams of words or characters; None without any."""
    grams = [tuple(units[at : at + n]) for at in range(len(units) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def scripts(outputs: Sequence[str]) -> dict[str, float]:
    """Returns the share of all letters in each script, the largest first, by Unicode's names."""
    letters = Counter(letter for output in outputs for letter in output if letter.isalpha())
    counts: Counter[str] = Counter()
    for letter, count in letters.items():
        counts[unicodedata.name(letter, "UNKNOWN").partition(" ")[0].capitalize()] += count
    return {name: count / letters.total() for name, count in counts.most_common()}


def statistics(outputs: Sequence[str]) -> dict[str, str]:
    """Returns the counted properties of answers, as texts by name."""
    words = [output.split() for output in outputs]
    lengths = [len(each) for each in words]
    rows = {
        "answers": f"{len(outputs):,}",
        "empty answers": f"{sum(not length for length in lengths):,}",
        "characters an answer, mean": f"{mean(map(len, outputs)):.1f}",
        "words an answer, mean": f"{mean(lengths):.1f}",
        "words an answer, median": f"{median(lengths):.1f}",
    }
    for n in (1, 2, 3):
        rows[f"distinct {n}-grams of words"] = _mean_share(words, n)
    rows[f"distinct {_LONG}-grams of characters"] = _mean_share(outputs, _LONG)
    by_script = [f"{name} {100 * share:.1f}%" for name, share in scripts(outputs).items()]
    rows["letters by script"] = ", ".join(by_script[:3]) or "–"
    return rows


def _mean_share(answers: Sequence[Sequence[str]], n: int) -> str:
    shares = [share for answer in answers if (share := distinct_share(answer, n)) is not None]
    return f"{mean(shares):.3f}" if shares else "–"


def statistics_table(files: Sequence[Path]) -> Table:
    """Returns the properties of one or more files of answers, a column for each."""
    columns = [statistics(read_outputs(path)) for path in files]
    table = Table("counted", *(escape(str(path)) for path in files), box=None, header_style="bold")
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table

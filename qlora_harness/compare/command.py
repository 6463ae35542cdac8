"""`qlora-harness compare RUN_A RUN_B [RUN_C …]`: flags and output files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qlora_harness.errors import SettingsError, printable
from qlora_harness.flag_checks import check_output_file
from qlora_harness.record import write_text
from qlora_harness.results.scored import DEFAULT_TASK

MARKDOWN_FILE = "comparison.md"
JSON_FILE = "comparison.json"
# How to recognise an earlier comparison, which may be overwritten.
_MARKS = {
    "--markdown": "# What do the 4 bits cost?",
    "--json": '"kind": "comparison"',
    "--html": '<meta name="generator" content="qlora-harness compare">',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `compare`."""
    add, switch = parser.add_argument, partial(parser.add_argument, action="store_true")
    add(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="two or more runs: a folder such as results/4bit, a results_*.json of lm_eval, or a "
        "folder that holds one; runs that differ only in their seed are one arm",
    )
    task = (
        f"the task to compare first, any of lm_eval (default: {DEFAULT_TASK} if all runs have it, "
        "else another that they have in common)"
    )
    add("--task", metavar="NAME", help=task)
    metric = "metric of that task, for example acc_norm or exact_match,flexible-extract"
    add("--metric", metavar="NAME[,FILTER]", help=metric)
    baseline = "the arm or run that the others are compared with (default: bf16, else the first)"
    add("--baseline", metavar="NAME", help=baseline)
    margin = "accuracies within ± this many percentage points count as equal (default %(default)g)"
    add("--margin", type=float, default=1.0, metavar="POINTS", help=margin)
    limit = "compare runs scored with the same --limit"
    switch("--allow-limit", help=limit)
    intersect = "compare only the questions that all runs answered"
    switch("--intersect", help=intersect)
    different = "compare runs trained on different data"
    switch("--allow-different-data", help=different)
    for flag, text in (
        ("--markdown", f"default: {MARKDOWN_FILE} beside the runs"),
        ("--json", f"default: {JSON_FILE} beside the runs"),
        ("--html", "also write a self-contained HTML page with figures (about 5 MB)"),
    ):
        add(flag, type=Path, metavar="FILE", help=text)


def run(args: argparse.Namespace) -> None:
    """Compares the runs, writes the comparison, and prints the answer.

    Raises SettingsError, ResultsError or ComparisonError; nothing is written then.
    """
    if not 0 < args.margin < 100:
        raise SettingsError(
            f"--margin {args.margin:g}", "Give percentage points, above 0 and below 100"
        )
    folder = _common_folder(args.runs)
    outputs = {
        "--markdown": args.markdown or folder / MARKDOWN_FILE,
        "--json": args.json or folder / JSON_FILE,
        "--html": args.html,
    }
    outputs = {flag: path for flag, path in outputs.items() if path is not None}
    _check_outputs(outputs)
    from qlora_harness.compare import page, text
    from qlora_harness.compare.comparison import compare

    if args.html is not None:
        page.check_packages()
    comparison = compare(
        args.runs,
        baseline=args.baseline,
        task=args.task,
        metric=args.metric,
        margin=args.margin / 100,
        allow_limit=args.allow_limit,
        allow_different_data=args.allow_different_data,
        intersect=args.intersect,
    )
    texts = {
        "--markdown": printable(text.markdown(comparison), keep="\n"),
        "--json": comparison.model_dump_json(indent=1) + "\n",
    }
    if args.html is not None:
        texts["--html"] = page.to_html(comparison)
    # Written before printing: whoever closes the pipe early loses no file.
    for flag, path in outputs.items():
        write_text(path, texts[flag])
    print(printable(text.answer(comparison), keep="\n"))
    print(printable(text.differences_line(comparison, text.COLUMNS)))
    print(printable(f"Details: {', '.join(str(path) for path in outputs.values())}"))


def _common_folder(paths: Sequence[Path]) -> Path:
    """Returns the folder that holds all runs; the working directory if that is only "/"."""
    if not paths:
        return Path()
    common = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    if common == Path(common.anchor):
        return Path()
    try:
        return common.relative_to(Path.cwd())
    except ValueError:
        return common


def _check_outputs(outputs: dict[str, Path]) -> None:
    """Refuses files that can't be written, that are given twice, or that others wrote."""
    taken: dict[Path, str] = {}
    for flag, path in outputs.items():
        other = taken.setdefault(path.resolve(), flag)
        if other != flag:
            raise SettingsError(f"{other} and {flag} are both {path}", "Name two files")
        check_output_file(flag, path)
        if path.exists() and not _is_ours(path, _MARKS[flag]):
            raise SettingsError(
                f"{flag} {path} exists and was not written by qlora-harness compare",
                "Name another file, or move it away",
            )


def _is_ours(path: Path, mark: str) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return mark in file.read(600)
    except (OSError, UnicodeDecodeError):
        return False

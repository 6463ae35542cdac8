"""`qlora-harness compare RUN_A RUN_B [RUN_C …]`: the flags, and where the result is written."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_harness.compare import exports, page, report
from qlora_harness.compare.comparison import compare
from qlora_harness.compare.evaluation import DEFAULT_FAMILY, FAMILIES
from qlora_harness.compare.output import PipedConsole
from qlora_harness.compare.paired import DEFAULT_DRAWS, DEFAULT_MARGIN, DEFAULT_SEED
from qlora_harness.errors import ResultsError, SettingsError, printable
from qlora_harness.record import read_json, write_json, write_text

MARKDOWN_FILE = "comparison.md"
JSON_FILE = "comparison.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `compare`.

    Args:
        parser: The parser of the subcommand.
    """
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="two or more runs: a folder such as results/4bit, a results_*.json of lm_eval, or a "
        "folder that holds one; differences are against the first",
    )
    parser.add_argument(
        "--task",
        metavar="NAME",
        help=f"the MMLU family to compare: {', '.join(FAMILIES)} (default: {DEFAULT_FAMILY} if all "
        "runs have it, else the only one they have in common)",
    )
    parser.add_argument(
        "--labels", metavar="A,B,…", help="names of the runs in the tables, separated by commas"
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="the run that differences are against, by its name in the tables (default: the first)",
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help=f"write Markdown here (default: {MARKDOWN_FILE} beside the runs)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"write JSON here (default: {JSON_FILE} beside the runs)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write one page with figures here, which needs no network (about 5 MB)",
    )
    parser.add_argument(
        "--png",
        type=Path,
        metavar="DIR",
        help="write the figures as pictures into this folder (needs Chrome or Chromium)",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write every cell of every table as a line here"
    )
    parser.add_argument(
        "--latex", type=Path, metavar="FILE", help="write the tables for LaTeX (booktabs) here"
    )
    parser.add_argument(
        "--allow-limit",
        action="store_true",
        help="compare runs scored with --limit, if all have the same limit and questions",
    )
    parser.add_argument(
        "--intersect",
        action="store_true",
        help="compare runs that answered different sets of questions, also with --limit, on those "
        "that each has in common with the baseline (needs logged samples or mmlu_progress files); "
        "what is dropped is counted",
    )
    parser.add_argument(
        "--allow-different-data",
        action="store_true",
        help="compare runs trained on different data; a note says so",
    )
    parser.add_argument(
        "--rescore",
        action="store_true",
        help="recompute every answer from its logged log-probabilities, and fail if it differs",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=100 * DEFAULT_MARGIN,
        metavar="POINTS",
        help="is the difference shown to be within ± so many percentage points? (default "
        "%(default)g)",
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=DEFAULT_DRAWS,
        metavar="N",
        help="samples of the bootstrap (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, metavar="N", help="of the bootstrap (default 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Compares the runs, writes the comparison as Markdown and JSON, and prints it.

    Args:
        args: What add_arguments defines.

    Returns:
        The exit status, 0.

    Raises:
        SettingsError: A flag has an unusable value.
        ResultsError: A file is unreadable, or an output file can't be written.
        ComparisonError: The runs can't be compared; nothing is written.
    """
    labels = None if args.labels is None else args.labels.split(",")
    folder = common_folder(args.runs)
    markdown_file = args.markdown or folder / MARKDOWN_FILE
    json_file = args.json or folder / JSON_FILE
    if markdown_file.resolve() == json_file.resolve():
        raise SettingsError(f"--markdown and --json are both {json_file}", "Name two files")
    _check_output(markdown_file, _is_our_markdown)
    _check_output(json_file, _is_our_json)
    extra = {"--html": args.html, "--csv": args.csv, "--latex": args.latex}
    taken = [markdown_file.resolve(), json_file.resolve()]
    for flag, path in extra.items():
        if path is None:
            continue
        if path.resolve() in taken:
            raise SettingsError(f"{flag} {path} is another output, too", "Name two files")
        taken.append(path.resolve())
        _check_output(path, _begins_as_ours)
    if args.html is not None:
        page.check_packages()
    if args.png is not None:
        folder = args.png.resolve()
        if inside := [path for path in taken if path == folder or folder in path.parents]:
            raise SettingsError(
                f"--png {args.png} is replaced as a whole, and {inside[0].name} would lie in it",
                "Name a folder for the pictures alone",
            )
        exports.check_pictures(args.png)
    if not 0 < args.margin < 100:
        raise SettingsError(
            f"--margin {args.margin:g}", "Give percentage points, above 0 and below 100"
        )
    if args.draws < 100 or args.seed < 0:
        raise SettingsError(
            f"--draws {args.draws} --seed {args.seed}", "Draw 100 samples or more, from a seed >= 0"
        )
    comparison = compare(
        args.runs,
        labels=labels,
        task=args.task,
        allow_limit=args.allow_limit,
        allow_different_data=args.allow_different_data,
        margin=args.margin / 100,
        draws=args.draws,
        seed=args.seed,
        rescore=args.rescore,
        baseline=args.baseline,
        intersect=args.intersect,
    )
    # Written before anything is printed: a reader that closes the pipe early loses no file.
    _write(
        markdown_file,
        lambda path: write_text(path, printable(report.to_markdown(comparison), keep="\n")),
    )
    _write(json_file, lambda path: write_json(path, report.to_json(comparison)))
    written = [markdown_file, json_file]
    if args.html is not None:
        _write(args.html, lambda path: write_text(path, page.to_html(comparison)))
        written.append(args.html)
    if args.csv is not None:
        csv = printable(exports.to_csv(comparison), keep="\n")
        _write(args.csv, lambda path: write_text(path, csv))
        written.append(args.csv)
    if args.latex is not None:
        latex = printable(exports.to_latex(comparison), keep="\n")
        _write(args.latex, lambda path: write_text(path, latex))
        written.append(args.latex)
    if args.png is not None:
        written += exports.write_pictures(comparison, args.png)
    report.print_comparison(comparison, PipedConsole(highlight=False))
    print()
    for path in written:
        print(printable(f"Wrote {path}"))
    return 0


def common_folder(paths: Sequence[Path]) -> Path:
    """Returns the folder in which the runs lie; the working directory if that is only "/".

    Args:
        paths: The runs.
    """
    if not paths:
        return Path()
    common = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    if common == Path(common.anchor):
        return Path()
    try:
        return common.relative_to(Path.cwd())
    except ValueError:
        return common


def _check_output(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuses to overwrite anything but an earlier comparison."""
    if path.exists() and not is_ours(path):
        raise SettingsError(
            f"{path} exists and is not a comparison of ours",
            "Name another file, or move it away",
        )


def _is_our_json(path: Path) -> bool:
    try:
        return read_json(path).get("kind") == report.KIND
    except ResultsError:
        return False


def _is_our_markdown(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8").startswith(report.MARKDOWN_TITLE)
    except (OSError, UnicodeDecodeError):
        return False


def _begins_as_ours(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            head = file.read(1000)
    except (OSError, UnicodeDecodeError):
        return False
    marks = ('content="qlora-harness compare"', "% Made by qlora-harness compare")
    return any(mark in head for mark in marks) or head.startswith(",".join(exports.FIELDS))


def _write(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        raise ResultsError(
            f"{path} can't be written: {error.strerror}",
            "Name another file",
        ) from None

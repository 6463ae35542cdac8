"""`qlora-harness study [STUDY.yaml]`: runs a study and prints its answer."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_harness.errors import SettingsError, printable
from qlora_harness.flag_checks import check_at_least
from qlora_harness.settings import Quant
from qlora_harness.study.definition import OWN, Cell, Study, build_study, read_study
from qlora_harness.train.command import add_settings, flag_parser

_DESCRIPTION = """\
Trains every arm with every seed, scores all of them, and prints the answer: how the arms differ in
memory, time, loss and accuracy. After an interruption, repeat the command to resume. The flags of
launch/train.py apply to all arms.
"""
_EPILOG = """\
examples:
  qlora-harness study study.yaml
  qlora-harness study --recipe demo --arms bf16,nf4 --seeds 2 --tasks mmlu_qlora_demo
  qlora-harness study study.yaml --dry-run
  qlora-harness study study.yaml --cell nf4/0
"""
_FAILED = 3  # exit status


def run(words: Sequence[str]) -> int:
    """Runs the study of a command line; returns its exit status, 3 if a cell failed."""
    began = time.monotonic()
    flags = vars(_parser().parse_args(words))
    file = flags.pop("study")
    chosen, dry, steps = (flags.pop(name) for name in ("cell", "dry_run", "measure_steps"))
    check_at_least({"--measure-steps": steps}, 0)
    content = {} if file is None else read_study(file)
    study = build_study(_overridden(content, flags), flags, file)
    for name in chosen or ():
        study.cell(name)
    command = _Command(study, chosen, began)
    return command.run_dry(steps) if dry else command.run()


def _parser() -> argparse.ArgumentParser:
    parser = flag_parser("qlora-harness study", _DESCRIPTION, _EPILOG)
    group = parser.add_argument_group("the study")
    group.add_argument(
        "study", nargs="?", type=Path, metavar="STUDY.yaml", help="a study file; flags override it"
    )
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    for flag, metavar, text in (
        ("--name", "NAME", "its name (default: the file's, or 'study')"),
        ("--output-dir", "DIR", "its folder (default results/NAME)"),
        ("--arms", "A,B,…", "quantisations, or names of arms in the file"),
        ("--seeds", "N", "a number of seeds, or a list such as 0,1,5 (default 1)"),
        ("--tasks", "A,B,…", "benchmarks as in `score --suite`, on which to score every cell"),
        ("--data-dir", "DIR", "folder with the benchmarks' files"),
        ("--score-batch-size", "N", "texts in one lm_eval batch; packs ignore it (default 16)"),
    ):
        group.add_argument(flag, metavar=metavar, help=text, **unset)
    group.add_argument(
        "--score-bases",
        action="store_true",
        help="also score each base without an adapter",
        **unset,
    )
    group.add_argument(
        "--cell",
        action="append",
        metavar="ARM/SEED",
        help="run only this cell, such as nf4/0 or base_nf4; may be repeated",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the cells, their memory, time and commands, and write no records",
    )
    group.add_argument(
        "--measure-steps",
        type=int,
        default=12,
        metavar="N",
        help="optimizer steps that --dry-run measures for each arm; 0: none (default 12)",
    )
    return add_settings(parser, leave_out=("quant", "output_dir", *OWN))


def _overridden(content: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The study with its own flags applied; the training settings stay in `flags`."""
    own = ("name", "recipe", "seeds", "tasks", "data_dir", "score_batch_size", "score_bases")
    given = {name: flags.pop(name) for name in own if flags.get(name) is not None}
    flags.pop("recipe", None)
    names = flags.pop("arms", None)
    if names is not None:
        given["arms"] = _arms(content.get("arms") or {}, [n.strip() for n in names.split(",")])
    return content | given


def _arms(known: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Arms by name: those of the study file, else quantisations."""
    quants = [quant.value for quant in Quant]
    for name in names:
        if name not in known and name not in quants:
            raise SettingsError(
                f"--arms: {name!r} is neither an arm of the study file nor a quantisation",
                f"Name some of {', '.join(dict.fromkeys([*known, *quants]))}",
            )
        if names.count(name) > 1:
            raise SettingsError(f"--arms: {name!r} is given twice", "Remove one")
    return {name: known.get(name, {"quant": name}) for name in names}


class _Command:
    """One call of the command, for all cells or the `chosen` ones."""

    def __init__(self, study: Study, chosen: Sequence[str] | None, began: float) -> None:
        from qlora_harness.study.checks import with_one_dtype
        from qlora_harness.study.devices import visible_devices
        from qlora_harness.study.folder import StudyFolder

        self._devices = visible_devices()
        self._study = with_one_dtype(study, self._devices)
        if not all(device.has_bfloat16 for device in self._devices):
            print("float16 where compute_dtype is auto: a GPU has no bfloat16")
        self._folder = StudyFolder(self._study)
        self._folder.check()
        self._chosen, self._began = chosen, began
        self._console = Console(highlight=False)

    def run(self) -> int:
        """Runs the incomplete cells, then prints the answer."""
        from qlora_harness.study.progress import is_complete

        tasks = self._study.tasks
        cells = [cell for cell in self._cells() if not is_complete(cell, tasks)]
        failures = self._run_cells(cells)
        try:
            if self._chosen is None:
                self._compare([c for c in self._study.cells if is_complete(c, tasks)])
        finally:
            for line in failures:
                self._console.print(printable(line), soft_wrap=True, markup=False)
            if failures:
                print(f"logs: {self._folder.logs}; repeat the command to retry")
        return _FAILED if failures else 0

    def _run_cells(self, cells: Sequence[Cell]) -> list[str]:
        """Runs cells; returns a line for each one left incomplete."""
        from qlora_harness.study.checks import check_study_runs
        from qlora_harness.study.display import Display
        from qlora_harness.study.pool import Pool

        plans = check_study_runs(self._study, self._devices) if cells else {}
        self._folder.begin()
        if not cells:
            return []
        steps = {arm: plan.steps for arm, plan in plans.items()}
        display = Display(cells, steps, len(self._devices), self._console)
        pool = Pool(self._study, self._devices[: len(cells)], display.take)
        try:
            with display.shown():
                pool.run(cells, display.refresh)
        except KeyboardInterrupt:
            print("stopped; repeat the command to resume")
            raise
        finally:
            pool.close()
            self._folder.finish(time.monotonic() - self._began)
        return display.failures()

    def _cells(self) -> list[Cell]:
        if self._chosen is None:
            return list(self._study.cells)
        return [self._study.cell(name) for name in dict.fromkeys(self._chosen)]

    def _compare(self, cells: Sequence[Cell]) -> None:
        """Compares the complete cells: writes the files, prints the answer."""
        if len(cells) < 2:
            return
        from qlora_harness.compare import command

        parser, folder = argparse.ArgumentParser(), self._study.folder
        command.add_arguments(parser)
        words = [*(str(cell.folder) for cell in cells)]
        words += ["--markdown", str(folder / command.MARKDOWN_FILE)]
        words += ["--json", str(folder / command.JSON_FILE)]
        if find_spec("plotly") is not None:
            words += ["--html", str(folder / "comparison.html")]
        command.run(parser.parse_args(words))
        if find_spec("plotly") is None:
            print("pip install 'qlora-harness[reports]' adds a page with figures")

    def run_dry(self, steps: int) -> int:
        """Prints the projected memory and time, from a few measured steps of each arm."""
        from qlora_harness.study.checks import check_study_runs
        from qlora_harness.study.pool import Pool
        from qlora_harness.study.projection import Measurement, Probe, project
        from qlora_harness.study.worker import Report

        plans = check_study_runs(self._study, self._devices)
        measured: dict[str, Measurement] = {}
        problems: list[str] = []
        cells = {cell.arm: cell for cell in self._cells() if cell.seed is not None}

        def take(report: Report) -> None:
            arm = report.cell.partition("/")[0]
            if "measurement" in report.values:
                measured[arm] = report.values["measurement"]
            elif report.state == "failed":
                problems.append(f"{arm}: {report.values['failure']}")

        if steps:
            pool = Pool(self._study, self._devices[:1], take)
            try:
                jobs = [Probe(cell, plans[arm], steps) for arm, cell in cells.items()]
                pool.run(jobs, lambda: None)
            finally:
                pool.close()
        print(project(self._cells(), plans, measured, len(self._devices)))
        for cell in self._cells():
            print("\n".join(["", f"# {cell.name}", *map(printable, self._study.commands(cell))]))
        for line in problems:
            print(printable(line))
        return _FAILED if problems else 0
